"""Every experiment composes, instantiates and takes one step on the CPU, shrunken in size alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from ic.config.compose import compose_config
from ic.config.groups import CONF
from ic.config.run import RunConfig
from ic.model.cost import cache_bytes_per_token, num_parameters

EVERY = sorted(p.stem for p in (CONF / "experiment").glob("*.yaml"))


def _is_of_a_folder(name: str) -> bool:
    """Whether a model's folder gives the sizes: tests of such experiments bring one."""
    text = (CONF / "experiment" / f"{name}.yaml").read_text()
    return "override /model: pretrained" in text


EXPERIMENTS = [name for name in EVERY if not _is_of_a_folder(name)]
PRESETS = sorted(p.stem for p in (CONF / "debug").glob("*.yaml"))
SHRINK = (
    "trainer.max_steps=1",
    "trainer.max_time=null",
    "trainer.accelerator=cpu",
    "trainer.devices=1",
    "trainer.precision=32-true",
    "model.hidden_size=64",
    "model.intermediate_size=96",
    "model.num_hidden_layers=2",
    "data.context_length=256",
    "data.tokens_per_batch=256",
    "data.num_workers=0",
    "data.val_batches=1",
    "callbacks.context_length.start_length=128",
    "evaluation.lengths=[256]",
    "evaluation.depths=[0.5]",
    "evaluation.samples=1",
    "evaluation.control_samples=0",
    "callbacks.memory=null",
    "trainer.val_check_interval=1",
    "model.attention=torch",
    "strategy=auto",
)


def test_no_document_of_an_experiment_is_tokenized_by_several_workers() -> None:
    schema = yaml.safe_load((CONF / "data/text.yaml").read_text())
    found = {}
    for name in EVERY:
        text = (CONF / "experiment" / f"{name}.yaml").read_text()
        if "override /data: text" in text:
            found[name] = {**schema, **yaml.safe_load(text)["data"]}
    assert set(found) == {"heal", "text_small"}
    for name, data in found.items():
        assert data["num_streams"] % max(1, data["num_workers"]) == 0, name


# The alignment experiments read files and know no curriculum.
ALIGNMENT = [name for name in EXPERIMENTS if name.startswith(("sft_", "dpo_"))]
SHRINK_ALIGNMENT = (
    *(o for o in SHRINK if "val_batches" not in o and "start_length" not in o),
    "data.tokens_per_batch=512",
    "trainer.num_sanity_val_steps=1",
    "trainer.limit_val_batches=1",
)
LORA = ("model/adapter=lora", "model.adapter.r=4")


@pytest.mark.parametrize(("name", "adapter"), [*((n, ()) for n in ALIGNMENT), ("dpo_tiny", LORA)])
def test_alignment_takes_a_step(
    ic: Callable[..., int], tmp_path: Path, name: str, adapter: tuple[str, ...]
) -> None:
    data = "conversations" if name.startswith("sft") else "preferences"
    rows = (CONF.parent / f"datamodules/assets/{data}-val.jsonl").read_text().splitlines()
    for split, part in (("train", rows[:8]), ("val", rows[8:16])):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(part))
    files = [f"data.{split}_files=[{split}.jsonl]" for split in ("train", "val")]
    if name == "sft_32k":
        files.append("data.completion_column=completion")
    settings = [*SHRINK_ALIGNMENT, "model.init_from=null", *adapter]
    if name.endswith("_32k"):
        settings += ["evaluation.lengths=[1024]", "evaluation.fillers=[noise]"]
    assert ic("fit", f"experiment={name}", *settings, *files) == 0
    run = tmp_path / "runs" / name / "default"
    assert (run / "checkpoints/last/model.safetensors").is_file()
    assert (run / "checkpoints/last/adapter").is_dir() == bool(adapter)
    assert (run / "passkey/heatmap.png").is_file() == name.endswith("_32k")


# What it leaves is looked at in tests/callbacks/test_samples.py.
TEXT = [name for name in EXPERIMENTS if name.startswith("text_")]


@pytest.mark.parametrize("name", TEXT)
def test_text_takes_a_step(ic: Callable[..., int], tmp_path: Path, name: str) -> None:
    (tmp_path / "book.txt").write_text("\n\n".join(f"Paragraph {i} of many." for i in range(90)))
    shrink = [o for o in SHRINK if "val_batches" not in o and "start_length" not in o]
    assert ic("fit", f"experiment={name}", *shrink, "data.train_files=[book.txt]") == 0
    run = tmp_path / "runs" / name / "default"
    assert (run / "checkpoints/last/model.safetensors").is_file()
    assert (run / "samples.jsonl").read_text().count("\n") == 2
    assert not (run / "passkey").exists()


@pytest.mark.parametrize("name", sorted({*EXPERIMENTS} - {*ALIGNMENT} - {*TEXT}))
def test_takes_a_step(ic: Callable[..., int], tmp_path: Path, name: str) -> None:
    suites = ["suite.niah.samples=2"] if name == "retrieval_tiny" else []
    # Of two layers, as many as there are.
    shared = ["model.indexer.group_size=2"] if name in ("indexer_1b", "sparse_1b") else []
    assert ic("fit", f"experiment={name}", *SHRINK, *suites, *shared, "model.init_from=null") == 0
    run = tmp_path / "runs" / name / "default"
    assert (run / "checkpoints/last/model.safetensors").is_file()
    assert (run / "passkey/heatmap.png").is_file()
    assert (run / "niah/heatmap.png").is_file() == bool(suites)
    composed = yaml.safe_load((run / "config.yaml").read_text())
    assert composed["name"] == name
    if name == "retrieval_tiny":
        assert ic("predict", f"run={run}") == 0
        rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
        assert all(row["about"]["task"] for row in rows)
        (saved,) = (run / "predict").glob("*.json")
        kinds = [r for r in json.loads(saved.read_text())["rows"] if r.get("by") == "task"]
        assert sum(kind["n"] for kind in kinds) == len(rows)


@pytest.mark.slow
def test_ruler_32k_can_be_planned(ic: Callable[..., int]) -> None:
    assert ic("plan", "experiment=ruler_32k", "model.num_hidden_layers=2") == 0


@pytest.mark.parametrize("preset", PRESETS)
def test_debug_presets_run(ic: Callable[..., int], preset: str) -> None:
    assert ic("fit", "experiment=mla_tiny", f"debug={preset}", *SHRINK) == 0


@pytest.mark.parametrize("name", EVERY)
def test_file_says_how_to_run_it(name: str) -> None:
    text = (CONF / "experiment" / f"{name}.yaml").read_text()
    assert text.startswith(f"# @package _global_\n# python -m ic fit experiment={name}")


@pytest.mark.parametrize("name", [n for n in EXPERIMENTS if not n.endswith(("_tiny", "_small"))])
def test_the_1b_family_has_the_designs_dimensions(name: str) -> None:
    config, _ = compose_config("fit", RunConfig, [f"experiment={name}"])
    model = config.model.mla_config(vocab_size=320)
    # Four indexers with 4 heads of 64, and their keys.
    indexers = 2_654_720 if model.indexer != "off" else 0
    keys = 4 * 64 * 2 if model.indexer == "sparse" else 0
    assert num_parameters(model) == 724_899_072 + indexers
    assert cache_bytes_per_token(model) == 8192 + keys
    assert (model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim) == (128, 64, 128)
    assert config.data.context_length >= 4096


def test_mla_small_has_the_recipes_dimensions() -> None:
    config, _ = compose_config("fit", RunConfig, ["experiment=mla_small"])
    model = config.model.mla_config(vocab_size=320)
    per_layer = 512 * 8 * 96 + 512 * (128 + 32) + 128 * 8 * (64 + 64) + 8 * 64 * 512
    mlp, norms, ssmax = 3 * 512 * 1360, 2 * 512 + 128, 8
    assert num_parameters(model) == 6 * (per_layer + mlp + norms + ssmax) + (2 * 320 + 1) * 512
    assert cache_bytes_per_token(model) == 1920
    assert model.max_position_embeddings > 10 * 2**20


NAMED_LENGTHS = [name for name in EXPERIMENTS if re.search(r"_\d+[km]$", name)]


@pytest.mark.parametrize("name", NAMED_LENGTHS)
def test_a_name_says_the_length_or_the_file_does(name: str) -> None:
    """`mla_32k` trains to 32,768 tokens; a file whose name says something else says so in words."""
    config = compose_config("fit", RunConfig, [f"experiment={name}"])[0]
    number, unit = re.findall(r"_(\d+)([km])$", name)[0]
    if config.data.context_length != int(number) * {"k": 2**10, "m": 2**20}[unit]:
        said = (CONF / "experiment" / f"{name}.yaml").read_text()
        assert f"# Trains to {config.data.context_length:,} tokens." in said


@pytest.mark.parametrize(
    ("file", "overrides"),
    [("model/mla_1b", ("model=mla_1b", "data=passkey")), ("experiment/infinitecontext_1b", ())],
)
def test_what_is_called_1b_says_how_many(file: str, overrides: tuple[str, ...]) -> None:
    overrides = overrides or (file.replace("/", "="),)
    config = compose_config("fit", RunConfig, list(overrides))[0]
    parameters = num_parameters(config.model.mla_config(vocab_size=320))
    assert f"{parameters / 1e9:.2f} B parameters" in (CONF / f"{file}.yaml").read_text()

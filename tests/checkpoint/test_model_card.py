"""The card of an export tells what files tell, parses as the hub's, and gives nothing away."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from huggingface_hub import ModelCard

from ic.checkpoint.card.history import stages_of
from ic.checkpoint.model_card import write_card
from ic.checkpoint.source import find_source
from ic.cli import main
from ic.conversion.parity.run import measure_parity
from ic.files.publishable import publishable, publishable_text, published_command, published_path
from ic.model import MLAConfig, MLAForCausalLM
from tests.conftest import SHORT, SMALL
from tests.conversion.parity.models import options, save_llama, save_mla, write_text

Capture = pytest.CaptureFixture[str]
Verb = Callable[..., int]
# Stands for whatever a host may be called, in a path and in a variable.
HOST = "gpu-17.cluster.example"
TEXT = "".join(
    f"Call me Ishmael the {n}th. Some years ago, never mind how long.\n" for n in range(99)
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run `passkeys/default`, one on text that began with it, which was
    evaluated, and the run's data in a folder with spaces.
    """
    root = tmp_path_factory.mktemp("alice")
    (root / "My Books").mkdir()
    (root / "My Books/moby dick.txt").write_text(TEXT)
    first = (
        *SHORT[1:],
        "model.length_temperature=none",
        "callbacks.memory=null",
        "name=passkeys",
        "trainer.max_steps=2",
    )
    second = (
        "data=text",
        *(option for option in first[1:] if not option.startswith(("name=", "data.val"))),
        f"data.train_files=['{root}/My Books/moby dick.txt']",
        "data.document_unit=line",
        "data.val_fraction=0.2",
        "model.init_from=runs/passkeys/default",
        "callbacks.context_length=null",
        "callbacks.passkey=null",
        "model=mla_tiny",
        "name=moby",
    )
    measured = (
        "checkpoint=runs/moby/default",
        "accelerator=cpu",
        "evaluation.lengths=[256]",
        "evaluation.depths=[0.5]",
        "evaluation.samples=1",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for verb, options in (("fit", first), ("fit", second), ("evaluate", measured)):
            patch.setattr("sys.argv", ["ic", verb, *options])
            with pytest.raises(SystemExit) as exit_:
                main([verb, *options])
            assert exit_.value.code == 0
    return root


@pytest.fixture
def here(runs: Path, tmp_path: Path, ic: Verb) -> Path:
    """A copy of the runs, in which to export."""
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True, symlinks=True)
    return tmp_path


@pytest.mark.slow
def test_tells_the_stages_and_figures_that_files_hold(here: Path, ic: Verb) -> None:
    assert ic("export", "checkpoint=runs/moby/default", "output=export/moby") == 0
    text = (here / "export/moby/README.md").read_text()
    facts = json.loads((here / "export/moby/model_card.json").read_text())
    first, second = facts["stages"]
    assert (first["run"], first["step"], first["data"]) == ("passkeys/default", 2, "passkey")
    assert (second["run"], second["from"]) == ("moby/default", "runs/passkeys/default")
    (book,) = second["files"]["train_files"]["named"]
    assert book == {"name": "moby dick.txt", "bytes": len(TEXT)}
    tokens = json.loads((here / "runs/moby/default/throughput.json").read_text())["tokens_seen"]
    assert f"- tokens seen: {tokens:,}, in 2 steps\n" in text
    results = json.loads((here / "runs/moby/default/results.json").read_text())
    losses = {row["split"]: row for row in results["rows"] if row["what"] == "losses"}
    assert second["losses"]["val/loss"] == pytest.approx(losses["val"]["loss"], abs=1e-6)
    assert second["losses"]["train/loss"] == pytest.approx(losses["train"]["loss"], abs=1e-6)
    assert f"val/loss {losses['val']['loss']:.4g}" in text
    # What the verb `evaluate` found of this checkpoint, and not the run's own before it.
    folder = here / "runs/moby/default/evaluate/step=2/passkey"
    shown = json.loads((folder / "results.json").read_text())["shown"]
    assert [suite["title"] for suite in facts["suites"]] == [shown["title"]]
    assert f"| {' | '.join(shown['lines'][0])} |" in text
    # Of shapes and bytes.
    model = MLAForCausalLM.from_pretrained(here / "export/moby")
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f"| parameters | {count:,} |" in text
    assert "480 bytes (64 + 16 numbers per layer" in text
    assert "The languages of its text are not recorded." in text
    assert "bias, safety and truth" in text


def test_is_one_of_the_hubs(here: Path, ic: Verb) -> None:
    assert ic("export", "checkpoint=runs/moby/default", "output=moby", "licence=MIT") == 0
    data = ModelCard.load(here / "moby/README.md").data
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "mit",
        "transformers",
        "text-generation",
    )
    assert {"mla", "deepseek_v3", "long-context"} <= set(data.tags)
    assert "conversational" not in data.tags  # the byte tokenizer's template taught it nothing
    assert data.base_model is None
    rows = json.loads((here / "runs/moby/default/evaluate/step=2/passkey/results.json").read_text())
    (row,) = [r for r in rows["rows"] if r["depth"] != "control"]
    (result,) = data.eval_results
    assert (result.dataset_type, result.metric_type) == ("passkey", "accuracy")
    assert (result.metric_value, result.dataset_config) == (row["accuracy"], "single, 256 tokens")
    # Parsed and written again it is the same page.
    again = ModelCard(str(ModelCard.load(here / "moby/README.md")))
    assert again.data.to_dict() == data.to_dict()


def test_the_history_outlives_its_files(here: Path, ic: Verb, capsys: Capture) -> None:
    """Of an export that a run began with the stages are told, though their runs are gone."""
    assert ic("export", "checkpoint=runs/moby/default", "output=moby") == 0
    (here / "runs/passkeys").rename(here / "runs/third")
    shutil.rmtree(here / "runs/moby")
    config = here / "runs/third/default/config.yaml"
    config.write_text(config.read_text().replace("init_from: null", "init_from: moby"))
    assert ic("export", "checkpoint=runs/third/default", "output=third") == 0
    stages = json.loads((here / "third/model_card.json").read_text())["stages"]
    assert [stage["run"] for stage in stages] == [
        "passkeys/default",
        "moby/default",
        "third/default",
    ]
    shutil.rmtree(here / "moby")
    assert ic("export", "checkpoint=runs/third/default", "output=lost") == 0
    text = (here / "lost/README.md").read_text()
    assert "**1. moby, which was not there when this card was written**" in text
    assert "this history is not whole" in text


def test_of_a_checkpoint_before_the_last_no_later_figure_is_told(here: Path, ic: Verb) -> None:
    run = here / "runs/passkeys/default"
    assert ic("export", "checkpoint=runs/passkeys/default", "output=last") == 0
    assert "| single | 256 |" in (here / "last/README.md").read_text()
    (run / "checkpoints/last").unlink()
    (run / "checkpoints/best").unlink(missing_ok=True)
    (run / "checkpoints/step=2").rename(run / "checkpoints/step=1")
    assert ic("export", f"checkpoint={run}/checkpoints/step=1", "output=first") == 0
    text = (here / "first/README.md").read_text()
    assert "No evaluation of these weights was found beside them." in text
    assert "- tokens seen: not counted, in 1 steps" in text
    metrics = json.loads((here / "first/model_card.json").read_text())["stages"][0]["losses"]
    last = json.loads((here / "last/model_card.json").read_text())["stages"][0]["losses"]
    assert metrics["train/loss"] != last["train/loss"]


def test_gives_no_path_host_or_secret_away(
    here: Path, ic: Verb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: HOST)
    results = here / "runs/moby/default/results.json"
    found = json.loads(results.read_text())
    found["command"] += f" logger.wandb.api_key=0123abcd note=on-{HOST}:/scratch/alice/x"
    found["device"] = f"4 x H200 on {HOST}"
    results.write_text(json.dumps(found))
    assert ic("export", f"checkpoint={here}/runs/moby/default", f"output={here}/out") == 0
    for name in ("README.md", "model_card.json"):
        text = (here / "out" / name).read_text()
        for secret in (str(here), "alice", str(Path.home()), HOST, "0123abcd", "My Books", "/tmp"):
            assert secret not in text, (name, secret)
        assert "moby dick.txt" in text


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("python -m ic fit data.train_files=[/a/b.txt,/c/d.txt]", "data.train_files=[b.txt,d.txt]"),
        ("python -m ic fit 'data.train_files=[/My Books/b c.txt]'", "=[b c.txt]"),
        ("python -m ic fit output_dir=../../home/x", "output_dir=x"),
        ("python -m ic fit output_dir=runs/x", "output_dir=runs/x"),
        ("python -m ic fit model.init_from=~/runs/x", "model.init_from=x"),
        ("python -m ic compare /a/b runs/c", "compare b runs/c"),
        ("python -m ic fit --output_dir=/a/b", "--output_dir=b"),
        ("python -m ic evaluate suite.judge.url=http://gpu3:8000/v1", "suite.judge.url=http://"),
        ("python -m ic evaluate suite.judge.api_key=k", "suite.judge.api_key='<hidden>'"),
        ("python -m ic fit 'unclosed=/home/x", "unclosed=x"),
        ("python -m ic fit tokenizer=bytes data.tokens_per_batch=4", "data.tokens_per_batch=4"),
    ],
)
def test_commands_are_shown_without_their_machine(command: str, shown: str) -> None:
    told = published_command(command)
    assert shown.replace("'", "") in told.replace("'", "")
    for secret in ("/a/", "/My", "home", "~", "gpu3", "=k"):
        assert secret not in told


def test_what_is_published_of_other_texts() -> None:
    assert published_path("runs/a/b") == "runs/a/b"
    assert published_path("/home/alice/My Models/x") == "x"
    assert published_path("C:\\Users\\alice\\x") == "x"
    assert published_path("/") == "<folder>"
    assert publishable_text("read /home/alice/x.txt, and/or 3/4 of </s>") == (
        "read x.txt, and/or 3/4 of </s>"
    )
    assert publishable_text("see https://github.com/a/b and https://u:p@node7/x") == (
        "see https://github.com/a/b and https://<host>"
    )
    assert publishable_text("token hf_abcdefghijkl") == "token <hidden>"
    assert publishable({"a": ["/x/y", 3], "hf_token": "abc", "tokens": "abc"}) == {
        "a": ["y", 3],
        "hf_token": "<hidden>",
        "tokens": "abc",
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of random weights that says nothing of itself."""
    MLAForCausalLM(MLAConfig(**SMALL)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_an_unknown_licence_is_said_to_be_unknown(folder: Path) -> None:
    path = write_card(folder)
    assert path is not None
    assert ModelCard.load(path).data.license == "unknown"
    assert "\n## Licence\n\nUnknown. " in path.read_text()


@pytest.mark.parametrize(
    ("theirs", "hub", "name"),
    [("apache-2.0", "apache-2.0", None), ("The Acme Licence v2", "other", "The Acme Licence v2")],
)
def test_the_licence_of_a_source_is_its_own(
    folder: Path, tmp_path: Path, ic: Verb, theirs: str, hub: str, name: str | None
) -> None:
    page = f"---\nlicense: {theirs}\nlanguage: [en]\n---\n# Theirs\n"
    (folder / "README.md").write_text(page)
    assert ic("export", "checkpoint=model", "output=out") == 0
    data = ModelCard.load(tmp_path / "out/README.md").data
    assert (data.license, data.license_name, data.language) == (hub, name, ["en"])
    assert f"{theirs}, the licence of model." in (tmp_path / "out/README.md").read_text()
    assert (folder / "README.md").read_text() == page


def test_a_page_that_a_hand_wrote_is_left(folder: Path) -> None:
    (folder / "README.md").write_text("# Mine\n")
    assert write_card(folder) is None
    assert (folder / "README.md").read_text() == "# Mine\n"
    assert not (folder / "model_card.json").exists()


def test_an_export_over_an_edited_page_is_refused(
    folder: Path, tmp_path: Path, ic: Verb, capsys: Capture
) -> None:
    export = ("export", "checkpoint=model", "output=out")
    assert ic(*export) == 0
    manifest = json.loads((tmp_path / "out/export.json").read_text())["files"]
    assert {"README.md", "model_card.json"} <= set(manifest)
    assert ic(*export, "overwrite=true") == 0
    page = tmp_path / "out/README.md"
    page.write_text(page.read_text() + "It likes whales.\n")
    capsys.readouterr()
    assert ic(*export, "overwrite=true") == 2
    assert "output=out: its README.md was edited since" in capsys.readouterr().err
    assert page.read_text().endswith("It likes whales.\n")
    page.unlink()
    assert ic(*export, "overwrite=true") == 0


@pytest.mark.parametrize("licence", ["", " ", "MIT\nor so", "x" * 101])
def test_a_licence_without_a_name_is_refused(
    folder: Path, ic: Verb, capsys: Capture, licence: str
) -> None:
    assert ic("export", "checkpoint=model", "output=out", f"licence='{licence}'") == 2
    assert "licence=" in capsys.readouterr().err


def test_a_damaged_file_beside_a_checkpoint_does_not_stop_an_export(here: Path, ic: Verb) -> None:
    run = here / "runs/moby/default"
    for name in ("results.json", "throughput.json", "config.yaml"):
        (run / name).write_text("{")
    (run / "csv/metrics.csv").write_text("step,train/loss\n0,nan\n1,x\n")
    (run / "evaluate/step=2/passkey/results.json").write_text("[]")
    assert ic("export", "checkpoint=runs/moby/default", "output=out") == 0
    assert "hardware and versions: unknown" in (here / "out/README.md").read_text()


def test_loads_as_the_card_says(here: Path, ic: Verb) -> None:
    """With extensions the card imports this package for the model; without, for the tokenizer."""
    assert ic("export", "checkpoint=runs/moby/default", "output=moby") == 0
    text = (here / "moby/README.md").read_text()
    code = text.partition("```python\n")[2].partition("```")[0]
    assert code.startswith("import ic.model  # knows the byte tokenizer")
    scope: dict[str, object] = {}
    exec(code, scope)
    assert type(scope["model"]).__name__ == "DeepseekV3ForCausalLM"


def test_what_a_gguf_file_says_of_itself(tmp_path: Path) -> None:
    path = tmp_path / "alice" / "small.gguf"
    path.parent.mkdir()
    writer = GGUFWriter(path, "llama")
    writer.add_name("Small 1M")
    writer.add_organization("Acme")
    writer.add_license("apache-2.0")
    writer.add_languages(["en"])
    writer.add_tensor("a", np.ones((1, 32), np.float32))
    q8 = quantize(np.ones((1, 32), np.float32), GGMLQuantizationType.Q8_0)
    writer.add_tensor("b", q8, raw_dtype=GGMLQuantizationType.Q8_0)
    for write in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file"):
        getattr(writer, write)()
    writer.close()
    (stage,) = stages_of(find_source(path))
    assert stage == {
        "kind": "source",
        "name": "small.gguf",
        "repository": None,
        "title": "Acme Small 1M",
        "family": "llama",
        "quantised": ["Q8_0"],
        "licence": "apache-2.0",
        "languages": ["en"],
    }


def test_a_folder_of_the_hubs_cache_is_called_by_its_repository(tmp_path: Path) -> None:
    folder = tmp_path / "models--acme--small-1M/snapshots/0123abcd"
    MLAForCausalLM(MLAConfig(**SMALL)).save_pretrained(folder)
    (stage,) = stages_of(find_source(folder))
    assert (stage["name"], stage["repository"]) == ("acme/small-1M", "acme/small-1M")


def test_a_parity_report_goes_into_the_card_of_its_folder(tmp_path: Path, ic: Verb) -> None:
    folders = {"llama": save_llama(tmp_path / "llama"), "mla": save_mla(tmp_path / "mla")}
    folders |= {"text": write_text(tmp_path / "text.txt"), "reports": tmp_path}
    assert ic("export", "checkpoint=mla", "output=out", "licence=mit") == 0
    folders["out"] = tmp_path / "out"
    parts = {"parts": ["logits", "cache"], "lengths": [256]}
    results = measure_parity(
        options(folders, "llama", "out", output=str(tmp_path / "out/parity"), **parts)
    )
    text = (tmp_path / "out/README.md").read_text()
    assert "### parity: beside llama" in text
    (row,) = [r for r in results["rows"] if r["what"] == "logits" and r["position"] == "all"]
    assert f"| perplexity at 256 | {row['perplexity_original']:.4g} |" in text
    data = ModelCard(text).data
    assert data.license == "mit"
    assert [result.metric_value for result in data.eval_results] == [row["perplexity_converted"]]
    assert str(tmp_path) not in text + (tmp_path / "out/model_card.json").read_text()
    # One that a hand has changed stays as it is, and a report elsewhere changes none.
    page = tmp_path / "out/README.md"
    page.write_text("# Mine\n")
    measure_parity(options(folders, "llama", "out", output=str(tmp_path / "out/parity"), **parts))
    assert page.read_text() == "# Mine\n"


def test_of_a_conversion(tmp_path: Path, ic: Verb) -> None:
    """Its card and conversion.json name the source and its licence, and give no folder away."""
    home = tmp_path / "alice"
    source = save_llama(home / "small llama")
    (source / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n")
    text = write_text(home / "moby dick.txt")
    asked = ["calibration_rows=2", "calibration_tokens=64", "accelerator=cpu", "parity=null"]
    given = (f"source='{source}'", f"calibration=['{text}']", f"output={home}/mla", "rank=8")
    assert ic("convert", *given, *asked) == 0
    page = (home / "mla/README.md").read_text()
    data = ModelCard(page).data
    assert (data.license, data.language, data.library_name) == ("mit", ["en"], "transformers")
    assert "**1. small llama**" in page
    assert "**2. Conversion of small llama to MLA**" in page
    assert f"- calibration: moby dick.txt ({text.stat().st_size:,} bytes)\n" in page
    assert "- cache: 32 numbers per token and layer before, 16 after (50%)" in page
    rows = json.loads((home / "mla/conversion.json").read_text())["rows"]
    worst = max(row["output_error"] for row in rows)
    assert f"{worst:.1%} at most" in page
    for file in (home / "mla").glob("*.*"):
        if file.suffix in (".md", ".json"):
            assert "alice" not in file.read_text(), file
    # What is trained, or exported, from it knows of both stages.
    assert ic("export", f"checkpoint={home}/mla", "output=out", "dtype=bfloat16") == 0
    assert "**2. Conversion of small llama to MLA**" in (tmp_path / "out/README.md").read_text()

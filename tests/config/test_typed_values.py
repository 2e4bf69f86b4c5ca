"""Values arrive as they were typed: the field decides what they are, not a grammar."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from ic.cli import find_verbs
from ic.config.callbacks import MemoryProfilerConfig, ProfilerConfig
from ic.config.compose import compose_config
from ic.config.groups import CONF
from ic.config.logger import WandbConfig
from ic.config.objective import PreferenceConfig
from ic.config.run import RunConfig
from ic.config.sweep import sweep_jobs
from ic.config.typed_values import field_type, is_single, spell_values
from ic.evaluation.passkey.grid import PasskeyGridConfig
from ic.model.options import AdapterOptions
from ic.studies.ablation.options import AblationConfig, AblationVariant
from ic.verbs.evaluate import Config as EvaluateConfig
from ic.verbs.generate import Config as GenerateConfig

Capture = pytest.CaptureFixture[str]
PROMPTS = (
    "größe",
    "介绍一下你。",
    "a | b",
    "[INST] hello",
    '{"a": 1}',
    "'tis so",
    "two\nlines",
    "~/x",
    "12_345",
    "1e3",
    " 5 ",
    "true",
    "null",
    "${seed}",
    "",
)


def read(override: str) -> Any:
    """What Hydra makes of an override, as the configuration gives it back."""
    parsed = OverridesParser.create().parse_override(override)
    return OmegaConf.create({"it": parsed.value()}).it


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_arrives_as_typed(prompt: str) -> None:
    config, _ = compose_config("generate", GenerateConfig, ["checkpoint=x", f"prompt={prompt}"])
    assert config.prompt == prompt


@given(st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: text != "???"))
def test_any_text_arrives_as_typed(text: str) -> None:
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if not quoted:
        (spelled,) = spell_values(GenerateConfig, [f"prompt={text}"])
        assert read(spelled) == text
        assert spell_values(GenerateConfig, [spelled]) == [spelled]


@given(st.lists(st.text("ab'\"\\${}, 1_e[]=\n:é", min_size=1), max_size=4))
def test_text_of_a_list_arrives_as_typed(texts: list[str]) -> None:
    quoted = ["'" + text.replace("\\", "").replace("'", r"\'") + "'" for text in texts]
    expected = [text.replace("\\", "") for text in texts]
    if not any("${" in text for text in expected):  # in quotes it refers to another key
        (spelled,) = spell_values(RunConfig, [f"data.train_files=[{', '.join(quoted)}]"])
        assert read(spelled) == expected


@pytest.mark.parametrize("run_id", ["12_34", "1_234", "8e30901", "1.10", "0x1", "inf", "true"])
def test_a_name_is_no_number(run_id: str) -> None:
    assert compose_config("fit", RunConfig, [f"run_id={run_id}"])[0].run_id == run_id


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("'a, b'", "a, b"),
        ('"12_34"', "12_34"),
        ("'${name}'", "run"),  # in quotes it is Hydra's
    ],
)
def test_quotes_are_hydras(typed: str, expected: str) -> None:
    assert compose_config("fit", RunConfig, [f"tokenizer={typed}"])[0].tokenizer == expected


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("trainer.max_steps=1_000", 1000),
        ("trainer.deterministic=on", True),
        ("optimizer.lr=1e-3", 1e-3),
        ("trainer.gradient_clip_val=null", None),
        ("ckpt_path=null", None),
        ("ckpt_path=runs/a/checkpoints/step=2", "runs/a/checkpoints/step=2"),
        ("evaluation.lengths=512", [512]),
        ("evaluation.lengths=[512, 1024]", [512, 1024]),
        ("evaluation.tasks=single", ["single"]),
        ("evaluation.samples_by_length.16384=2", {16384: 2}),
        ("evaluation.fillers_by_length={512: [noise], 1024: [random]}", None),
        ('model.rope_parameters={"rope_type": "default", "rope_theta": 1e4}', None),
        ("trainer.devices=2", 2),
    ],
)
def test_each_field_reads_its_own_type(override: str, value: Any) -> None:
    config, _ = compose_config("fit", RunConfig, [override])
    key = override.partition("=")[0].removesuffix(".16384")
    found = config
    for name in key.split("."):
        found = getattr(found, name)
    if key.endswith("fillers_by_length"):
        value = {512: ["noise"], 1024: ["random"]}
    if key.endswith("rope_parameters"):
        value = {"rope_type": "default", "rope_theta": 1e4}
    assert found == value
    assert type(found) is type(value)


def test_files_are_typed_like_names() -> None:
    for given_, files in (
        ("one.txt", ["one.txt"]),
        ("größe é.txt", ["größe é.txt"]),
        ("[1e3, größe.txt,12_34,data/[ab]*.txt]", ["1e3", "größe.txt", "12_34", "data/[ab]*.txt"]),
        ("['a, b.txt',c=1.txt]", ["a, b.txt", "c=1.txt"]),
        (r"[a\, b.txt]", ["a, b.txt"]),
        ("[]", []),
    ):
        config, _ = compose_config("fit", RunConfig, ["data=text", f"data.train_files={given_}"])
        assert config.data.train_files == files


def test_tables_in_a_list_are_typed_too() -> None:
    variants = 'ablation.variants=[{name: 1e3}, {"name": b, overrides: ["data.x=[1,2]", x=1_0]}]'
    config, _ = compose_config("ablation", AblationConfig, [variants])
    assert config.ablation.variants == [
        AblationVariant("1e3"),
        AblationVariant("b", ["data.x=[1,2]", "x=1_0"]),
    ]


def test_a_suites_options_are_typed_by_the_suite() -> None:
    assert field_type(EvaluateConfig, ["suite", "passkey", "split"]) is str
    assert field_type(EvaluateConfig, ["suite", "passkey", "lengths"]) == list[int]


@pytest.mark.parametrize(
    ("override", "read_part", "expected"),
    [
        ("logger.wandb={project: x}", lambda c: c.logger.wandb, WandbConfig(project="x")),
        ("model.adapter={r: 8}", lambda c: c.model.adapter, AdapterOptions(r=8)),
        ('model.adapter={"r": 8}', lambda c: c.model.adapter, AdapterOptions(r=8)),
        ("preference={beta: 0.2}", lambda c: c.preference, PreferenceConfig(beta=0.2)),
        (
            "callbacks.profiler={active_steps: 2}",
            lambda c: c.callbacks.profiler,
            ProfilerConfig(active_steps=2),
        ),
        ("callbacks.profiler={}", lambda c: c.callbacks.profiler, ProfilerConfig()),
        ("optimizer={lr: 0.5}", lambda c: (c.optimizer.lr, c.optimizer.name), (0.5, "muon")),
    ],
)
def test_a_table_switches_a_part_on(
    override: str, read_part: Callable[[RunConfig], Any], expected: Any
) -> None:
    more = ["data=preference"] if override.startswith("preference") else []
    config, _ = compose_config("fit", RunConfig, [*more, override])
    assert read_part(config) == expected


@pytest.mark.slow
def test_a_table_keeps_what_a_part_has() -> None:
    first = "callbacks.memory={first_steps: 7}"
    config, _ = compose_config("fit", RunConfig, [first, "callbacks.memory={every_n_steps: 5}"])
    assert config.callbacks.memory == MemoryProfilerConfig(first_steps=7, every_n_steps=5)
    off_and_on = ["callbacks.memory=null", first]
    config, _ = compose_config("fit", RunConfig, off_and_on)
    assert config.callbacks.memory == MemoryProfilerConfig(first_steps=7)
    config, _ = compose_config("fit", RunConfig, off_and_on[::-1])
    assert config.callbacks.memory is None


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("lr=1e-3", "unknown key 'lr'; did you mean optimizer.lr?"),
        ("model.adapter=lora", "model.adapter=lora: write model/adapter=lora"),
        ("callbacks/passkey=null", "callbacks/passkey=null: write callbacks.passkey=null"),
        ("logger.wandb=true", "logger.wandb={} to switch it on as it is, or logger.wandb=null"),
        (
            "logger=null",
            "logger=null: logger cannot be switched off; choose one of default, mlflow",
        ),
        ("evaluation.lengths=512,1024", "write evaluation.lengths=[512,1024], in quotes"),
        ("evaluation.lengths=[512", "evaluation.lengths=[512: the brackets do not match"),
        ("evaluation.lengths=[512,[1]", "the brackets of '512,[1' do not match"),
        ("optimizer={lr}", "optimizer={lr}: 'lr' is no entry; write {key: value}"),
        ("trainer.max_steps=größe", "trainer.max_steps: Value 'größe' of type 'str'"),
        ("callbacks.profiler.active_steps=2", "on with 'callbacks.profiler={active_steps: 2}'"),
    ],
)
def test_what_fits_nothing_is_refused_in_a_line(override: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)):
        compose_config("fit", RunConfig, [override])


@pytest.mark.parametrize("sweep", ["12_34,größe,'a, b'", "choice(12_34,größe,'a, b')"])
def test_values_of_a_sweep_are_typed_too(sweep: str) -> None:
    jobs = sweep_jobs([f"tokenizer={sweep}", "model.adapter={r: 8}"])
    configs = [compose_config("fit", RunConfig, job.overrides)[0] for job in jobs]
    assert [config.tokenizer for config in configs] == ["12_34", "größe", "a, b"]
    assert [config.model.adapter for config in configs] == [AdapterOptions(r=8)] * 3


def test_the_evaluation_of_a_run_may_be_given_as_a_table() -> None:
    config, _ = compose_config("fit", RunConfig, ["evaluation={lengths: 512, tasks: [single]}"])
    assert config.evaluation == PasskeyGridConfig(lengths=[512], tasks=["single"])


def test_a_field_with_the_name_of_a_group_takes_a_value() -> None:
    """`evaluation` of `register` is a folder; of `fit` it is an option of the group."""
    found = {}
    for name, verb in find_verbs().items():
        schema = verb.module.Config
        for each in fields(schema):
            if (CONF / each.name).is_dir() and is_single(field_type(schema, [each.name])):
                for value in ("some/folder", "12_3", "a b=c"):
                    given = [f"{each.name}={value}"]
                    _, text = compose_config(name, schema, given, check=False)
                    assert OmegaConf.create(text)[each.name] == value
                found[name, each.name] = schema
    assert {("register", "evaluation"), ("ab_route", "experiment")} <= found.keys()

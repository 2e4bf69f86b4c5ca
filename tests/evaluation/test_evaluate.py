"""The verb `evaluate`: whose grid it takes, where its files go, how it continues."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import Tensor

from ic.errors import UsageError
from ic.evaluation.comparison.answers import find_answers
from ic.files.json_lines import read_rows
from ic.inference.greedy import GreedyDecoder
from tests.conftest import SHORT
from tests.inference.test_transformers_model import MAKERS, save

Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]

RUN = "run=runs/debug/default"
OWN_GRID = (
    "evaluation.lengths=[256]",
    "evaluation.depths=[0.5,1.0]",
    "evaluation.fillers=[random]",
    "evaluation.samples=1",
    "evaluation.samples_by_length={}",
    "evaluation.control_samples=1",
)


@pytest.fixture
def trained(ic: Run, tmp_path: Path) -> Path:
    """A run of one step with a grid of its own."""
    quick = ("trainer.max_steps=1", "callbacks.passkey=null", "callbacks.memory=null")
    assert ic(*SHORT, *OWN_GRID, *quick, "trainer.accelerator=cpu") == 0
    return tmp_path / "runs/debug/default"


def composed(ic: Run, capsys: Capture, *args: str) -> dict:
    capsys.readouterr()
    assert ic("evaluate", *args, "--print_config") == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_a_run_brings_its_own_grid(ic: Run, capsys: Capture, trained: Path) -> None:
    saved = yaml.safe_load((trained / "config.yaml").read_text())
    saved["trainer"] |= {"devices": "auto", "accelerator": "gpu"}
    saved["model"]["attention"] = "triton"
    del saved["evaluation"]["share_haystack"]  # as an earlier version wrote it
    (trained / "config.yaml").write_text(yaml.safe_dump(saved))

    config = composed(ic, capsys, RUN)
    assert config["evaluation"] == {**saved["evaluation"], "share_haystack": False}
    assert (config["devices"], config["accelerator"]) == ("auto", "gpu")
    assert (config["attention"], config["norm"]) == ("triton", "torch")
    assert config["checkpoint"] == "runs/debug/default"

    config = composed(ic, capsys, "evaluation.lengths=[512]", RUN, "devices=2", "checkpoint=export")
    assert config["evaluation"]["lengths"] == [512]
    assert config["evaluation"]["depths"] == [0.5, 1.0]
    assert (config["devices"], config["accelerator"]) == (2, "gpu")
    assert config["checkpoint"] == "export"

    config = composed(ic, capsys, RUN, "evaluation=distractors", "evaluation.samples=3")
    assert config["evaluation"]["lengths"] == [4096, 32768, 131072]
    assert config["evaluation"]["fillers"] == ["noise", "random"]  # nothing of the run's is left
    assert config["evaluation"]["samples"] == 3


def test_a_run_brings_its_own_suites(ic: Run, capsys: Capture, trained: Path) -> None:
    file = trained / "config.yaml"
    saved = yaml.safe_load(file.read_text())
    niah = {"lengths": [256, 512], "samples": 3, "kinds": ["digits-7"], "gone": 1}
    passkey = saved["evaluation"]  # as a run keeps it that had it among its suites
    saved["suite"] = {"niah": niah, "graph": {"samples": 2}, "passkey": passkey, "lost": {}}
    file.write_text(yaml.safe_dump(saved))

    suites = composed(ic, capsys, RUN)["suite"]
    assert set(suites) == {"passkey", "niah", "graph"}
    assert suites["niah"]["lengths"] == [256, 512]
    assert (suites["niah"]["kinds"], suites["niah"]["depths"][0]) == (["digits-7"], 0.0)
    assert suites["graph"]["samples"] == 2
    # What is given wins, and a suite that the run does not have has its defaults.
    suites = composed(ic, capsys, RUN, "suite=[ruler,niah]", "suite.niah.samples=9")["suite"]
    assert set(suites) == {"ruler", "niah"}
    assert (suites["niah"]["lengths"], suites["niah"]["samples"]) == ([256, 512], 9)
    assert suites["ruler"]["samples"] == 50
    assert list(composed(ic, capsys, RUN, "suite=graph")["suite"]) == ["graph"]
    assert ic("evaluate", RUN, "--print_config") == 0
    err = capsys.readouterr().err
    assert "run=runs/debug/default: this version has no suite.niah.gone" in err
    assert "run=runs/debug/default: this version has no suite lost: left out" in err


def test_a_run_of_another_version(
    ic: Run, capsys: Capture, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = trained / "config.yaml"
    original = file.read_text()
    saved = yaml.safe_load(original)
    del saved["model"]["attention"], saved["evaluation"]["seed"], saved["trainer"]["devices"]
    saved["evaluation"]["gone"] = 7
    try:
        file.write_text(yaml.safe_dump(saved))
        config = composed(ic, capsys, RUN)
        assert (config["attention"], config["devices"]) == ("torch", 1)
        assert config["evaluation"]["lengths"] == saved["evaluation"]["lengths"]
        assert "gone" not in config["evaluation"]
        for text, message in (("", "holds no configuration"), ("{", "is no YAML")):
            file.write_text(text)
            assert ic("evaluate", RUN) == 2
            assert f"config.yaml {message}" in capsys.readouterr().err
    finally:
        file.write_text(original)


def test_files_lie_beside_the_checkpoints(
    ic: Run, capsys: Capture, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    answers = GreedyDecoder.answers

    def counted(self: GreedyDecoder, ids_BT: Tensor, new_tokens: int, *rest: Any) -> Tensor:
        calls.append(ids_BT.shape[1])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return answers(self, ids_BT, new_tokens, *rest)

    monkeypatch.setattr(GreedyDecoder, "answers", counted)
    assert ic("evaluate", RUN) == 130  # stopped in the second of three cells
    folder = trained / "evaluate/step=1/passkey"
    assert len(read_rows(folder / "samples.jsonl")) == 1
    assert ic("evaluate", RUN) == 0
    assert calls == [256] * 4  # the first cell was not answered again
    assert f"heatmap: {folder / 'heatmap.png'}" in capsys.readouterr().out
    results = json.loads((folder / "results.json").read_text())
    assert results["config"]["suite"] == "passkey"
    assert [(row["depth"], row["n"]) for row in results["rows"]] == [
        ("control", 1),
        (0.5, 1),
        (1.0, 1),
    ]
    assert not list(trained.rglob("checkpoints/**/samples.jsonl"))

    # The same checkpoint by another name, and then the same weights elsewhere.
    last = trained / "checkpoints/last"
    assert ic("evaluate", f"checkpoint={last}", *OWN_GRID, "accelerator=cpu") == 0
    assert len(calls) == 4
    shutil.copytree(last, tmp_path / "mine")
    assert ic("evaluate", RUN, "checkpoint=mine") == 0
    assert len(calls) == 7
    assert (tmp_path / "runs/evaluate/mine/passkey/heatmap.png").is_file()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("run=runs/debug/defalt",),
            "run=runs/debug/defalt: no run has written runs/debug/defalt/",
        ),
        (("run=a,b", "-m"), "run=a: no run has written a/config.yaml"),
        ((), "evaluate needs checkpoint=..."),
        (("checkpoint=x", "suite=passkeys"), "unknown suite 'passkeys'; did you mean passkey"),
        (("checkpoint=x", "suite=[passkey,passkey]"), "suite: passkey is given twice"),
        (("checkpoint=x", "suite=[]"), "suite: choose at least one"),
        (("checkpoint=x", "devices=none"), "devices=none: must be auto or a number of at least 1"),
        (("checkpoint=x", "devices=0"), "devices=0: must be auto or a number of at least 1"),
    ],
)
def test_refuses(ic: Run, capsys: Capture, args: tuple[str, ...], message: str) -> None:
    assert ic("evaluate", *args) == 2
    assert message in capsys.readouterr().err


def test_a_model_of_transformers(ic: Run, capsys: Capture, tmp_path: Path) -> None:
    folder = save(MAKERS["llama"](), tmp_path / "llama")
    assert ic("evaluate", f"checkpoint={folder}", *OWN_GRID, "accelerator=cpu") == 0
    rows = read_rows(tmp_path / "runs/evaluate/llama/passkey/samples.jsonl")
    assert [(row["depth"], row["correct"]) for row in rows] == [(0.5, 0), (1.0, 0), (-1.0, 0)]
    (folder / "model.safetensors").unlink()  # what is refused is refused before they are read
    for args, message in (
        (
            ("evaluation.lengths=[256,512]",),
            "512 tokens and 7 of the answer, but the model has 512",
        ),
        (("context_parallel_size=1", "attention=triton"), "attention=triton: "),
    ):
        assert ic("evaluate", f"checkpoint={folder}", "accelerator=cpu", *args) == 2
        assert message in capsys.readouterr().err
    # What several suites refuse is said at once.
    args = ("suite=[graph,passkey,mrcr]", "suite.graph.lengths=[128]", "suite.mrcr.lengths=[128]")
    assert ic("evaluate", f"checkpoint={folder}", "accelerator=cpu", *args, *OWN_GRID) == 2
    (line,) = (each for each in capsys.readouterr().err.splitlines() if each.startswith("ic: "))
    assert "suite.graph.lengths=[128]: 128 tokens do not hold" in line
    assert "; suite.mrcr.lengths=[128]: 128 tokens do not hold" in line


def test_a_folder_tells_of_the_settings_that_were_measured_last(ic: Run, tmp_path: Path) -> None:
    """Settings A, B and A again: nothing is answered anew, so the last line is of B."""
    folder = save(MAKERS["llama"](), tmp_path / "llama")
    suite = tmp_path / "runs/evaluate/llama/passkey"
    settings = []
    for seed in (1, 2, 1):
        given = (f"evaluation.seed={seed}", "accelerator=cpu")
        assert ic("evaluate", f"checkpoint={folder}", *OWN_GRID, *given) == 0
        answers = find_answers(suite)["passkey"]
        settings.append(answers.settings)
        assert answers.options["seed"] == seed
        assert len(answers.answers) == 2
    assert (
        settings[0]
        == settings[2]
        != settings[1]
        == read_rows(suite / "samples.jsonl")[-1]["settings"]
    )
    results = suite / "results.json"
    results.write_text(results.read_text().replace(settings[0], "another"))
    with pytest.raises(UsageError, match="lacks the answers that results.json tells of"):
        find_answers(suite)

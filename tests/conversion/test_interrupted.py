"""A conversion that is interrupted or killed leaves nothing half-written, and is made by a rerun."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ic.checkpoint import export
from ic.checkpoint.commit import whole_folder
from ic.checkpoint.errors import CheckpointError
from ic.checkpoint.export_folder import check_output
from ic.conversion.parity import run as parity_run
from tests.conversion.parity.models import save_llama, write_text
from tests.run.killed import run_and_die

Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]


def arguments(folder: Path, *more: str) -> tuple[str, ...]:
    given = (f"source={folder / 'llama'}", f"output={folder / 'out/mla'}", "rank=8")
    text = (f"calibration=[{folder / 'text.txt'}]", "calibration_rows=2", "calibration_tokens=64")
    return ("convert", *given, *text, "format=text", "accelerator=cpu", *more)


def in_the_second_file(number: int) -> None:
    """A signal to this process when one safetensors file of several is there."""
    write, files = export._write_file, []

    def written(*args: Any) -> None:
        write(*args)
        files.append(args)
        if len(files) == 2:
            os.kill(os.getpid(), number)

    export._write_file = written


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    save_llama(tmp_path / "llama")
    write_text(tmp_path / "text.txt")
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_nothing_is_left_half_written_and_a_rerun_works(ic: Run, inputs: Path) -> None:
    out, many = inputs / "out", arguments(inputs, "parity=null", "max_shard_size=40KB")
    run_and_die(inputs, many, in_the_second_file, signal.SIGINT, exit_code=130)
    assert names(out) == []
    run_and_die(inputs, many, in_the_second_file, signal.SIGKILL)
    (left,) = names(out)
    assert re.fullmatch(r"mla\.partial-\d+", left)
    assert ic(*many) == 0
    assert names(out) == ["mla"]
    assert len(list((out / "mla").glob("*.safetensors"))) > 2
    assert ic(*arguments(inputs, "parity=null", "overwrite=true")) == 0


def test_what_stepped_aside_for_an_export_that_never_came_is_not_lost(tmp_path: Path) -> None:
    """Killed when the earlier folder has stepped aside and the new one has no name yet."""
    target = tmp_path / "mla"
    target.mkdir()
    (target / "earlier").touch()
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from ic.checkpoint.commit import whole_folder\n"
        "rename = Path.rename\n"
        "def killed(self, to):\n"
        "    if '.partial-' in self.name: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return rename(self, to)\n"
        "Path.rename = killed\n"
        "with whole_folder(Path(sys.argv[1])) as partial: (partial / 'later').touch()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(target)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [re.sub(r"\d+", "N", name) for name in names(tmp_path)] == [
        "mla.partial-N",
        "mla.partial-old-N",
    ]
    # Who asks for the place without overwrite=true is told of what is there again.
    with pytest.raises(CheckpointError, match="exists: choose another folder"):
        check_output(tmp_path / "source", target, overwrite=False)
    assert names(tmp_path) == ["mla"]
    assert names(target) == ["earlier"]


def test_a_folder_that_is_being_written_is_left_alone(tmp_path: Path) -> None:
    """Another process that writes to the same place is not robbed of its folder."""
    gone, theirs = tmp_path / "mla.partial-1", tmp_path / "mla.partial-old-x"
    unlike = tmp_path / "mla.partial-1.txt"
    for folder in (gone, theirs, unlike):
        folder.mkdir()
    with whole_folder(tmp_path / "mla") as partial:
        code = "import sys; from pathlib import Path; from ic.checkpoint import commit; "
        code += "commit.clear_partial(Path(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "mla")], check=True)
        assert partial.is_dir()
        assert not gone.exists()
    assert names(tmp_path) == ["mla", "mla.partial-1.txt", "mla.partial-old-x"]


def test_ctrl_c_amid_the_report(
    ic: Run, inputs: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The conversion is whole by then; the line says how to go on with the report alone."""
    options = ("parity.parts=[logits,cache]", "parity.lengths=[128]", "parity.documents=1")

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(parity_run, "cache_rows", interrupted)
        assert ic(*arguments(inputs, *options)) == 130
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"ic: interrupted; {inputs / 'out/mla'} is whole, its report is not; ")
    go_on = shlex.split(told.partition("go on with python -m ic ")[2])
    assert ic(*go_on) == 0
    results = json.loads((inputs / "out/mla/parity/parity.json").read_text())
    assert results["parts"] == ["logits", "cache"]
    assert [r["length_tokens"] for r in results["rows"] if r["what"] == "logits"] != []

"""Each check meets the real condition that it is there for, where this machine can have it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from ic.doctor import filesystem, gpu, machine, slurm, versions
from ic.doctor.check import Finding, examine
from ic.doctor.step_time import longest_step
from ic.files.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]


def by_name(findings: Iterator[Finding]) -> dict[str, Finding]:
    return {finding.what: finding for finding in findings}


def test_good_folder(tmp_path: Path) -> None:
    found = by_name(filesystem.output_directory(tmp_path / "not" / "there" / "yet"))
    assert {"rename", "symbolic links", "write speed", "clock of the file server"} < set(found)
    for what in ("rename", "symbolic links", "clock of the file server"):
        assert found[what].status == "ok"
    assert str(tmp_path) in found["free space"].found
    assert not list(tmp_path.iterdir())


def test_read_only_folder(mounted: Callable[[str], Path]) -> None:
    folder = mounted("ro,size=1m")
    found = by_name(filesystem.output_directory(folder))
    assert found["output_dir"].status == "fail"
    assert found["output_dir"].found == f"cannot write in {folder}: Read-only file system"


def test_full_disk(mounted: Callable[[str], Path]) -> None:
    found = by_name(filesystem.output_directory(mounted("size=1m")))
    assert found["free space"].status == "fail"
    assert found["write speed"].status == "fail"
    assert found["write speed"].found == "64 MiB: No space left on device"
    assert found["rename"].status == "ok"


def test_folder_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = by_name(filesystem.output_directory(tmp_path / "file"))
    assert found["output_dir"].found == f"{tmp_path / 'file'} is a file"


def test_shared_memory(mounted: Callable[[str], Path], tmp_path: Path) -> None:
    (small,) = machine.shared_memory(mounted("size=64m"))  # Docker's default
    assert (small.status, small.found.split(" GiB")[0]) == ("warn", "0.06")
    assert "--shm-size" in small.fix
    (large,) = machine.shared_memory(mounted("size=4g"))
    assert large.status == "ok"
    (none,) = machine.shared_memory(tmp_path / "nowhere")
    assert none.status == "warn"


def test_open_files() -> None:
    """In a shell with a lower limit, as slurmd or a container may set."""
    script = (
        "from ic.doctor.machine import limits\n"
        "for f in limits(): print(f.what, f.status, f.found, sep='|')"
    )
    for limit, expected in (("500", "open files|warn|500 (hard "), ("5000", "open files|ok|5,000")):
        shell = f'ulimit -Sn {limit}; exec "$0" -c "$1"'
        out = subprocess.run(
            ["bash", "-c", shell, sys.executable, script],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(versions.ROOT)},
        ).stdout
        assert out.startswith(expected)


def test_versions_here_fit() -> None:
    assert [f.status for f in versions.python_version()] == ["ok"]
    found = by_name(versions.package_versions())
    assert {"torch", "lightning", "transformers", "triton"} <= set(found)
    assert "fail" not in {finding.status for finding in found.values()}


@pytest.mark.parametrize(
    ("requirement", "tested", "status", "found"),
    [
        ("pytest>=1", None, "ok", ""),
        ("pytest>=1000", None, "fail", "needs >=1000"),
        ("pytest>=1", "0.1", "warn", "tested with 0.1"),
        ("no-such-distribution-here>=1", None, "fail", "not installed"),
    ],
)
def test_package_version(requirement: str, tested: str | None, status: str, found: str) -> None:
    (finding,) = versions.package_version(Requirement(requirement), tested)
    assert finding.status == status
    assert found in finding.found
    assert ("pip install" in finding.fix) == (status != "ok")


def test_optional_packages_may_be_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "OPTIONAL", ("no-such-distribution-here",))
    assert not list(versions.package_version(Requirement("no-such-distribution-here>=1"), None))


@pytest.mark.parametrize(
    ("newest", "built_for", "status"),
    [
        ("13.0", "13.0", "ok"),
        ("13.0", "13.1", "ok"),
        ("13.2", "12.8", "ok"),
        ("12.8", "13.0", "fail"),
        ("13.0", None, "fail"),
        (None, "13.0", "warn"),
    ],
)
def test_driver_and_cuda(newest: str | None, built_for: str | None, status: str) -> None:
    finding = gpu.cuda_match("driver 580.1", newest, built_for)
    assert finding.status == status
    assert finding.found.startswith("driver 580.1")


def test_a_driver_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\necho Failed to initialize NVML: Driver/library version mismatch\nexit 18\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (finding,) = gpu.driver()
    assert finding.status == "fail"
    assert "version mismatch" in finding.found


@pytest.mark.slow
def test_all_reduce_over_real_processes() -> None:
    assert gpu.all_reduce("gloo", "gloo", 2) == Finding("gloo", "ok", "all-reduce over 2 processes")
    broken = gpu.all_reduce("none", "no-such-backend", 1)
    assert broken.status == "fail"
    assert "all-reduce over 1 processes: " in broken.found


def test_slurm_settings() -> None:
    text = "Configuration data\nJobRequeue              = 0\nKillWait                = 2 sec\n"
    found = by_name(slurm.settings(text))
    assert found["JobRequeue"].status == "warn"
    assert "--requeue" in found["JobRequeue"].fix
    assert (found["KillWait"].status, found["KillWait"].found) == ("warn", "2 s")
    for state in ("DRAIN", "INACTIVE"):
        (partition,) = slurm.partitions(f"PartitionName=a MaxTime=UNLIMITED State={state}\n")
        assert (partition.status, partition.found.split(",")[0]) == ("warn", state)
    (partition,) = slurm.partitions("PartitionName=a MaxTime=UNLIMITED State=UP TotalNodes=2\n")
    assert partition.status == "ok"
    (partition,) = slurm.partitions("PartitionName=a MaxTime=1-00:00:00 State=DOWN TotalNodes=2\n")
    assert (partition.what, partition.status) == ("partition a", "warn")
    assert partition.found == "DOWN, 2 nodes, at most 1-00:00:00"


def test_the_grace_of_slurm_beside_a_measured_step(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    lengths = [
        {"context_length_tokens": n, "step_time_p90_s": s} for n, s in ((256, 0.2), (2**20, 188.0))
    ]
    run.throughput.write_text(json.dumps({"by_context_length": [*lengths, {"num_steps": 1}]}))
    step_s = longest_step(run)
    assert step_s == 188.0
    settings = "KillWait                = 30 sec\n"
    partitions = (
        "PartitionName=a PreemptMode=OFF GraceTime=0\n"
        "PartitionName=b PreemptMode=REQUEUE GraceTime=600\n"
        "PartitionName=c PreemptMode=CANCEL GraceTime=0\n"
    )
    found = by_name(slurm.grace(settings, partitions, step_s))
    assert {what: (each.status, each.found.partition(",")[0]) for what, each in found.items()} == {
        "SIGTERM (KillWait)": ("warn", "30 s"),
        "preemption in b (GraceTime)": ("ok", "630 s"),
        "preemption in c (GraceTime)": ("warn", "30 s"),
        "SIGUSR1 of our sbatch files (--signal)": ("warn", "300 s"),
    }
    assert "sbatch --signal=USR1@564" in found["SIGTERM (KillWait)"].fix
    for script in (ROOT / "slurm").glob("train_*.sbatch"):
        assert f"#SBATCH --signal=USR1@{slurm.SIGNAL_S}\n" in script.read_text()
    short = by_name(slurm.grace(settings, partitions, 14.9))
    assert {each.status for each in short.values()} == {"ok"}


def test_a_run_without_measured_steps(
    ic: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert ic("doctor", "run=nothing") == 2
    error = capsys.readouterr().err
    assert "run=nothing: throughput.json there tells of no timed step; give the folder" in error


def test_a_controller_that_is_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, script in (
        ("scontrol", "echo Slurmctld at ctl is DOWN"),
        ("munge", "echo no munged >&2; exit 1"),
        ("unmunge", "exit 1"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    found = by_name(slurm.controller())
    assert (found["slurmctld"].status, found["slurmctld"].found) == (
        "fail",
        "Slurmctld at ctl is DOWN",
    )
    assert (found["munge"].status, found["munge"].found) == ("fail", "no munged")
    (tmp_path / "scontrol").write_text(
        "#!/bin/sh\necho scontrol: fatal: Could not establish a configuration source >&2; exit 1\n"
    )
    (unconfigured,) = slurm.controller()
    assert (unconfigured.what, unconfigured.status) == ("SLURM", "warn")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    (none,) = slurm.controller()
    assert (none.what, none.status) == ("SLURM", "ok")


def test_a_check_that_falls_over_is_one_failure() -> None:
    def broken_check() -> Iterator[Finding]:
        yield Finding("first", "ok", "")
        raise RuntimeError("oops")

    assert [f.what for f in examine([broken_check])] == ["first", "broken check"]
    assert examine([broken_check])[1].found == "RuntimeError: oops"


def test_the_verb(
    ic: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))  # neither SLURM nor a driver
    assert ic("doctor") == 0
    assert "symbolic links" in capsys.readouterr().out
    (tmp_path / "file").write_text("")
    assert ic("doctor", "--output_dir", "file", "--json") == 1
    findings = json.loads(capsys.readouterr().out)
    failed = [each for each in findings if each["status"] == "fail"]
    assert [each["what"] for each in failed] == ["output_dir"]
    assert failed[0]["fix"]

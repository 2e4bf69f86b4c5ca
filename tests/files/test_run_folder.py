"""Where everything of a run lies. The names are spelt out: users and scripts rely on them."""

from __future__ import annotations

from pathlib import Path

import pytest

from ic.files.run_folder import RunFolder, run_of, saved_step


def test_the_names_of_a_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    named = [
        run.config,
        run.lock,
        run.results,
        run.throughput,
        run.gpu_utilisation,
        run.context_length,
        run.guardrails,
        run.reference,
        run.predictions,
        run.metrics,
        run.tensorboard,
        run.loss_curve,
        run.curves,
        run.report,
        run.nccl,
        run.profile,
        run.memory(),
        run.memory_plot(),
        run.memory("test"),
        run.oom_snapshot(0),
        run.oom_snapshot(3),
        run.checkpoint(20),
        run.last,
        run.best,
        run.suite("passkey").samples,
        run.suite("passkey").samples_at(20),
        run.suite("passkey").table("heatmap"),
        run.suite("passkey").picture("heatmap"),
        run.suite("passkey").results,
    ]
    assert [str(path.relative_to(tmp_path)) for path in named] == [
        "config.yaml",
        ".lock",
        "results.json",
        "throughput.json",
        "gpu_utilisation.json",
        "context_length.json",
        "guardrails.jsonl",
        "reference.jsonl",
        "predictions.jsonl",
        "csv/metrics.csv",
        "tensorboard",
        "loss.png",
        "curves.png",
        "report.html",
        "nccl",
        "profile",
        "memory/memory.json",
        "memory/memory.png",
        "memory/memory_test.json",
        "memory/oom_snapshot.pickle",
        "memory/oom_snapshot_rank3.pickle",
        "checkpoints/step=20",
        "checkpoints/last",
        "checkpoints/best",
        "passkey/samples.jsonl",
        "passkey/samples-step=20.jsonl",
        "passkey/heatmap.csv",
        "passkey/heatmap.png",
        "passkey/results.json",
    ]


def test_saved_steps_leave_out_unfinished_ones(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    for name in ("step=10", "step=2", "step=4.partial-7", "best.partial-3"):
        (checkpoints / name).mkdir(parents=True)
    (checkpoints / "last").symlink_to("step=10")
    run = RunFolder(tmp_path)
    assert run.saved_steps() == [2, 10]
    assert run.resolve_checkpoint("last") == run.checkpoint(10)
    assert saved_step(run.resolve_checkpoint("last")) == 10
    assert run.resolve_checkpoint("elsewhere/step=3") == Path("elsewhere/step=3")
    with pytest.raises(ValueError, match=r"ckpt_path=best: .* holds no such checkpoint"):
        run.resolve_checkpoint("best")


def test_a_checkpoint_knows_its_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "mla_tiny" / "default")
    run.checkpoint(5).mkdir(parents=True)
    run.last.symlink_to("step=5")
    other = RunFolder(tmp_path / "mla_tiny" / "other")
    for folder in (run.checkpoint(5), run.last):
        assert run.owns(folder)
        assert not other.owns(folder)
        found = run_of(folder)
        assert found is not None
        assert found.path == run.path
    assert run_of(tmp_path / "export") is None
    assert run_of(run.checkpoints / "kept") is None
    assert run_of(Path("/")) is None

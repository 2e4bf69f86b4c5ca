"""Where a model comes from."""

from __future__ import annotations

from pathlib import Path

from ic.checkpoint.source import shown_name


def test_a_checkpoint_is_shown_by_its_run(tmp_path: Path) -> None:
    step = tmp_path / "mla_tiny/default/checkpoints/step=1500"
    step.mkdir(parents=True)
    (step.parent / "last").symlink_to(step.name)
    assert shown_name(step.parent / "last") == "mla_tiny, step 1,500"
    assert shown_name(tmp_path / "mla_tiny") == "mla_tiny"

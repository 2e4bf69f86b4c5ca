"""The ladder: experiments run one after another, each from the weights of the one before."""

from __future__ import annotations

from pathlib import Path

from ic.files.run_folder import RunFolder
from ic.studies.ladder_options import LadderConfig, LadderStage
from ic.studies.processes import fit_unless_finished


def run_ladder(config: LadderConfig) -> int:
    """Run the stages that are not finished; an interrupted one goes on from its last checkpoint."""
    before: RunFolder | None = None
    for number, stage in enumerate(config.stages, 1):
        run = RunFolder(Path(config.output_dir) / stage.experiment / config.run_id)
        title = f"stage {number} of {len(config.stages)}, {stage.experiment}"
        if code := fit_unless_finished(title, run, stage_overrides(config, stage, run, before)):
            return code
        before = run
    return 0


def stage_overrides(
    config: LadderConfig, stage: LadderStage, run: RunFolder, before: RunFolder | None
) -> list[str]:
    """Arguments of the `fit` of a stage."""
    overrides = [
        f"experiment={stage.experiment}",
        f"name={stage.experiment}",
        f"run_id={config.run_id}",
        f"output_dir={config.output_dir}",
        *config.overrides,
    ]
    if run.last.exists():
        overrides.append("ckpt_path=last")
    elif "weights" in stage.keep:
        assert before is not None
        overrides.append(f"model.init_from={before.last}")
    return overrides

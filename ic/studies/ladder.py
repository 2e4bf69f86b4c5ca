"""The ladder: experiments run one after another, each from the weights of the one before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from ic.files.run_folder import RunFolder
from ic.studies.ladder_options import LadderConfig, LadderStage


def run_ladder(config: LadderConfig) -> int:
    """Run the stages that are not finished; an interrupted one goes on from its last checkpoint."""
    before: RunFolder | None = None
    for number, stage in enumerate(config.stages, 1):
        run = RunFolder(Path(config.output_dir) / stage.experiment / config.run_id)
        title = f"stage {number} of {len(config.stages)}, {stage.experiment}"
        if run.results.is_file():
            rank_zero_info(f"{title}: finished, see {run.path}")
        else:
            command = stage_command(config, stage, run, before)
            rank_zero_info(f"{title}: python -m ic {' '.join(command)}")
            code = subprocess.run([sys.executable, "-m", "ic", *command], check=False).returncode
            if code:
                return code
        before = run
    return 0


def stage_command(
    config: LadderConfig, stage: LadderStage, run: RunFolder, before: RunFolder | None
) -> list[str]:
    """Arguments of the `fit` of a stage."""
    command = [
        "fit",
        f"experiment={stage.experiment}",
        f"name={stage.experiment}",
        f"run_id={config.run_id}",
        f"output_dir={config.output_dir}",
        *config.overrides,
    ]
    if run.last.exists():
        command.append("ckpt_path=last")
    elif "weights" in stage.keep:
        assert before is not None
        command.append(f"model.init_from={before.last}")
    return command

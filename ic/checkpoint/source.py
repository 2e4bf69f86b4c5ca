"""Where a model comes from, by what a user gives.

    runs/mla_tiny/default               a run's folder: its checkpoint `last`
    runs/mla_tiny/default/checkpoints   the same; or `last`, `best`, `step=100` in it
    export/mla_tiny                     an export, or another Hugging Face folder of safetensors
    model.gguf                          a file of llama.cpp's, or a folder that holds one alone
    models:/mla_tiny@champion           a version in MLflow's registry, which is downloaded

Only names of files are looked at here, so that a wrong path is refused at once; what they hold is
checked by `ic.checkpoint.folder` and `ic.checkpoint.gguf_file`.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path

from ic.checkpoint.errors import CheckpointError
from ic.checkpoint.hugging_face import CONFIG, TOKENIZER_FILES
from ic.files.run_folder import RunFolder, run_of, saved_step
from ic.tracking.registry import is_registered, registered_folder

ALLOWED = (
    "a checkpoint folder, a run's folder, an export, a Hugging Face folder of a causal language "
    "model, a .gguf file or models:/NAME@ALIAS"
)
_SHOWN = 6  # names that an error lists


@dataclass(frozen=True)
class Source:
    """A model that can be loaded.

    Attributes:
        path: its checkpoint folder (the links `last` and `best` followed), or its GGUF file.
    """

    path: Path

    @property
    def is_gguf(self) -> bool:
        return self.path.suffix == ".gguf"

    @property
    def folder(self) -> Path:
        """The checkpoint folder; of a GGUF file a folder of its name beside it, for results."""
        return self.path.with_suffix("") if self.is_gguf else self.path

    @property
    def name(self) -> str:
        """`mla_tiny, step 150` for `<name>/<run_id>/checkpoints/step=150`; else the path's name."""
        path = self.folder.resolve()
        run = run_of(path)
        return f"{run.path.parent.name}, step {saved_step(path):,}" if run else path.name


def find_source(given: str | Path) -> Source:
    """The source that a path stands for.

    Raises:
        CheckpointError: nothing that can be loaded; says what is there and what is allowed.
        UsageError: no such model in the registry, or no registry.
    """
    if is_registered(given):
        return Source(registered_folder(str(given)))
    path = Path(given)
    if path.is_symlink() and not path.exists():
        raise CheckpointError(f"{path} is a link to {os.readlink(path)}, which is not there")
    if not path.exists():
        near = _nearest(path)
        hint = f"did you mean {near}? " if near else ""
        raise CheckpointError(f"no checkpoint folder {path}: {hint}give {ALLOWED}")
    if path.is_file():
        return _file(path)
    if (path / CONFIG).is_file():
        return Source(_follow(path))
    for run in (RunFolder(path), RunFolder(path.parent)):
        if run.checkpoints in (path, RunFolder(path).checkpoints) and run.saved_steps():
            return _last(path, run)
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return Source(files[0])
    if files:
        raise CheckpointError(
            f"{path} holds {len(files)} GGUF files: {_some([file.name for file in files])}; give "
            "one of them"
        )
    runs = sorted(p for p in path.iterdir() if RunFolder(p).saved_steps())
    if runs:
        raise CheckpointError(
            f"{path} is not a checkpoint: it holds the runs {_some([p.name for p in runs])}; give "
            f"one of them, such as {runs[0]}"
        )
    raise CheckpointError(f"{path} is not a checkpoint: it {_contents(path)}; give {ALLOWED}")


def tokenizer_folder(given: Path) -> Path:
    """The folder that holds a tokenizer: of a run's, which holds none itself, its checkpoint."""
    if any((given / name).is_file() for name in TOKENIZER_FILES):
        return given
    try:
        source = find_source(given)
    except ValueError:
        return given
    return given if source.is_gguf else source.path


def _file(path: Path) -> Source:
    if path.suffix == ".gguf":
        return Source(path)
    folder = f"its folder {path.parent}" if (path.parent / CONFIG).is_file() else ALLOWED
    raise CheckpointError(f"{path} is a file, and not a .gguf file; give {folder}")


def _follow(folder: Path) -> Path:
    """The folder behind `last` or `best`, which move while a run goes on."""
    return folder.parent / os.readlink(folder) if folder.is_symlink() else folder


def _last(given: Path, run: RunFolder) -> Source:
    if not run.last.exists():
        raise CheckpointError(
            f"{given} is a run without a checkpoint `last`: {run.checkpoints} holds the steps "
            f"{_some([str(step) for step in run.saved_steps()])}; give the folder of one of them"
        )
    if not (run.last / CONFIG).is_file():
        raise CheckpointError(f"{run.last} is not a checkpoint: it holds no {CONFIG}")
    return Source(_follow(run.last))


def _contents(folder: Path) -> str:
    """What an unusable folder holds."""
    if RunFolder(folder).checkpoints.is_dir():
        return "is a run that has saved no checkpoint yet"
    names = sorted(p.name for p in folder.iterdir())
    return f"holds no {CONFIG}, but {_some(names)}" if names else "is an empty folder"


def _nearest(path: Path) -> Path | None:
    """The name that is there and most like the first missing part of a path."""
    parents = [path, *path.parents]
    depth = next(i for i, parent in enumerate(parents) if parent.exists())
    existing, missing = parents[depth], parents[depth - 1].name
    if not existing.is_dir():
        return None
    names = [p.name for p in existing.iterdir()]
    near = difflib.get_close_matches(missing, names, n=1, cutoff=0.6)
    return existing / near[0] if near else None


def _some(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")

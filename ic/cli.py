"""The command line: arguments in, exit code out.

A verb is a file of `ic/verbs`, found by its name, beside a root configuration `conf/NAME.yaml`. The
file holds a docstring (its line in the list of verbs), the dataclass `Config` and `run(config)`,
which returns the exit code; a function `complete(overrides)` adds those that files named by others
stand for, a tuple `POSITIONAL` names the keys of paths that may stand without their names, and
`LOADS_PYTORCH = False` says that it does without PyTorch. The first line of the YAML is a comment
with an example. Neither may import PyTorch before `run` is called, so that help and errors come at
once. `verbs/benchmark_serving.py` is written as two words, `benchmark serving`, because `benchmark`
is a verb of its own.

Errors end here: bad input is one readable line on stderr and exit code 2.
"""

from __future__ import annotations

import ast
import contextlib
import errno
import importlib
import importlib.metadata
import os
import select
import shutil
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

import ic.startup  # noqa: F401  # before anything that imports ic.model
from ic.config.completion import completion_script
from ic.config.compose import compose_config, describe_groups
from ic.config.data import DATA_SCHEMAS
from ic.config.flags import split_flags
from ic.config.groups import CONF, MODEL_SCHEMAS, part_schemas, register_schemas
from ic.config.help import explained
from ic.config.meaning import keys_of
from ic.config.typed_values import spell_values
from ic.errors import RunFailedError, UsageError, lacks_memory, one_line
from ic.files.run_folder import RunFolder
from ic.terminal import is_first_process, launched_rank, quieten

FAILED_EXIT_CODE = 1
USAGE_EXIT_CODE = 2
INTERRUPTED_EXIT_CODE = 130
# What a shell reports of a program that SIGPIPE ended.
CLOSED_PIPE_EXIT_CODE = 141
# How long a process waits with a refusal that the first of several processes may make, too.
_FIRST_SPEAKS_S = 5.0
# A folder or file given by the user that is not there or may not be used.
_PATH_ERRORS = {
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
}
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class Verb:
    """A file of `ic/verbs`, imported when its configuration or its function is asked for."""

    file: Path

    @property
    def name(self) -> str:
        return self.file.stem

    @cached_property
    def words(self) -> str:
        """Its name as it is typed: two words where the first is a verb, too."""
        first, _, rest = self.name.partition("_")
        is_verb = rest and self.file.with_name(f"{first}.py").is_file()
        return f"{first} {rest}" if is_verb else self.name

    @cached_property
    def summary(self) -> str:
        """The first line of its docstring."""
        return (ast.get_docstring(ast.parse(self.file.read_text())) or "").partition("\n")[0]

    @property
    def example(self) -> str:
        """The first line of its YAML."""
        first = (CONF / f"{self.name}.yaml").read_text().partition("\n")[0]
        return first.removeprefix("# ").partition(": ")[0]

    @cached_property
    def module(self) -> ModuleType:
        return importlib.import_module(f"ic.verbs.{self.name}")

    @property
    def positional(self) -> tuple[str, ...]:
        """Keys of paths that may be given without their names, in this order."""
        return tuple(getattr(self.module, "POSITIONAL", ()))

    def complete(self, overrides: list[str]) -> list[str]:
        """The overrides, and those that files which they name stand for."""
        complete = getattr(self.module, "complete", None)
        return overrides if complete is None else list(complete(overrides))

    def run(self, config: Any) -> int:
        if (check := getattr(self.module, "check", None)) is not None:
            check(config)  # what can be refused before PyTorch is loaded
        loads_pytorch = getattr(self.module, "LOADS_PYTORCH", True)
        if loads_pytorch and "torch" not in sys.modules and is_first_process():
            folder = getattr(config, "folder", None)
            where = "" if folder is None else f" in {folder.path}"
            print(f"{self.words}{where}: loading PyTorch ...", file=sys.stderr, flush=True)
        if loads_pytorch:
            quieten()
        try:
            return int(self.module.run(config))
        except (KeyboardInterrupt, SystemExit) as error:
            if self.name == "fit" and _is_interrupt(error):
                error.add_note(_where_to_continue(config.folder))
            raise


def find_verbs() -> dict[str, Verb]:
    """Every verb by its name."""
    files = sorted((Path(__file__).parent / "verbs").glob("*.py"))
    return {file.stem: Verb(file) for file in files}


def find_verb(args: list[str]) -> tuple[Verb, list[str]]:
    """The verb that arguments begin with, and the arguments behind it.

    Hyphens are read as underscores, and two bare words as one name: `benchmark serving` is
    `benchmark_serving`.

    Raises:
        UsageError: there is none.
    """
    verbs = find_verbs()
    given, second = args[0], "".join(args[1:2])
    bare = second.replace("_", "").replace("-", "").isalnum() and not second.startswith("-")
    joined = verbs.get(f"{given}_{second}".replace("-", "_")) if bare else None
    if joined is not None:
        return joined, args[2:]
    verb = verbs.get(given.replace("-", "_"))
    if verb is None:
        raise UsageError.unknown("verb", given, [each.words for each in verbs.values()])
    below = [each.words for each in verbs.values() if each.words.startswith(f"{verb.name} ")]
    if bare and below and not verb.positional:
        raise UsageError.unknown("verb", f"{given} {second}", below)
    return verb, args[1:]


def main(argv: list[str] | None = None) -> None:
    """Entry point; exits with 0, 2 for bad input, 130 after Ctrl-C, 141 where nobody reads what is
    printed any more, as `head` ends, and 1 for anything unforeseen.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _exit_code(args)
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # it may be closed from the start
                stream.flush()
    except (BrokenPipeError, SystemExit) as error:
        # Rich makes a SystemExit of it.
        broken = any(isinstance(each, BrokenPipeError) for each in (error, error.__context__))
        if not (_drop_unread() or isinstance(error, SystemExit)) or not broken:
            raise
        code = CLOSED_PIPE_EXIT_CODE
    sys.exit(code)


def _exit_code(args: list[str]) -> int:
    """Run a command line; what is wrong with it, or failed, is printed."""
    try:
        return _run(args)
    except RunFailedError as error:
        return _say(error, FAILED_EXIT_CODE)
    except (ValueError, OSError, MemoryError, RuntimeError, ImportError) as error:
        if lacks_memory(error) and not isinstance(error, ValueError):
            return _say(error, FAILED_EXIT_CODE, _no_memory(error))
        if isinstance(error, ValueError | OSError):
            return _complain(error)
        raise
    except (KeyboardInterrupt, SystemExit) as error:
        if not _is_interrupt(error):
            raise
        notes = getattr(error, "__notes__", [])
        print("; ".join(["ic: interrupted", *notes]), file=sys.stderr)
        return INTERRUPTED_EXIT_CODE


def _drop_unread() -> bool:
    """Whether nobody reads standard output or error any more. What is left for it is dropped, which
    the interpreter would otherwise try to write when it ends, and complain.
    """
    dropped = False
    for stream in (sys.stdout, sys.stderr):
        try:
            number = stream.fileno()
        except (AttributeError, OSError, ValueError):  # none, or no file
            continue
        asked = select.poll()
        asked.register(number, 0)
        if any(found & (select.POLLERR | select.POLLHUP) for _, found in asked.poll(0)):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            dropped = True
    return dropped


def _is_interrupt(error: BaseException) -> bool:
    """Ctrl-C, or what Lightning's trainer makes of it, with another exit code."""
    return any(isinstance(each, KeyboardInterrupt) for each in (error, error.__context__))


def _where_to_continue(run: RunFolder) -> str:
    """What a `fit` that ended at once leaves, and the command that goes on from it."""
    if not run.last.exists():
        return "no checkpoint is saved: the same command begins again"
    return f"continue from {os.readlink(run.last)} with {run.resume_command}"


def _no_memory(error: Exception) -> str:
    return (
        f"not enough host memory: {str(error) or 'none is left'}; free some, or raise what limits "
        "it: `ulimit -v`, the container's limit, SLURM's --mem"
    )


def _complain(error: ValueError | OSError) -> int:
    """Print bad input, a path that cannot be used or a full disk in one line; raise the rest."""
    text = str(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        if error.errno in _NO_ROOM:
            text = (
                f"{where}{error.strerror}; free some space, or write to another disk (output_dir= "
                "or output=)"
            )
        elif error.errno in _PATH_ERRORS and where:
            text = f"{where}{error.strerror}"
        else:
            raise error
    return _say(error, USAGE_EXIT_CODE, text)


def _say(error: Exception, code: int, text: str | None = None) -> int:
    """Print an error in one line, or raise it for whoever wants its traceback."""
    if os.environ.get("IC_TRACEBACK"):
        raise error
    text = one_line(text or error)
    if rank := launched_rank():
        # The first process says the same, as a rule, and its launcher then ends this one.
        time.sleep(_FIRST_SPEAKS_S)
        text = f"rank {rank}: {text}"
    print(f"ic: {text}", file=sys.stderr)
    return code


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(_verb_list())
        return 0
    if args[0] == "--version":
        print(_versions())
        return 0
    if args[0].partition("=")[0] == "--completion":
        print(_completion(args))
        return 0
    verb, rest = find_verb(args)
    flags, overrides = split_flags(rest, verb.positional)
    if "version" in flags:
        print(_versions())
        return 0
    if "help" in flags:
        print(_help(verb, overrides))
        return 0
    if "multirun" in flags:
        from ic.studies.sweep import run_sweep

        return run_sweep(verb.name, verb.module, overrides)
    overrides = verb.complete(spell_values(verb.module.Config, overrides))
    config, text = compose_config(verb.name, verb.module.Config, overrides)
    if "print_config" in flags:
        print(text.rstrip("\n"))
        return 0
    return verb.run(config)


def _verb_list() -> str:
    verbs = find_verbs()
    width = max(map(len, verbs))
    lines = [f"  {verb.words:<{width}}  {verb.summary}" for verb in verbs.values()]
    return "\n".join(
        [
            "usage: python -m ic VERB [overrides]",
            "",
            *lines,
            "",
            "`python -m ic VERB --help` shows a verb's configuration, `--print_config` the result.",
            "Overrides are Hydra's (trainer.max_steps=100) or flags (--trainer.max_steps 100).",
            "`--version` names what is installed, `--completion bash|zsh|fish` makes a Tab work.",
        ]
    )


def _versions() -> str:
    packages = ("torch", "triton", "lightning", "transformers", "hydra-core")
    found = []
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    python = ".".join(map(str, sys.version_info[:3]))
    # A checkout need not be installed, so that the package's own metadata may be missing.
    own = vars(sys.modules[__name__.partition(".")[0]])["__version__"]
    return f"InfiniteContext {own} ({', '.join(found)}, python {python})"


def _completion(args: list[str]) -> str:
    """The script for a shell, given as `--completion=SHELL` or `--completion SHELL`."""
    _, equals, shell = args[0].partition("=")
    shell = shell if equals else "".join(args[1:2])
    words = {verb.words: _words(verb) for verb in find_verbs().values()}
    return completion_script(shell, words)


def _words(verb: Verb) -> list[str]:
    """What may stand behind a verb: `--help`, `group=option` and `key=`."""
    register_schemas(verb.name, verb.module.Config)
    groups = describe_groups(verb.name)
    chosen = [f"{group}={option}" for group, options in groups.items() for option in options]
    names = [key.name for key in keys_of(verb.module.Config)]
    if "data" in groups:
        kinds = DATA_SCHEMAS.values()
        names += [key.name for kind in kinds for key in keys_of(kind, "data.")]
    if "model" in groups:
        sized = MODEL_SCHEMAS.values()
        names += [key.name for kind in sized for key in keys_of(kind, "model.")]
    keys = [f"{name}=" for name in dict.fromkeys(names) if name not in groups]
    return ["--help", "--print_config", "--multirun", *chosen, *keys]


def _help(verb: Verb, overrides: list[str]) -> str:
    schema = verb.module.Config
    _, text = compose_config(verb.name, schema, overrides, check=False)
    kinds = part_schemas(yaml.safe_load(text))
    width = shutil.get_terminal_size((100, 0)).columns
    chosen = describe_groups(verb.name).items()
    groups = [f"  {group:<13} {', '.join(options)}" for group, options in chosen]
    return "\n".join(
        [
            " ".join(["usage: python -m ic", verb.words, *map(str.upper, verb.positional)])
            + " [overrides]",
            "",
            f"{verb.summary}",
            "",
            f"example: {verb.example}",
            "",
            *(["groups (choose with group=name):", *groups, ""] if groups else []),
            "flags: --help, --print_config, --multirun (-m): a job per value of key=a,b",
            "overrides: key=value, --key=value or --key value; key=null turns a part off",
            "",
            "configuration:",
            explained(text, schema, kinds, width),
            "# Every key in full: docs/configuration.md",
        ]
    )


if __name__ == "__main__":
    main()

"""Arguments of the command line -> our flags and overrides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ic.errors import UsageError

FLAGS = {
    "--help": "help",
    "-h": "help",
    "--print_config": "print_config",
    "--version": "version",
    "--multirun": "multirun",
    "-m": "multirun",
}


def split_flags(args: list[str], positional: Sequence[str] = ()) -> tuple[set[str], list[str]]:
    """Arguments -> our flags, and overrides made from `--key=value`, `--key value` and
    `key=value`. Hyphens in the name behind `--` are read as underscores, as in a verb's name.

    Args:
        positional: keys of paths that may be given without their names, in this order. A path may
            hold an equals sign, as `evaluate/step=600`.

    Raises:
        UsageError: an argument that is none of these, a path too many or one given twice.
    """
    flags: set[str] = set()
    overrides: list[str] = []
    paths: list[str] = []
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        if arg.startswith("--"):
            name, equals, value = arg.partition("=")
            arg = f"--{name[2:].replace('-', '_')}{equals}{value}"
        if arg in FLAGS:
            flags.add(FLAGS[arg])
        elif arg.startswith("--"):
            key, equals, value = arg[2:].partition("=")
            if not equals:
                has_value = rest and not rest[0].startswith("--") and rest[0] not in FLAGS
                value = rest.pop(0) if has_value else "true"
            overrides.append(f"{key}={value}")
        elif positional and _is_path(arg):
            paths.append(arg)
        elif "=" in arg or arg.startswith("~"):
            overrides.append(arg)
        else:
            raise UsageError(
                f"{arg!r} is neither key=value nor a flag; write key=value or --key value"
            )
    if len(paths) > len(positional):
        raise UsageError(f"{paths[len(positional)]!r} is one path too many; give {len(positional)}")
    for key, path in zip(positional, paths, strict=False):
        if any(override.startswith(f"{key}=") for override in overrides):
            raise UsageError(f"{key}=: the path {path!r} is given, too; give one of the two")
        overrides.append(f"{key}={path}")
    return flags, overrides


def _is_path(arg: str) -> bool:
    """Whether an argument of a verb that takes paths is one, rather than `key=value`."""
    key, equals, _ = arg.partition("=")
    return not equals or "/" in key or Path(arg).exists()

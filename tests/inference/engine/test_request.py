"""What a request may ask for, and how the rest is refused."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from ic.inference.engine.options import EngineOptions
from ic.inference.engine.request import Finish, Request, Sampling


@pytest.mark.parametrize(
    ("values", "error"),
    [
        (
            {"max_tokens": 0},
            "Invalid 'max_tokens': integer below minimum value. Expected a value >= 1, but got 0 "
            "instead.",
        ),
        (
            {"temperature": 2.5},
            "Invalid 'temperature': decimal above maximum value. Expected a value <= 2, but got 2.5"
            " instead.",
        ),
        ({"temperature": -0.1}, "Expected a value >= 0, but got -0.1"),
        ({"temperature": float("nan")}, "Expected a value >= 0, but got nan"),
        ({"temperature": True}, "Invalid type for 'temperature': expected a decimal, but got True"),
        ({"temperature": "hot"}, "expected a decimal, but got 'hot'"),
        ({"top_k": -1}, "Invalid 'top_k': integer below minimum value"),
        ({"top_k": 1.5}, "Invalid type for 'top_k': expected an integer, but got 1.5"),
        ({"top_p": 0}, "Invalid 'top_p': decimal below minimum value. Expected a value > 0"),
        ({"top_p": 1.1}, "Invalid 'top_p': decimal above maximum value. Expected a value <= 1"),
        ({"min_p": -1}, "Invalid 'min_p'"),
        ({"presence_penalty": 2.1}, "Invalid 'presence_penalty'"),
        ({"frequency_penalty": -2.1}, "Expected a value >= -2, but got -2.1"),
        ({"repetition_penalty": 0.0}, "Expected a value > 0, but got 0.0"),
        ({"repetition_penalty": float("inf")}, "Invalid 'repetition_penalty': decimal above"),
        ({"stop": ("",)}, "Invalid 'stop': empty string"),
        ({"stop": (7,)}, "Invalid type for 'stop': expected an array of strings, but got 7"),
        ({"stop_token_ids": (-1,)}, "Invalid 'stop_token_ids'"),
        ({"seed": 2**63}, "Invalid 'seed': integer above maximum value"),
        ({"logprobs": 21}, "Expected a value <= 20, but got 21"),
    ],
)
def test_sampling_out_of_range(values: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match="Invalid") as raised:
        Sampling(**values)
    assert error in str(raised.value)


def test_the_edges_are_allowed() -> None:
    edges: list[dict[str, Any]] = [
        {"max_tokens": 1, "temperature": 2, "top_p": 1, "min_p": 1, "logprobs": 20},
        {"presence_penalty": -2, "frequency_penalty": 2.0, "seed": -(2**63), "logprobs": 0},
        {"stop": ("a", "\n"), "stop_token_ids": (0, 3), "top_p": 1e-9, "repetition_penalty": 0.1},
    ]
    for values in edges:
        Sampling(**values)


def test_a_request_has_a_name_and_a_token() -> None:
    with pytest.raises(ValueError, match="Invalid 'id': empty string"):
        Request("", (1,))
    with pytest.raises(ValueError, match="Invalid 'prompt': empty array"):
        Request("a", ())
    assert Request("a", (1,)).sampling == Sampling()
    assert f"{Finish.STOP}" == "stop"


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"page_tokens": 24}, "page_tokens=24: must be a multiple of 16, at least 16"),
        ({"page_tokens": 0}, "page_tokens=0: must be a multiple of 16"),
        ({"cache_tokens": 63}, "cache_tokens=63: must hold a page of 64 tokens"),
        ({"max_batch": 0}, "max_batch=0: must be at least 1"),
        ({"prefill_chunk_tokens": 0}, "prefill_chunk_tokens=0: must be at least 1"),
    ],
)
def test_options_out_of_range(values: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=r"\w+=") as raised:
        EngineOptions(**values)
    assert error in str(raised.value)


def test_requests_and_options_load_no_torch() -> None:
    code = (
        "import ic.startup, sys, ic.inference.engine.request, ic.inference.engine.options; "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

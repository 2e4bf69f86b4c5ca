"""vLLM loads what `quantize` writes, and gives the log-probabilities that our layers give."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path

import pytest

from ic.checkpoint.folder import load_model
from ic.model.byte_tokenizer import ByteTokenizer
from ic.quantization.options import QuantizeOptions
from ic.quantization.quantize import prepare, quantize
from tests.vllm.conftest import Served, prompts, saved_model

pytestmark = pytest.mark.vllm
# int8 alone has products on every CPU in vLLM. Inputs of two layers are rounded to steps of 1 in
# 127, on both sides of a half where sums differ in the last bit.
CLOSE = 5e-2
CPU = Path("/proc/cpuinfo")


@pytest.mark.skipif(
    platform.machine() == "x86_64" and CPU.exists() and "vnni" not in CPU.read_text(),
    reason="without VNNI an x86 CPU adds pairs of int8 products in 16 bits, which overflow",
)
def test_int8(serve: Callable[..., Served], tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    saved_model(plain)
    ByteTokenizer().save_pretrained(plain)
    options = QuantizeOptions(source=str(plain), output=str(tmp_path / "model"), scheme="int8")
    quantize(prepare(options), options)
    model = load_model(tmp_path / "model")
    served = serve(made=model)
    answers = served.answer(prompts(1, 17, 128, 303))
    assert served.worst(answers) < CLOSE
    # Not what the weights that were rounded would answer.
    served.model = load_model(plain)
    assert served.worst(answers) > 2 * CLOSE

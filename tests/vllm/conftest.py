"""The real vLLM on this machine's CPU, with engines inside the test process."""

from __future__ import annotations

import gc
import os

# Read when vLLM is imported. An engine in this process can be watched, and starts in seconds once
# the first one has.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import subprocess
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ic.model import MLAConfig, MLAForCausalLM
from tests.conftest import randomize

VOCABULARY = 97
# The widths of the 1B's heads; few of them, and few layers.
BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_lora_rank": 192,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "length_temperature": "ssmax",
}


@dataclass
class Calls:
    """What vLLM asked of our backend: new tokens of each call, and on which path."""

    decoded: list[int] = field(default_factory=list)
    prefilled: list[int] = field(default_factory=list)


@dataclass
class Served:
    """A model of ours, and vLLM with the folder that it was saved to."""

    model: MLAForCausalLM
    llm: Any
    calls: Calls

    def answer(self, prompts: Sequence[list[int]], tokens: int = 6) -> list[Any]:
        """Greedy answers with the log-probabilities of the whole vocabulary."""
        from vllm import SamplingParams

        asked = SamplingParams(
            max_tokens=tokens, temperature=0, logprobs=-1, ignore_eos=True, detokenize=False
        )
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        return self.llm.generate(given, asked, use_tqdm=False)

    @torch.no_grad()
    def worst(self, answers: Sequence[Any]) -> float:
        """Largest difference of a log-probability from the model's, given the same tokens."""
        return max(float((logprobs(a) - self.expected(a)).abs().max()) for a in answers)

    @torch.no_grad()
    def expected(self, answer: Any) -> Tensor:
        """The model's log-probabilities (tokens, W) of what was answered."""
        prompt = answer.prompt_token_ids
        ids = torch.tensor([[*prompt, *answer.outputs[0].token_ids]])
        return self.model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)


def logprobs(answer: Any) -> Tensor:
    """vLLM's log-probabilities (tokens, W) of one answer."""
    rows = answer.outputs[0].logprobs
    return torch.tensor([[row[i].logprob for i in range(VOCABULARY)] for row in rows])


def prompts(*lengths: int, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def saved_model(folder: Path, **changes: Any) -> MLAForCausalLM:
    """A random model in a folder as `export` writes it, but for the card."""
    torch.manual_seed(0)
    model = MLAForCausalLM(MLAConfig(**{**BASE, **changes})).eval()
    randomize(model)
    model.config.architectures = [MLAForCausalLM.__name__]
    model.save_pretrained(folder)
    return model


def environment(**more: str) -> dict[str, str]:
    """For a vLLM of processes of its own, which import this tree."""
    own = {k: v for k, v in os.environ.items() if k not in ("VLLM_ENABLE_V1_MULTIPROCESSING",)}
    return own | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])} | more


def wait_until_ready(server: subprocess.Popen[Any], port: int, log: Path) -> None:
    """Until vLLM's server answers, however long that takes; fails if it ends before."""
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
            return
        except OSError:
            if server.poll() is not None:
                pytest.fail(log.read_text()[-4000:])
            with suppress(subprocess.TimeoutExpired):  # a second, or until it ends
                server.wait(1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Counts the calls of our backend, which does its work."""
    from ic.serving.vllm_plugin.backend import LatentImpl

    seen = Calls()
    decode, prefill = LatentImpl.forward_mqa, LatentImpl.forward_mha

    def forward_mqa(self: Any, q: Any, cache: Tensor, metadata: Any, layer: Any) -> Any:
        seen.decoded.append(metadata.num_decode_tokens)
        return decode(self, q, cache, metadata, layer)

    def forward_mha(self: Any, q: Tensor, *rest: Any, **named: Any) -> Any:
        seen.prefilled.append(len(q))
        return prefill(self, q, *rest, **named)

    monkeypatch.setattr(LatentImpl, "forward_mqa", forward_mqa)
    monkeypatch.setattr(LatentImpl, "forward_mha", forward_mha)
    return seen


@pytest.fixture
def serve(
    tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Served]]:
    """`serve(changes of the model, options of vLLM)`; decoding as on a CPU, without kernels.

    `made` is a model whose folder `model` is there already.
    """
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    monkeypatch.setattr("ic.kernels.arguments.INTERPRETED", False)
    started: list[Served] = []

    def start(
        changes: dict[str, Any] | None = None, *, made: MLAForCausalLM | None = None, **options: Any
    ) -> Served:
        model = made or saved_model(tmp_path / "model", **(changes or {}))
        options = {
            "dtype": "float32",
            "max_model_len": 768,
            "block_size": 16,
            "max_num_seqs": 8,
            "max_logprobs": -1,
            "enforce_eager": True,
            "skip_tokenizer_init": True,
            **options,
        }
        started.append(Served(model, LLM(str(tmp_path / "model"), **options), calls))
        return started[-1]

    yield start
    for served in started:
        del served.llm
    started.clear()
    cleanup_dist_env_and_memory()
    gc.collect()

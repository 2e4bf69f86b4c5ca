"""Distillation: the loss against PyTorch's on whole logits, and the teacher's attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ic.model import MLAForCausalLM
from ic.model.labels import IGNORE_INDEX
from ic.training.distillation_loss import compare_chunk, distillation_sums
from ic.training.options import DistillationOptions
from ic.training.teacher import Teacher

TOKENS, HIDDEN, WIDER, VOCABULARY = 37, 16, 24, 61
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def options(**given: Any) -> DistillationOptions:
    return DistillationOptions("teacher", **given)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    labels[torch.tensor([0, 5, 36])] = IGNORE_INDEX
    return (
        normal(TOKENS, HIDDEN).requires_grad_(),
        (normal(VOCABULARY, HIDDEN) / 2).requires_grad_(),
        normal(TOKENS, WIDER),
        normal(VOCABULARY, WIDER) / 2,
        labels,
    )


def on_whole_logits(given: tuple[Tensor, ...], temperature: float, share: float) -> list[Tensor]:
    """The same by PyTorch's losses: loss, KL, cross-entropy, agreement."""
    hidden, weight, teacher_hidden, teacher_weight, labels = given
    student, teacher = hidden @ weight.T, teacher_hidden @ teacher_weight.T
    kept = labels != IGNORE_INDEX
    kl = F.kl_div(
        (student / temperature).log_softmax(-1)[kept],
        (teacher / temperature).log_softmax(-1)[kept],
        log_target=True,
        reduction="sum",
    )
    entropy = F.cross_entropy(student, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    agreeing = (student.argmax(-1) == teacher.argmax(-1))[kept].sum()
    return [(1 - share) * temperature**2 * kl + share * entropy, kl, entropy, agreeing]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk_tokens", [7, 4096])
def test_equals_pytorchs_losses_on_whole_logits(
    temperature: float, share: float, chunk_tokens: int
) -> None:
    given = inputs(torch.float32)
    wanted = on_whole_logits(given, temperature, share)
    wanted_grads = torch.autograd.grad(wanted[0] * 0.7, given[:2])
    sums = distillation_sums(
        *given,
        options(temperature=temperature, cross_entropy_weight=share, chunk_tokens=chunk_tokens),
        agreement=True,
    )
    for got, expected in zip(sums, wanted, strict=True):
        torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(sums.loss * 0.7, given[:2])
    for got, expected in zip(grads, wanted_grads, strict=True):
        assert (got - expected).norm() <= 1e-5 * expected.norm()


def test_a_copy_of_the_teacher_has_nothing_to_learn() -> None:
    hidden, weight, _, _, labels = inputs(torch.float32)
    sums = distillation_sums(
        hidden, weight, hidden.detach(), weight.detach(), labels, options(), agreement=True
    )
    assert sums.kl.abs() < 1e-5
    assert int(sums.agreeing) == int((labels != IGNORE_INDEX).sum())
    grads = torch.autograd.grad(sums.loss, (hidden, weight))
    assert max(float(grad.abs().max()) for grad in grads) < 1e-5


def test_no_gradient_is_made_where_none_is_asked() -> None:
    hidden, weight, *others = inputs(torch.float32)
    seen = []

    def compare(*given: Any) -> Any:
        seen.append(given[5])
        return compare_chunk(*given)

    with torch.no_grad():
        distillation_sums(hidden, weight, *others, options(), compare=compare)
    frozen = distillation_sums(hidden, weight.detach(), *others, options(), compare=compare)
    frozen.loss.backward()
    assert seen == [False, True]
    assert hidden.grad is not None
    assert weight.grad is None


def test_the_largest_tensor_is_a_chunk() -> None:
    """Neither pass holds logits of all tokens."""
    hidden, weight, *others = inputs(torch.float32)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.numel())
            return out

    with Watch():
        distillation_sums(hidden, weight, *others, options(chunk_tokens=4)).loss.backward()
    assert largest == max(4 * VOCABULARY, VOCABULARY * WIDER)


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
}


def packed() -> tuple[Tensor, Tensor, Tensor, list[tuple[int, int, int]]]:
    """Two rows of documents: ids, positions, document ids, and (row, start, end) of each."""
    bounds = [(0, 0, 9), (0, 9, 20), (1, 0, 1), (1, 1, 14), (1, 14, 20)]
    ids = torch.randint(97, (2, 20), generator=torch.Generator().manual_seed(1))
    positions, documents = torch.empty(2, 20).long(), torch.empty(2, 20).int()
    for number, (row, start, end) in enumerate(bounds):
        positions[row, start:end] = torch.arange(end - start)
        documents[row, start:end] = number
    return ids, positions, documents, bounds


@pytest.mark.parametrize("kind", [*MODELS, "ours"])
@pytest.mark.parametrize("offload", [False, True])
def test_a_teacher_keeps_packed_documents_apart(
    kind: str, offload: bool, make_model: Callable[..., MLAForCausalLM]
) -> None:
    torch.manual_seed(0)
    model = make_model() if kind == "ours" else MODELS[kind]().eval()
    ids, positions, documents, bounds = packed()
    with torch.no_grad():  # by transformers' own attention, before the teacher replaces it
        alone = [
            model(input_ids=ids[row : row + 1, start:end], use_cache=False).logits[0]
            for row, start, end in bounds
        ]
    teacher = Teacher(model, "it", offload=offload, compile=False)
    teacher.to(torch.device("cpu"))
    with teacher.at_hand():
        logits = teacher.hidden(ids, positions, documents) @ teacher.weight.T
    assert not logits.requires_grad
    for wanted, (row, start, end) in zip(alone, bounds, strict=True):
        torch.testing.assert_close(logits[row, start:end], wanted, rtol=1e-4, atol=1e-5)
    together = teacher.hidden(ids, None, None) @ teacher.weight.T
    assert not torch.allclose(together[0, 9:], logits[0, 9:], atol=1e-2)


@pytest.mark.parametrize("kind", MODELS)
def test_a_teacher_in_bfloat16_is_near_the_one_in_float32(kind: str) -> None:
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    ids, positions, documents, _ = packed()
    wanted = Teacher(model, "it", offload=False, compile=False).hidden(ids, positions, documents)
    halved = Teacher(model.bfloat16(), "it", offload=False, compile=False)
    with torch.autocast("cpu", torch.bfloat16):
        got = halved.hidden(ids, positions, documents)
    assert got.dtype == torch.bfloat16
    assert (got.float() - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.slow
def test_a_compiled_teacher_takes_any_packing() -> None:
    torch.manual_seed(0)
    model = MODELS["llama"]().eval()
    ids, positions, documents, _ = packed()
    wanted = Teacher(model, "it", offload=False, compile=False).hidden(ids, positions, documents)
    compiled = Teacher(model, "it", offload=False, compile=True)
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    torch.testing.assert_close(compiled.hidden(ids, positions, documents), wanted)
    made = graphs["unique_graphs"]
    assert made
    other = documents.clone()
    other[0] = documents[1]
    compiled.hidden(ids, positions, other)
    assert graphs["unique_graphs"] == made


def test_a_window_that_hides_tokens_is_refused() -> None:
    torch.manual_seed(0)
    config = MistralConfig(**SIZES, sliding_window=4)
    with pytest.raises(ValueError, match="a window of 4 tokens, shorter than the 8"):
        Teacher(MistralForCausalLM(config), "it", offload=False, compile=False)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"temperature": 0}, "temperature=0: must be above 0"),
        ({"cross_entropy_weight": 1.5}, "must be in"),
        ({"chunk_tokens": 0}, "chunk_tokens=0: must be at least 1"),
    ],
)
def test_options_are_checked(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        options(**given)

"""A training step and a prefill of the configured model on fake tensors: memory by part.

The model, its loss and its optimizer are the real ones; their tensors have shapes and lifetimes but
no storage, so the 1B at a million tokens takes seconds on a laptop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ic.callbacks.memory_accounting import optimizer_state
from ic.config.run import RunConfig
from ic.datamodules.batch import Batch
from ic.datamodules.options import PreferenceDataOptions, TextDataOptions
from ic.model import MLAForCausalLM
from ic.model.cache import LatentCache
from ic.model.config import MLAConfig
from ic.model.loss import shift_labels
from ic.model.operators import choose_operators
from ic.model.targets import sum_targets
from ic.parallel.context_parallel import ContextParallel
from ic.planning.gpu_operators import GpuOperators
from ic.planning.live_memory import LiveMemory, one_share
from ic.training.objective import objective
from ic.training.optimizers import MuonWithAdamW, build_optimizer

# Precision by Lightning's name: the parameters' dtype, and autocast's or None.
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "32-true": (torch.float32, None),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "16-mixed": (torch.float32, torch.float16),
    "bf16-true": (torch.bfloat16, None),
    "16-true": (torch.float16, None),
}
# A synthetic sequence asks about its key-value pairs throughout: one answer token in ten.
_TOKENS_PER_ANSWER_TOKEN = 10
# Five digits, a full stop and one more, as an evaluation generates.
_NEW_TOKENS = 8


def _count_gradient(memory: LiveMemory) -> Callable[[Tensor], None]:
    def move(parameter: Tensor) -> None:
        assert parameter.grad is not None
        memory.move(parameter.grad, "gradients")

    return move


@dataclass(frozen=True)
class Peak:
    """The highest total of a simulation, and what it consists of."""

    total_bytes: int
    parts_bytes: dict[str, int]


class FakeRun:
    """The configured model on fake tensors.

    Args:
        config: the run.
        model_config: the model's configuration, vocabulary included.
        on_gpu: simulate the GPU's operators; else those of a CPU.
        liger: with `on_gpu`, Liger's kernels.

    Raises:
        ValueError: a precision that this cannot simulate, LoRA, FP8, distillation, or an indexer at
            work.
    """

    def __init__(
        self, config: RunConfig, model_config: MLAConfig, *, on_gpu: bool = True, liger: bool = True
    ) -> None:
        if config.model.adapter is not None:
            raise ValueError("plan does not know LoRA (model/adapter); plan without it")
        if config.model.fp8 is not None:
            raise ValueError(
                f"plan does not know what FP8 products take (model.fp8={config.model.fp8}); plan "
                "without them, with model.fp8=null"
            )
        if config.distillation is not None:
            raise ValueError(
                "plan does not know what a distillation's teacher takes; plan the student alone "
                "with distillation=null"
            )
        if model_config.indexer == "sparse" or config.objective.indexer != "none":
            raise ValueError(
                "plan does not know what an indexer takes; plan without it, with "
                "model.indexer.mode=dense objective.indexer=none"
            )
        if config.trainer.precision not in PRECISIONS:
            raise ValueError(
                f"trainer.precision={config.trainer.precision!r}: plan knows "
                f"{', '.join(PRECISIONS)}"
            )
        self.config = config
        self.on_gpu = on_gpu
        self._dtype, self._autocast_dtype = PRECISIONS[config.trainer.precision]
        self._mode, self._memory = FakeTensorMode(allow_non_fake_inputs=True), LiveMemory()
        operators = choose_operators(model_config)
        if on_gpu:
            operators = operators.with_torch_as(GpuOperators(self._memory, liger=liger))
        with torch.device("meta"):
            self.model: Any = MLAForCausalLM(model_config, operators)
        self._begin()

    def parameter_bytes(self) -> int:
        """Bytes of the parameters as the run keeps them."""
        return self.model.num_parameters() * self._dtype.itemsize

    def training_step(
        self,
        rows: int,
        tokens: int,
        *,
        checkpointing: bool | None = None,
        shards: int = 1,
        context_parallel_size: int = 1,
    ) -> Peak:
        """Peak of a step in mid-run on a batch (rows, tokens): optimizer state and the last step's
        gradients exist when it begins.

        Args:
            shards: ranks over which parameters, gradients and optimizer state are spread.
            context_parallel_size: ranks that share the tokens; the peak is of the first, which
                holds the last chunk and so expands the most keys.

        Raises:
            ValueError: tokens that the ranks cannot share evenly.
        """
        if checkpointing is None:
            checkpointing = self.config.model.gradient_checkpointing
        model = self.model.train()
        model.model.context_parallel = (
            FirstRank(context_parallel_size) if context_parallel_size > 1 else None
        )
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()
        with self._fake() as memory:
            self._make_gradients()
            memory.forget_peak(shards)
            batch = self._batch(memory, rows, tokens)
            with memory.part("activations"), self._autocast():
                loss = self._loss(model, batch, memory)
            self._optimizer.zero_grad()
            with memory.part("backward"):
                loss.backward()
            step = Peak(memory.peak_bytes, memory.peak)
        update = one_share(self._optimizer_peak.parts_bytes, shards)
        return max(step, Peak(sum(update.values()), update), key=lambda peak: peak.total_bytes)

    def prefill(self, rows: int, tokens: int, chunk_tokens: int, *, shards: int = 1) -> Peak:
        """Peak of an evaluation's prefill of (rows, tokens) into a cache, in chunks, within a
        training run: gradients and optimizer state (one of `shards` shares of them) stay.
        """
        model = self.model.eval()
        model.model.context_parallel = None
        with self._fake() as memory:
            self._make_gradients()
            ids = self._batch(memory, rows, tokens)["input_ids"]
            cache = LatentCache(model.config.num_hidden_layers, tokens + _NEW_TOKENS)
            with memory.part("activations"), self._autocast(), torch.no_grad():
                # Allocates the cache. No chunk may be so short that it is decoded: that kernel
                # refuses fake tensors, and a short last chunk takes less than those before it.
                least = model.config.absorbed_max_queries + 1
                model(ids[:, :least], past_key_values=cache, use_cache=True)
                layers: list[Any] = cache.layers  # transformers types them as its base class
                for layer in layers:
                    memory.move(layer.buffer, "cache")
                cache.keep(0)  # the tokens go, their place stays: `reset` would drop both
                memory.forget_peak(shards)
                chunks = [c for c in ids.split(chunk_tokens, dim=1) if c.shape[1] >= least]
                # Each sees more keys than the one before, and the last may be short: no other
                # peaks as high as the last two.
                before_tokens = chunk_tokens * (len(chunks) - 2)
                for layer in layers if before_tokens > 0 else []:
                    layer.extend(before_tokens)
                for chunk in chunks[-2:]:
                    model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return Peak(memory.peak_bytes, memory.peak)

    @contextmanager
    def _fake(self) -> Iterator[LiveMemory]:
        with self._mode, self._memory:
            yield self._memory

    def _begin(self) -> None:
        """Fake parameters in place of those on the meta device, and one optimizer step."""
        with self._fake() as memory:
            for module in self.model.modules():
                for name, p in module._parameters.items():
                    if p is not None:
                        module._parameters[name] = nn.Parameter(
                            torch.empty(p.shape, dtype=self._dtype)
                        )
                        memory.hold_weight(module._parameters[name])
            self.model.tie_weights()
            for p in self.model.parameters():
                p.register_post_accumulate_grad_hook(_count_gradient(memory))
            self._optimizer = build_optimizer(self.model, self.config.optimizer)
            for group in self._optimizer.param_groups:
                if self.on_gpu and "foreach" in group:
                    group["foreach"] = True  # PyTorch's choice on a GPU
            if self.on_gpu and isinstance(self._optimizer, MuonWithAdamW):
                self._optimizer.muon.dtype = torch.bfloat16  # ours on a GPU; fake ones are a CPU's
            self._make_gradients()
            with memory.part("optimizer_step"):
                self._optimizer.step()
            for state in optimizer_state([self._optimizer]):
                memory.move(state, "optimizer")
            # The first step makes the state before its temporaries: later ones peak as high.
            self._optimizer_peak = Peak(memory.peak_bytes, memory.peak)

    def _make_gradients(self) -> None:
        for p in self.model.parameters():
            p.grad = torch.empty_like(p)
            self._memory.move(p.grad, "gradients")

    def _autocast(self) -> Any:
        if self._autocast_dtype is None:
            return nullcontext()
        # Like Lightning's precision plugin: each use of a weight casts it anew.
        return torch.autocast("cpu", dtype=self._autocast_dtype, cache_enabled=False)

    def _batch(self, memory: LiveMemory, rows: int, tokens: int) -> Batch:
        with memory.part("batch"):
            batch: Batch = {
                "input_ids": torch.zeros(rows, tokens, dtype=torch.long),
                "labels": torch.zeros(rows, tokens, dtype=torch.long),
                "position_ids": torch.zeros(rows, tokens, dtype=torch.long),
            }
            if self.config.data.MARKS_ANSWERS:
                batch["answer_mask"] = torch.zeros(rows, tokens, dtype=torch.bool)
            if isinstance(self.config.data, TextDataOptions):
                batch["document_ids"] = torch.zeros(rows, tokens, dtype=torch.int32)
        return batch

    def _loss(self, model: Any, batch: Batch, memory: LiveMemory) -> Tensor:
        """What `LanguageModelingModule.training_step` does with a micro-batch."""
        if isinstance(self.config.data, PreferenceDataOptions):
            return self._preference_loss(model, batch, self.config.data.share_prompt)
        ids = batch["input_ids"]
        context = model.model.make_context(
            *ids.shape,
            ids.device,
            position_ids=batch["position_ids"],
            document_ids=batch.get("document_ids"),
        )
        outputs = model.model(input_ids=ids, context=context, use_cache=False)
        labels, marks = shift_labels(batch["labels"]), batch.get("answer_mask")
        weight = self.config.objective.all_tokens_weight
        with memory.part("loss"), _AnswerPositions():
            sums = sum_targets(
                outputs.last_hidden_state,
                model.head,
                labels,
                marks,
                parallel=model.model.context_parallel,
                all_tokens=marks is None or weight > 0,
            )
            return objective(sums.answers, sums.all_tokens, sums.num_targets, weight)

    def _preference_loss(self, model: Any, batch: Batch, share_prompt: bool) -> Tensor:
        """What `PreferenceModule` does with a micro-batch, the completions' share aside."""
        branches = None
        if share_prompt:
            rows, tokens = batch["input_ids"].shape
            completion = tokens // (2 * _TOKENS_PER_ANSWER_TOKEN)
            branches = [(tokens - 2 * completion, tokens - completion)] * rows
        with _AnswerPositions():
            targets = model.target_log_probs(
                batch["input_ids"], batch["labels"], batch["position_ids"], branches
            )
        return targets.log_probs.sum()


class FirstRank(ContextParallel):
    """Rank 0 of `size` that share each sequence; the others' parts have shapes and nothing else."""

    def __init__(self, size: int) -> None:
        self.group, self.rank, self.size = None, 0, size

    def all_gather(self, own: Tensor) -> Tensor:
        parts: Tensor = _GatheredShapes.apply(own, self.size)
        return parts


class _GatheredShapes(torch.autograd.Function):
    """What `ContextParallel.all_gather` allocates, forward and backward."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, size: int) -> Tensor:
        return own.new_empty(size, *own.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return grad.new_empty(grad.shape[1:]), None


class _AnswerPositions(TorchDispatchMode):
    """Gives `nonzero`, whose size depends on values that fake tensors lack, one row in ten."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is not torch.ops.aten.nonzero.default:
            return func(*args, **(kwargs or {}))
        (marked,) = args
        count = marked.numel() // _TOKENS_PER_ANSWER_TOKEN
        return marked.new_empty((count, marked.dim()), dtype=torch.long)

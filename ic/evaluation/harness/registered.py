"""`--model ic` of lm-evaluation-harness: any model source of ours, named in `--model_args`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from lm_eval.api.registry import register_model

from ic.errors import UsageError
from ic.evaluation.harness.language_model import DecoderLM
from ic.inference.greedy import GreedyDecoder
from ic.inference.loading import load_source
from ic.inference.model_facts import end_tokens, positions_of
from ic.inference.options import InferenceOptions

_DEVICES = (None, "cpu", "cuda", "cuda:0")
_OPTIONS = tuple(field.name for field in fields(InferenceOptions))


@register_model("ic")
class SourceLM(DecoderLM):
    """A model source, loaded as `python -m ic evaluate` loads it.

    Args:
        max_length: longest prompt with its answer, in tokens; by default the model's positions.
        batch_size: prompts that are read together; `auto` for as many as `tokens_per_batch` holds.
        device: `cpu` in place of `accelerator=cpu`; the harness's own default, `cuda:0`, leaves
            `accelerator` as it is.
        options: `checkpoint`, and whatever else `InferenceOptions` has.

    Raises:
        UsageError: an option that there is not, or a source that cannot be loaded.
    """

    def __init__(
        self,
        max_length: int | None = None,
        too_long: str = "refuse",
        tokens_per_batch: int = 65536,
        prefill_chunk_tokens: int = 131072,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        known = [*_OPTIONS, "max_length", "too_long", "tokens_per_batch", "prefill_chunk_tokens"]
        for name in options:
            if name not in _OPTIONS:
                raise UsageError.unknown("option in --model_args", name, known)
        if "checkpoint" not in options:
            raise UsageError("--model_args: name a model source, checkpoint=PATH")
        if device not in _DEVICES:
            raise UsageError(
                f"device={device}: give cpu or cuda; choose a GPU with CUDA_VISIBLE_DEVICES"
            )
        if device == "cpu":
            options.setdefault("accelerator", "cpu")
        try:
            loaded = load_source(InferenceOptions(**options))
        except ValueError as error:
            raise UsageError(str(error)) from error
        positions = positions_of(loaded.model.config)
        if max_length is not None and not 2 <= max_length <= positions:
            raise UsageError(
                f"max_length={max_length}: from 2 to the model's {positions} positions"
            )
        ends = end_tokens(loaded.model, loaded.tokenizer)
        rows = None if batch_size == "auto" else int(batch_size)
        if rows is not None and max_batch_size is not None:
            rows = min(rows, max_batch_size)
        super().__init__(
            GreedyDecoder(loaded.model, prefill_chunk_tokens, ends=ends),
            loaded.tokenizer,
            max_length or positions,
            tokens_per_batch=tokens_per_batch,
            rows_per_batch=rows,
            too_long=too_long,
        )
        self._device = loaded.model.device

"""The longest context that fits a plan's GPUs, and settings that make a run fit.

Everything that is advised has been planned: with the advised overrides the run fits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice

from ic.display.numbers import gib
from ic.evaluation.passkey.grid import PasskeyGridConfig
from ic.planning.plan import Layout, Planner, evaluation_shape
from ic.planning.simulate import Peak

# Contexts are multiples of this.
_STEP_TOKENS = 1024
# Shorter pieces of a prompt only cost time: the expanded keys of all others outweigh them.
_LEAST_CHUNK_TOKENS = 4096
_MOST_GPUS = 8
_CHECKPOINTING = "model.gradient_checkpointing=true"


def largest_context(planner: Planner) -> int:
    """Longest training sequence, the smallest micro-batch of it, that fits: a multiple of 1024
    within the model's positions; 0 if none fits.

    Both it and the next longer one have been simulated, wherever there is such a length.
    """
    positions = planner.model_config.max_position_embeddings
    limit = positions // _STEP_TOKENS * _STEP_TOKENS or positions
    fits, too_long = 0, limit + _STEP_TOKENS
    guess, reach = _guess(planner, limit), _STEP_TOKENS
    while too_long - fits > _STEP_TOKENS:
        if _room(planner, guess) >= 0:
            fits = guess
        else:
            too_long = guess
        if fits and too_long <= limit:
            guess = (fits + too_long) // 2 // _STEP_TOKENS * _STEP_TOKENS
        else:
            guess = min(fits + reach, limit) if fits else max(too_long - reach, _STEP_TOKENS)
            reach *= 2
    return fits


def _guess(planner: Planner, limit: int) -> int:
    """Where memory would end if it were affine in the length; it nearly is."""
    _, configured = planner.batch_shape()
    some = min(max(configured // _STEP_TOKENS, 4) * _STEP_TOKENS, limit)
    room = _room(planner, some)
    bytes_per_token = (_room(planner, some // 2) - room) / (some - some // 2)
    if bytes_per_token <= 0:  # the optimizer's step is the peak, whatever the length
        return limit if room >= 0 else _STEP_TOKENS
    tokens = int(some + room / bytes_per_token) // _STEP_TOKENS * _STEP_TOKENS
    return min(max(tokens, _STEP_TOKENS), limit)


def _room(planner: Planner, tokens: int) -> int:
    """Bytes that the smallest micro-batch of this length leaves; negative if it does not fit."""
    peak = planner.training(planner.least_rows, tokens)
    return planner.memory_bytes - planner.needed_bytes(peak)


def advice(
    planner: Planner, training: Peak, evaluation: Peak | None, longest_tokens: int
) -> list[str]:
    """Settings that make the run fit, the least costly first, or that it could do without.

    Args:
        training, evaluation: the run's peaks.
        longest_tokens: `largest_context` of the plan.
    """
    lines = []
    if evaluation is not None and not planner.fits(evaluation):
        lines += _for_evaluation(planner)
        if not lines and planner.fits(training):
            lines.append("callbacks.passkey=null: no evaluation of this grid fits")
    if not planner.fits(training):
        lines += _for_training(planner, longest_tokens, evaluation_advised=bool(lines))
    if not lines and planner.config.model.gradient_checkpointing:
        peak = planner.training(*planner.batch_shape(), checkpointing=False)
        if planner.fits(peak):
            needed = gib(planner.needed_bytes(peak))
            lines.append(f"model.gradient_checkpointing=false: fits too ({needed}) and is faster")
    return lines


def _for_training(planner: Planner, longest_tokens: int, *, evaluation_advised: bool) -> list[str]:
    rows, tokens = planner.batch_shape()
    fewer = f"data.tokens_per_batch={planner.least_tokens_per_batch(tokens)}"
    recompute = not planner.config.model.gradient_checkpointing
    alone: list[tuple[str, Peak]] = []
    if rows > planner.least_rows:
        alone.append((fewer, planner.training(planner.least_rows, tokens)))
    if recompute:
        alone.append((_CHECKPOINTING, planner.training(rows, tokens, checkpointing=True)))
    lines = _fitting(planner, alone)
    if not lines:
        both = " ".join(name for name, _ in alone)
        if len(alone) == 2:
            peak = planner.training(planner.least_rows, tokens, checkpointing=True)
            lines = _fitting(planner, [(both, peak)])
        if not lines:
            wide = (
                (
                    f"{both} plan.strategy={layout.strategy} plan.num_gpus={layout.num_gpus} "
                    f"plan.context_parallel_size={layout.context_parallel}".strip(),
                    planner.training(planner.least_rows, tokens, layout, True),
                )
                for layout in _wider(planner.layout)
                if evaluation_advised or _evaluation_fits(planner, layout)
            )
            lines = _fitting(planner, wide)
    if longest_tokens:
        batch = planner.least_tokens_per_batch(longest_tokens)
        lines.append(
            f"data.context_length={longest_tokens} data.tokens_per_batch={batch}: the longest that "
            "fits without another change"
        )
    elif not lines:
        least = planner.memory_bytes - _room(planner, _STEP_TOKENS)
        lines.append(
            f"no context fits: {gib(least)} are needed at {_STEP_TOKENS} tokens already; take a "
            "smaller model or more memory"
        )
    return lines


def _evaluation_fits(planner: Planner, layout: Layout) -> bool:
    peak = planner.evaluation(layout=layout)
    return peak is None or planner.fits(peak)


def _for_evaluation(planner: Planner) -> list[str]:
    lines = []
    for kind in (_one_prompt, _smaller_chunks, _shorter_lengths):
        for setting, grid in kind(planner.config.evaluation):
            peak = planner.evaluation(grid)
            assert peak is not None
            if planner.fits(peak):
                needed = gib(planner.needed_bytes(peak))
                lines.append(f"{setting}: the evaluation needs {needed}")
                break
    return lines


def _one_prompt(grid: PasskeyGridConfig) -> Iterator[tuple[str, PasskeyGridConfig]]:
    rows, _ = evaluation_shape(grid)
    if rows > 1:
        tokens = max(grid.lengths)
        yield f"evaluation.tokens_per_batch={tokens}", replace(grid, tokens_per_batch=tokens)


def _smaller_chunks(grid: PasskeyGridConfig) -> Iterator[tuple[str, PasskeyGridConfig]]:
    chunk = min(grid.prefill_chunk_tokens, max(grid.lengths)) // 2
    while chunk >= _LEAST_CHUNK_TOKENS:
        setting = f"evaluation.prefill_chunk_tokens={chunk}"
        yield setting, replace(grid, prefill_chunk_tokens=chunk)
        chunk //= 2


def _shorter_lengths(grid: PasskeyGridConfig) -> Iterator[tuple[str, PasskeyGridConfig]]:
    lengths = sorted(grid.lengths)[:-1]
    while lengths:
        yield f"evaluation.lengths={lengths}".replace(" ", ""), replace(grid, lengths=lengths)
        lengths = lengths[:-1]


def _fitting(planner: Planner, tried: Iterable[tuple[str, Peak]]) -> list[str]:
    """Lines for the first two that fit."""
    fitting = (
        f"{setting}: the training step needs {gib(planner.needed_bytes(peak))}"
        for setting, peak in tried
        if planner.fits(peak)
    )
    return list(islice(fitting, 2))


def _wider(layout: Layout) -> list[Layout]:
    """FSDP and context parallelism over the same GPUs, or over twice as many up to eight."""
    found = []
    for num_gpus in sorted({layout.num_gpus, 2, 4, _MOST_GPUS}):
        if num_gpus >= max(2, layout.num_gpus):
            found.append(Layout(num_gpus, "fsdp2", 1))
            found.append(Layout(num_gpus, "fsdp2", num_gpus))
    return found

"""Counts of the engine. Imports no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStats:
    """What the engine does now, and what it has done so far.

    Attributes:
        running, waiting: requests now.
        pages_total: pages of the cache.
        pages_used: those that requests hold now.
        pages_cached: those that nobody holds, kept for prompts that begin alike.
        prompt_tokens: of all requests that were let in.
        cached_tokens: those of them that were found in the cache.
        generated_tokens: drawn, the ends of answers included.
        preemptions: how often a request gave up its pages to one that came before it.
    """

    running: int
    waiting: int
    pages_total: int
    pages_used: int
    pages_cached: int
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int
    preemptions: int

"""Options of the engine. Imports no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

# The kernels address pages of a multiple of 16 tokens.
PAGE_MULTIPLE = 16


@dataclass
class EngineOptions:
    """Sizes of the engine.

    Attributes:
        cache_tokens: tokens that the paged cache holds, over all requests; null takes what fits
            into nine tenths of the GPU's memory beside the model, and on a CPU four times the
            model's positions, up to 65,536 tokens.
        page_tokens: tokens of a page, a multiple of 16. Prompts share whole pages.
        max_batch: most requests that run at once; more wait.
        prefill_chunk_tokens: longest piece of a prompt that one step processes. It bounds the
            memory of a long prompt, and how long the other requests wait for it.
        prefix_cache: keep the pages of finished requests for prompts that begin alike.
        cuda_graphs: record the launches of a decode step, and replay them; null does it on a GPU.

    Raises:
        ValueError: a value out of its range.
    """

    cache_tokens: int | None = None
    page_tokens: int = 64
    max_batch: int = 64
    prefill_chunk_tokens: int = 8192
    prefix_cache: bool = True
    cuda_graphs: bool | None = None

    def __post_init__(self) -> None:
        if self.page_tokens < PAGE_MULTIPLE or self.page_tokens % PAGE_MULTIPLE:
            raise ValueError(
                f"page_tokens={self.page_tokens}: must be a multiple of {PAGE_MULTIPLE}, at least "
                f"{PAGE_MULTIPLE}"
            )
        if self.cache_tokens is not None and self.cache_tokens < self.page_tokens:
            raise ValueError(
                f"cache_tokens={self.cache_tokens}: must hold a page of {self.page_tokens} tokens "
                "(page_tokens) at least; leave it out to take the memory that is free"
            )
        for name in ("max_batch", "prefill_chunk_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")

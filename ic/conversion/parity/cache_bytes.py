"""How much memory the weights and caches of two models take: tensors counted, layers made, filled
and measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ic.conversion.parity.pair import Pair
from ic.inference.caches import new_cache
from ic.model.cache import LatentLayer

Row = dict[str, Any]
# Of the prompt that shows which tensors a layer keeps of each token.
_PROMPT_TOKENS = 64


def weight_row(pair: Pair) -> Row:
    """Bytes of the storages of all parameters and buffers of both models, where they are loaded."""
    sizes = {
        name: sum(_storage_bytes([*side.model.parameters(), *side.model.buffers()]))
        for name, side in pair.sides.items()
    }
    return {
        "what": "weights",
        **{f"bytes_{name}": size for name, size in sizes.items()},
        "ratio": sizes["converted"] / sizes["original"],
    }


def cache_rows(pair: Pair, context_tokens: Sequence[int]) -> list[Row]:
    """A row for what a prompt takes that both models read, and one for each context.

    A prompt is read by the model itself. For a context a layer of a new cache is given keys and
    values of the shapes, types and device that the prompt left, as many as the context has tokens;
    layers that are alike are filled once, so that no more than a layer is held at a time. `bytes`
    are those of the storages of all tensors that a layer then holds, spare room included.
    """
    prompts = {name: read_prompt(side.model) for name, side in pair.sides.items()}
    rows: list[Row] = []
    measured = [(_PROMPT_TOKENS, {n: _prompt_bytes(layers) for n, layers in prompts.items()})]
    for tokens in sorted(context_tokens):
        sizes = {
            name: context_bytes(side.model, prompts[name], tokens)
            for name, side in pair.sides.items()
        }
        measured.append((tokens, sizes))
    for tokens, sizes in measured:
        rows.append(
            {
                "what": "cache",
                "by": "prompt" if not rows else "context",
                "context_tokens": tokens,
                **{f"bytes_{name}": size for name, size in sizes.items()},
                **{f"bytes_per_token_{name}": size / tokens for name, size in sizes.items()},
                "ratio": sizes["converted"] / sizes["original"],
                **{
                    f"dtype_{name}": str(_tensors(layers[0])[0].dtype).removeprefix("torch.")
                    for name, layers in prompts.items()
                },
            }
        )
    return rows


def context_bytes(model: Any, prompt_layers: Sequence[Any], tokens: int) -> int:
    """Bytes of a cache that holds a context: of each kind of layer one is made and filled.

    Args:
        prompt_layers: of a cache that a prompt was read into.
    """
    sizes: dict[tuple[Any, ...], int] = {}
    total = 0
    for place, layer in enumerate(prompt_layers):
        states = _states(layer)
        shapes = [(*s.shape[:-2], tokens, s.shape[-1]) for s in states]
        kind = (type(layer), getattr(layer, "sliding_window", None), *shapes)
        if kind not in sizes:
            filled: Any = new_cache(model, tokens).layers[place]
            keys, values = (s.new_zeros(shape) for s, shape in zip(states, shapes, strict=True))
            # The last token comes by itself, as in decoding: a layer with a window forgets then.
            for part in (slice(None, -1), slice(-1, None)):
                filled.update(keys[..., part, :], values[..., part, :])
            sizes[kind] = sum(_storage_bytes(_tensors(filled)))
        total += sizes[kind]
    return total


def _states(layer: Any) -> tuple[Tensor, Tensor]:
    """Keys and values as the model gives them to a layer, in their shapes, dtype and device."""
    if not isinstance(layer, LatentLayer):
        return layer.keys, layer.values
    latents_B1SC = layer.latents()[:, None].to(layer.dtype)
    return latents_B1SC[..., : layer.rank], latents_B1SC[..., layer.rank :]


@torch.no_grad()
def read_prompt(model: Any) -> Sequence[Any]:
    """Layers of a cache that the model has read a prompt into."""
    cache = new_cache(model, _PROMPT_TOKENS)
    ids = torch.zeros(1, _PROMPT_TOKENS, dtype=torch.long, device=model.device)
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    layers: Sequence[Any] = cache.layers
    return layers


def _prompt_bytes(layers: Sequence[Any]) -> int:
    return sum(sum(_storage_bytes(_tensors(layer))) for layer in layers)


def _tensors(layer: Any) -> list[Tensor]:
    """Everything that a layer of a cache holds, whatever it calls it."""
    return [value for value in vars(layer).values() if isinstance(value, Tensor)]


def _storage_bytes(tensors: Sequence[Tensor]) -> list[int]:
    """Of each storage once: several tensors may be views of one."""
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in tensors}
    return [storage.nbytes() for storage in storages.values()]

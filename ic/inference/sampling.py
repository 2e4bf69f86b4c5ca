"""A continuation drawn token by token, with a generator of its own.

Legend: T tokens of a prompt, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ic.model import MLAForCausalLM


@torch.no_grad()  # not inference mode: sharded parameters gathered in it could not be trained
def sample(
    model: MLAForCausalLM,
    ids_T: Tensor,
    new_tokens: int,
    *,
    temperature: float,
    top_p: float,
    generator: torch.Generator,
    end: int | None = None,
) -> list[int]:
    """Up to `new_tokens` tokens that follow a prompt, over a cache.

    Args:
        ids_T: the prompt (T,) int64 on the model's device; at least one token.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: tokens are drawn from the likeliest that hold this share of the probability
            (nucleus sampling, arXiv:1904.09751).
        generator: on the CPU; the draws touch no other.
        end: token that ends the continuation, and is left out of it.
    """
    cache = model.model.new_cache(len(ids_T) + new_tokens)
    logits = model(ids_T[None], past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    found: list[int] = []
    while True:
        token = _draw(logits[0, -1].float().cpu(), temperature, top_p, generator)
        if token == end:
            return found
        found.append(token)
        if len(found) == new_tokens:
            return found
        step = torch.full((1, 1), token, device=ids_T.device)
        logits = model(step, past_key_values=cache, use_cache=True).logits


def _draw(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    if not temperature:
        return int(logits_V.argmax())
    shares_V, tokens_V = (logits_V / temperature).softmax(0).sort(descending=True)
    # A token is left out if those before it hold the share already.
    shares_V[shares_V.cumsum(0) - shares_V >= top_p] = 0
    return int(tokens_V[torch.multinomial(shares_V, 1, generator=generator)])

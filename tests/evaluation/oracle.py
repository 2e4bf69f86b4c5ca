"""Models that answer by looking the text up: what a perfect one would do."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ic.datamodules.needles import answer_keys
from ic.model import LatentCache, MLAForCausalLM

_ASKED = re.compile(r"What is the pass key(?: for (\w+))?\? The pass key(?: for \w+)? is(.*)$")


class OneByOne(ABC):
    """A decoder that answers each prompt alone, by its `answers`."""

    @abstractmethod
    def answers(self, ids_BT: Tensor, new_tokens: int) -> Tensor:
        """As `Decoder.answers`."""

    def answers_of_any_length(
        self, prompts: Sequence[Tensor], new_tokens: int, ended: object = None
    ) -> list[Tensor]:
        return [self.answers(prompt[None], new_tokens)[0] for prompt in prompts]


class Reader(MLAForCausalLM, ABC):
    """Remembers the tokens themselves in its latent cache, and reads only them."""

    def forward(
        self, input_ids: Tensor, past_key_values: LatentCache, **kwargs: Any
    ) -> SimpleNamespace:
        cache, ids_BT1 = past_key_values, input_ids[..., None].float()
        past = cache.row_lengths or [0] * len(input_ids)
        if cache.is_ragged:
            context = self.model.make_context(*input_ids.shape, input_ids.device, cache)
        layers: list[Any] = cache.layers
        for layer in layers:
            if cache.is_ragged:
                layer.append_rows(ids_BT1, ids_BT1, context.append_slots_M)
            else:
                layer.update(ids_BT1[:, None], ids_BT1[:, None])
        keep = kwargs.get("logits_to_keep", 1)
        places = [input_ids.shape[1] - 1] if isinstance(keep, int) else keep.tolist()
        logits = torch.zeros(len(input_ids), len(places), 320)
        for row, tokens in enumerate(layers[0].latents()[..., 0].long().tolist()):
            for at, place in enumerate(places):
                read = bytes(tokens[: past[row] + place + 1]).decode()
                logits[row, at, ord(self.next_character(read))] = 1
        return SimpleNamespace(logits=logits)

    @abstractmethod
    def next_character(self, text: str) -> str:
        """What follows the text."""


class Oracle(Reader):
    """Answers with the pass key that is asked for."""

    def next_character(self, text: str) -> str:
        asked = _ASKED.search(text)
        assert asked is not None, text[-100:]
        name, given = asked.groups()
        context = text[: asked.start()]
        found = answer_keys(context) if name is None else re.findall(rf"{name} is (\d+)", context)
        return f" {(found or ['00000'])[0]}.      "[len(given)]


class Copier(Reader):
    """Writes the word before `=` once more, but for its third letter."""

    def next_character(self, text: str) -> str:
        word, _, given = text.rpartition(" ")[2].partition("=")
        return "?" if len(given) == 2 else word[len(given)]

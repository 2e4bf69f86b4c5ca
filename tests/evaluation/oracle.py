"""Models that answer by looking the text up: what a perfect one would do."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ic.datamodules.needles import answer_keys
from ic.model import LatentCache, MLAForCausalLM

_ASKED = re.compile(r"What is the pass key(?: for (\w+))?\? The pass key(?: for \w+)? is(.*)$")


class Reader(MLAForCausalLM):
    """Remembers the tokens themselves in its latent cache, and reads only them."""

    def forward(
        self, input_ids: Tensor, past_key_values: LatentCache, **kwargs: Any
    ) -> SimpleNamespace:
        ids_B1T1 = input_ids[:, None, :, None].float()
        tokens_B1S1, _ = past_key_values.update(ids_B1T1, ids_B1T1, 0)
        logits = torch.zeros(len(input_ids), 1, 320)
        for row, tokens in enumerate(tokens_B1S1[:, 0, :, 0].long().tolist()):
            logits[row, 0, ord(self.next_character(bytes(tokens).decode()))] = 1
        return SimpleNamespace(logits=logits)

    def next_character(self, text: str) -> str:
        raise NotImplementedError


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

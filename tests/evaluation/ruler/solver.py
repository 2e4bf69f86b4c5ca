"""A decoder that solves RULER's tasks by reading their prompts, and one that says nothing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ic.evaluation.ruler.questions import shipped_paragraphs
from tests.evaluation.oracle import OneByOne

_NEEDLE = re.compile(r"One of the special magic \w+ for (.+?) is: (\S+)\.")
_ASSIGNED = re.compile(r"VAR ([A-Z]+) = (?:VAR )?(\w+)")


class Solver(OneByOne):
    """Answers as a perfect model would."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.prompts: list[Tensor] = []

    def answers(
        self, ids_BT: Tensor, new_tokens: int, ended: Callable[[Tensor], bool] = lambda _: False
    ) -> Tensor:
        end = self.tokenizer.eos_token_id
        out = torch.full((len(ids_BT), new_tokens), end)
        for row, ids in enumerate(ids_BT):
            self.prompts.append(ids)
            answer = self.solve(str(self.tokenizer.decode(ids.tolist(), skip_special_tokens=True)))
            tokens = self.tokenizer(answer, add_special_tokens=False)["input_ids"][:new_tokens]
            out[row, : len(tokens)] = torch.tensor(tokens)
        return out

    def losses(self, ids_BT: Tensor) -> Tensor:
        raise AssertionError

    def targets(self, ids_BT: Tensor, start: int) -> tuple[Tensor, Tensor]:
        raise AssertionError

    def solve(self, prompt: str) -> str:
        if "special magic" in prompt:
            (asked,) = re.findall(r"\n?What .* special magic \w+ for (.*) mentioned .*\?", prompt)
            keys = re.split(r", and |, ", asked)
            return " " + ", ".join(v for k, v in _NEEDLE.findall(prompt) if k in keys)
        if "variable assignment" in prompt:
            own = prompt[prompt.rindex("Memorize and track") :]
            (value,) = set(re.findall(r"assigned the value (\d+)", own))
            known = [value]
            for variable, source in _ASSIGNED.findall(own):
                known += [variable] if source in known else []
            return " ".join(known[1:])
        if "numbered list" in prompt:
            own = prompt[prompt.rindex("Below is a numbered") :].split("\nQuestion:")[0]
            return self._most_common(re.split(r" ?\d+\. ", own)[1:], 10, numbered=True)
        if "coded text" in prompt:
            (own,) = re.findall(r"coded words\. (.*)\nQuestion", prompt)
            return self._most_common([w for w in own.split() if w != "..."], 3, numbered=False)
        (question,) = re.findall(r"\n\nQuestion: (.*?) ?(?:<\S*>)* ?Answer:", prompt)
        for pair in shipped_paragraphs():
            for part in ("a", "b", "both"):
                if pair[part]["question"] == question:
                    read = [pair[p]["text"] for p in ("a", "b") if part in (p, "both")]
                    assert all(text in prompt for text in read)
                    return f" {pair[part]['answer']}"
        raise AssertionError(question)

    @staticmethod
    def _most_common(words: list[str], count: int, *, numbered: bool) -> str:
        ranked = Counter(words).most_common(count + 1)
        assert len(ranked) == count or ranked[count - 1][1] > ranked[count][1]
        best = [word for word, _ in ranked[:count]]
        if numbered:
            return " " + " ".join(f"{i}. {word}" for i, word in enumerate(best, start=1))
        return " " + ", ".join(best)


class Silent(Solver):
    """Ends at once."""

    def solve(self, prompt: str) -> str:
        return ""

"""A RULER answer ends once it holds all that is looked for: the scores are those of whole ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import pytest

from ic.evaluation.ruler.grid import Config
from ic.evaluation.ruler.suite import RulerSuite
from ic.inference.greedy import GreedyDecoder
from ic.model import MLAForCausalLM
from ic.model.byte_tokenizer import ByteTokenizer
from tests.evaluation.oracle import Reader

TOKENIZER = ByteTokenizer()


class Scripted(Reader):
    """Says behind each prompt what the script has for it."""

    script: ClassVar[dict[str, str]] = {}

    def next_character(self, text: str) -> str:
        for prompt, answer in self.script.items():
            if text.startswith(prompt):
                return answer[len(text) - len(prompt)]
        return "?"  # amid a prompt


class Whole(RulerSuite):
    decides = False


@pytest.mark.parametrize("task", ["niah_multikey_1", "niah_multivalue"])
def test_scores_are_those_of_whole_answers(
    make_model: Callable[..., MLAForCausalLM], task: str
) -> None:
    options = Config(tasks=[task], lengths=[2304], samples=4)
    suite, whole = RulerSuite(options), Whole(options)
    (cell,) = suite.cells()
    samples = [suite.sample(TOKENIZER, cell, index) for index in range(4)]
    asked = [sample.expected["outputs"] for sample in samples]
    chatter = " and so on" * 40
    told = [
        ", ".join(asked[0]) + chatter,  # at once
        "I think that it is " + " or ".join(asked[1]) + chatter,  # later
        ", ".join(asked[2])[:-1] + "x" + chatter,  # never, or not all
        asked[3][0] + " " + "-" * 100 + ", ".join(asked[3]) + chatter,
    ]
    model = Scripted(make_model(vocab_size=320, max_position_embeddings=4096).config)
    prompts = [bytes(sample.ids.tolist()).decode() for sample in samples]
    passes: list[int] = []
    model.register_forward_hook(lambda *_: passes.append(1))

    def answers(suite: RulerSuite, some: list[int]) -> list[tuple[float | None, str]]:
        Scripted.script = {prompts[index]: told[index] for index in some}
        passes.clear()
        decoder = GreedyDecoder(model, 10_000)
        scores = suite.answer(decoder, TOKENIZER, [samples[index] for index in some])
        return [(score.correct, score.text) for score in scores]

    every = answers(whole, [0, 1, 2, 3])
    found = answers(suite, [0, 1, 2, 3])
    assert [score for score, _ in found] == [score for score, _ in every]
    assert [score == 1 for score, _ in found] == [True, True, False, task == "niah_multikey_1"]
    for place, ((score, text), (_, full)) in enumerate(zip(found, every, strict=True)):
        assert full.startswith(text)
        assert text.endswith(asked[place][-1 if place < 3 else 0]) if score == 1 else text == full
    assert len(passes) >= samples[0].new_tokens  # one of them is not decided
    # Alone each says the same, and those that are decided take no more than they need.
    for index in range(4):
        assert answers(suite, [index]) == [found[index]]
        if index == 0:
            assert len(passes) < len(", ".join(asked[0])) + 6 < samples[0].new_tokens

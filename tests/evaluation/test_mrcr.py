"""Ordering among similar pieces: conversations, their lengths, and MRCR's score."""

from __future__ import annotations

import re
from dataclasses import replace
from difflib import SequenceMatcher

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ic.evaluation.mrcr.grid import Config
from ic.evaluation.mrcr.pieces import KINDS, TOPICS, write_piece
from ic.evaluation.mrcr.suite import MRCRSuite, ordinal, similarity
from ic.evaluation.options import TaskCell
from ic.evaluation.suite import Sample
from ic.model.byte_tokenizer import ByteTokenizer
from tests.evaluation.oracle import OneByOne
from tests.evaluation.small_bpe import small_bpe

TOKENIZERS = {"bytes": ByteTokenizer(), "bpe": small_bpe()}
_QUESTION = re.compile(
    r"Prepend (\w{10}) to the (\d+)(?:st|nd|rd|th) \(1 indexed\) (.+?) about (\w+)\. "
    r"Do not include any other text in your response\."
)


@pytest.fixture
def options() -> Config:
    return Config(lengths=[2048, 4096], samples=4, needles=[2, 8], piece_lines=2)


def turns_of(text: str, prompt: str) -> list[tuple[str, str]]:
    """Requests and answers of a conversation as text."""
    if prompt == "plain":
        found = re.findall(r"User: (.*)\nAssistant: ((?s:.*?))\n\n(?=User: )", text)
    else:
        end = r"(?:<\|end\|>\n?|<\|eos\|>)"
        pattern = rf"<\|user\|>\n?(.*?){end}<\|assistant\|>\n?((?s:.*?)){end}"
        found = re.findall(pattern, text)
    return found


def looked_up(text: str, prompt: str) -> str:
    """What is asked for, by reading the conversation as a person would."""
    prefix, number, kind, topic = _QUESTION.findall(text)[-1]
    asked = f"Write a {kind} about {topic}"
    answers = [answer for request, answer in turns_of(text, prompt) if request == asked]
    return prefix + answers[int(number) - 1]


class Answering(OneByOne):
    """Continues each prompt with what `answer` says of its text, then ends or goes on."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, answer, behind: list[int]) -> None:
        self.tokenizer, self.answer, self.behind = tokenizer, answer, behind

    def answers(self, ids_BT: Tensor, new_tokens: int, ended=None) -> Tensor:
        rows = []
        for ids in ids_BT.tolist():
            text = self.answer(self.tokenizer.decode(ids))
            tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"] + self.behind
            assert len(tokens) - len(self.behind) + 8 <= new_tokens
            rows.append((tokens + self.behind[-1:] * new_tokens)[:new_tokens])
        return torch.tensor(rows)


@pytest.mark.parametrize("prompt", ["plain", "chat"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_oracle_scores_all_and_silence_nothing(options: Config, name: str, prompt: str) -> None:
    tokenizer = TOKENIZERS[name]
    suite = MRCRSuite(replace(options, prompt=prompt))
    suite.check(tokenizer, 4096)
    ending = tokenizer("\n\nUser: x", add_special_tokens=False)["input_ids"]
    behind = ending if prompt == "plain" else [tokenizer.eos_token_id]
    lead = " " if prompt == "plain" else ""
    oracle = Answering(tokenizer, lambda text: lead + looked_up(text, prompt), behind)
    silent = Answering(tokenizer, lambda text: "", behind)
    for cell in suite.cells():
        samples = [suite.sample(tokenizer, cell, index) for index in range(cell.samples)]
        for sample in samples:
            assert len(sample.ids) + sample.new_tokens == cell.length_tokens
        scores = suite.answer(oracle, tokenizer, samples)
        assert [score.correct for score in scores] == [1.0] * 4
        assert all(score.measured["closest"] == score.measured["asked"] for score in scores)
        scores = suite.answer(silent, tokenizer, samples)
        assert [score.correct for score in scores] == [0.0] * 4
        assert {score.measured["closest"] for score in scores} == {0}


def test_a_sample_by_hand(options: Config) -> None:
    suite = MRCRSuite(options)
    sample = suite.sample(ByteTokenizer(), TaskCell("8 needles", 4096, 4), 0)
    text = bytes(sample.ids.tolist()).decode()
    assert text.endswith("in your response.\nAssistant:")
    prefix, number, kind, topic = _QUESTION.findall(text)[-1]
    assert (prefix, int(number)) == (sample.expected["prefix"], sample.expected["asked"])
    turns = turns_of(text, "plain")
    similar = [answer for request, answer in turns if request == f"Write a {kind} about {topic}"]
    assert similar == sample.expected["pieces"]
    assert len(set(similar)) == 8
    # Other requests of the kind, and others about the topic, so that neither tells it alone.
    others = {request for request, _ in turns} - {f"Write a {kind} about {topic}"}
    assert any(f"Write a {kind} " in request for request in others)
    assert any(request.endswith(f" about {topic}") for request in others)
    assert len(others) < len(turns) - 8  # they come again too


def test_samples_depend_on_their_cell_and_index_alone(options: Config) -> None:
    tokenizer, cell = ByteTokenizer(), TaskCell("2 needles", 2048, 4)

    def ids(options: Config, index: int) -> list[int]:
        return MRCRSuite(options).sample(tokenizer, cell, index).ids.tolist()

    assert ids(options, 1) == ids(replace(options, samples=9), 1)
    assert ids(options, 1) != ids(options, 2)
    assert ids(options, 1) != ids(replace(options, seed=0), 1)
    asked = {MRCRSuite(options).sample(tokenizer, cell, i).expected["asked"] for i in range(9)}
    assert asked == {1, 2}


def test_score_is_that_of_the_data_set() -> None:
    """Behind the prefix, difflib's ratio; nothing without it."""
    right = "abcdefghijThe moon was calm."
    assert similarity(right, right, "abcdefghij") == 1
    assert similarity("The moon was calm.", right, "abcdefghij") == 0
    assert similarity(" " + right, right, "abcdefghij") == 0
    # 2 x 14 equal letters of 18 and 17: "The moon was " and "m" before the full stop do not both fit.
    given = "abcdefghijThe moon was warm"
    ratio = SequenceMatcher(None, "The moon was warm", "The moon was calm.").ratio()
    assert similarity(given, right, "abcdefghij") == ratio
    assert ratio == pytest.approx(2 * 15 / 35)


def test_what_stands_behind_an_answer(options: Config) -> None:
    """In a transcript the model goes on with the user's turn; in a chat more text counts against it."""
    pieces = ["The sea is blue.", "The sea is wide."]
    sample = Sample(np.zeros(1), {"prefix": "0123456789", "pieces": pieces, "asked": 2}, 9)
    plain, chat = MRCRSuite(options), MRCRSuite(replace(options, prompt="chat"))
    answer = "0123456789The sea is wide."
    assert plain.score(sample, f" {answer}\n\nUser: Write a").correct == 1
    assert chat.score(sample, answer).correct == 1
    assert chat.score(sample, f"{answer}\n\nUser: Write a").correct < 0.8
    assert chat.score(sample, f"Here it is: {answer}").measured["closest"] == 0
    other = chat.score(sample, "0123456789The sea is blue.")
    assert 0.5 < other.correct < 1
    assert other.measured == {"asked": 2, "closest": 1}


def test_ordinals() -> None:
    numbers = (1, 2, 3, 4, 8, 11, 12, 13, 21, 102, 111)
    said = "1st 2nd 3rd 4th 8th 11th 12th 13th 21st 102nd 111th"
    assert [ordinal(number) for number in numbers] == said.split()


def test_pieces_differ() -> None:
    """A piece of the same kind and topic is no help: guessing another of them scores little."""
    rng = np.random.default_rng(0)
    assert (len(KINDS), len(set(TOPICS))) == (8, len(TOPICS))
    for kind in KINDS:
        pieces = [write_piece(kind, "tapirs", 6, rng) for _ in range(40)]
        assert len(set(pieces)) == 40
        assert all(piece.count("\n") == 5 and "tapirs" in piece for piece in pieces)
        assert not any(re.search(r"\ba [aeiou]|[{}]", piece, re.IGNORECASE) for piece in pieces)
        pairs = zip(pieces[:20], pieces[20:], strict=True)
        assert np.mean([similarity(one, two, "") for one, two in pairs]) < 0.25


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"lengths": [1024]}, r"lengths=\[1024\]: 1024 tokens do not hold 8 needles of 2 lines"),
        ({"lengths": [2048, 8192]}, r"lengths=\[2048, 8192\]: the model has 4,096 positions"),
        ({"needles": [10**9]}, r"2048 tokens do not hold 1000000000 needles"),
        ({"piece_lines": 10**9}, r"do not hold 2 needles of 1000000000 lines"),
        ({"needles": [1]}, r"suite\.mrcr\.needles=\[1\]: at least one number, each at least 2"),
        ({"needles": [2, 2]}, r"suite\.mrcr\.needles"),
        ({"piece_lines": 1}, r"suite\.mrcr\.piece_lines=1: must be at least 2"),
    ],
)
def test_what_cannot_be_asked(options: Config, given: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MRCRSuite(replace(options, **given)).check(ByteTokenizer(), 4096)


def test_a_chat_needs_a_template(options: Config) -> None:
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="prompt=chat: the tokenizer has no chat template"):
        MRCRSuite(replace(options, prompt="chat")).check(tokenizer, 4096)

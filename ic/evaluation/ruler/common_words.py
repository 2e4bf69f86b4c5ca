"""Common words: RULER's common_words_extraction.py, a numbered list in which ten words prevail."""

from __future__ import annotations

from collections.abc import Callable

from ic.evaluation.ruler.task import FULL_SIZE_TOKENS, Draw, Prompt, Task
from ic.evaluation.ruler.words import single_words, word_pairs

TEMPLATE = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\nQuestion: What are the 10 most common "
    "words in the above list?"
)
ANSWER_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
COMMON = 10


class CommonWords(Task):
    """The ten words of a list that come more often than the others, after one example.

    A unit is a different word. Past the words of wonderwords (8,166) RULER draws all from another
    file, `english_words.json`, which is not shipped: here pairs `adjective-noun` join the rare
    words.
    """

    tokens_to_generate = 120

    def __init__(self, count_tokens: Callable[[str], int]) -> None:
        # RULER's list is smaller below 4,096 tokens; where tokens are as small as bytes the full
        # one needs more than that. Words differ in length, hence the tenth.
        full = _prompt(Draw(0, 0, FULL_SIZE_TOKENS), COMMON + 1, is_full=True)
        needed = 1.1 * count_tokens(full.text + full.answer_prefix) + self.tokens_to_generate
        self.full_size_tokens = max(FULL_SIZE_TOKENS, needed)

    def least_units(self, index: int) -> int:
        return COMMON + 1

    def prompt(self, draw: Draw, units: int) -> Prompt:
        return _prompt(draw, units, is_full=draw.length_tokens >= self.full_size_tokens)


def _prompt(draw: Draw, units: int, is_full: bool) -> Prompt:
    words = list(single_words())
    draw.shuffle(words)
    if is_full:
        example, known = _list(draw, words, 40, 10, 3)
        context, common = _list(draw, words, units, 30, 3)
    else:
        example, known = _list(draw, words, 20, 3, 1)
        context, common = _list(draw, words, units, 6, 1)
    example = f"{TEMPLATE.format(context=example)}{ANSWER_PREFIX} {_numbered(known)}"
    text = f"{example}\n{TEMPLATE.format(context=context)}"
    return Prompt(text, ANSWER_PREFIX, common, f" {_numbered(common)}")


def _list(
    draw: Draw, words: list[str], units: int, common_repeats: int, rare_repeats: int
) -> tuple[str, list[str]]:
    """The numbered list, and its common words.

    The whole list of words is drawn and then cut, so that more units are more text; RULER draws as
    many as it needs.
    """
    chosen = draw.words.sample(words, len(words))[:units]
    pairs = word_pairs()
    if units > len(words):
        more = draw.words.sample(range(len(pairs)), units - len(words))
        chosen += [pairs[index] for index in more]
    common = chosen[:COMMON]
    listed = common * common_repeats + chosen[COMMON:] * rare_repeats
    draw.shuffle(listed)
    return _numbered(listed), common


def _numbered(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))

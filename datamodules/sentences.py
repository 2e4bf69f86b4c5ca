"""Where sentences of prose end, so that something can be put between two of them."""

from __future__ import annotations

import re
from collections.abc import Iterator

# What closes a quotation or opens one, curly ones too.
_CLOSING, _OPENING = "\"')\\]\u201d\u2019\u00bb", "\"'(\\[\u201c\u2018\u00ab\u2013\u2014-"
# A full stop, and after it white space and no small letter; or a blank line.
_END = re.compile(rf"[.!?\u2026][{_CLOSING}]*(?=\s+[{_OPENING}]*[^\sa-z])\s+|\n\s*\n\s*")
# A full stop after an abbreviation or an initial ends no sentence.
_NO_END = re.compile(
    r"(?<![^\W_])(?:[A-HJ-Z]|(?i:mr|mrs|ms|messrs|dr|st|prof|rev|hon|gen|col|capt|lt|sgt|sr|jr|esq|"
    r"vol|ch|fig|pp|vs|etc|viz|cf|co|inc|ltd|mt|jan|feb|mar|apr|jun|jul|aug|sept|oct|nov|"
    r"dec))$"
)


def sentence_ends(text: str) -> Iterator[tuple[int, int]]:
    """Where each sentence ends and the next one begins: in between there is white space.

    A full stop after an initial (`J. Smith`) or a common English abbreviation ends none.
    """
    start = 0
    for end in _END.finditer(text):
        if text[end.start()] == "." and _NO_END.search(
            text, max(start, end.start() - 12), end.start()
        ):
            continue
        start = end.end()
        yield end.start() + len(end.group().rstrip()), start


def split_sentences(text: str) -> list[str]:
    """Sentences of a text in their order, without the white space between them."""
    sentences, start = [], 0
    for end, following in sentence_ends(text):
        sentence = text[start:end].strip()
        if sentence:
            sentences.append(sentence)
        start = following
    rest = text[start:].strip()
    return [*sentences, rest] if rest else sentences

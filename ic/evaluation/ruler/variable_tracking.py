"""Variable tracking: RULER's variable_tracking.py with noise, one chain and four hops."""

from __future__ import annotations

import string
from collections.abc import Callable
from itertools import pairwise

from ic.evaluation.ruler.niah import NOISE
from ic.evaluation.ruler.task import Draw, Prompt, Task

TEMPLATE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\nQuestion: Find all variables that are assigned the value {query} in the text above."
)
ANSWER_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {num_v} "
    "variables are assigned the value {query}, they are: "
)
HOPS = 4
EXAMPLE_TOKENS = 500


class VariableTracking(Task):
    """Which variables have a value, after one example with variables of three letters.

    Args:
        count_tokens: of a text, for the example, which has as much noise as 500 tokens hold.
    """

    tokens_to_generate = 30

    def __init__(self, count_tokens: Callable[[str], int]) -> None:
        self.example_units = HOPS + 1
        while count_tokens(_example(self.example_units + 1)) <= EXAMPLE_TOKENS:
            self.example_units += 1

    def least_units(self, index: int) -> int:
        return HOPS + 1  # assignments go before different lines

    def prompt(self, draw: Draw, units: int) -> Prompt:
        text, answer_prefix, variables = _fill(draw, units, letters=5)
        example, prefix, known = _fill(draw, self.example_units, letters=3)
        text = f"{example}{prefix} {' '.join(known)}\n\n{text}"
        return Prompt(text, answer_prefix, variables, " ".join(variables))


def _example(units: int) -> str:
    text, answer_prefix, _ = _fill(Draw(0, 0, 0), units, letters=3)
    return text + answer_prefix


def _fill(draw: Draw, units: int, letters: int) -> tuple[str, str, list[str]]:
    """Question, answer prefix and variables of one chain in so many lines of noise."""
    variables: list[str] = []
    while len(set(variables)) <= HOPS:
        variables = [
            "".join(draw.words.choices(string.ascii_uppercase, k=letters)) for _ in range(HOPS + 1)
        ]
    value = str(draw.numbers.randint(10000, 99999))
    chain = [f"VAR {variables[0]} = {value}"]
    for before, after in pairwise(variables):
        chain.append(f"VAR {after} = VAR {before} ")
    lines = [NOISE] * units
    for step, place in enumerate(sorted(draw.words.sample(range(units), len(chain)))):
        lines.insert(place + step, chain[step])
    context = "\n".join(lines).replace(". \n", ".\n")
    filled = {"context": context, "query": value, "num_v": HOPS + 1}
    return TEMPLATE.format(**filled), ANSWER_PREFIX.format(**filled), variables

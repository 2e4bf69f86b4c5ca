"""The thirteen tasks by their names, as RULER's synthetic.yaml configures them."""

from __future__ import annotations

from collections.abc import Callable

from ic.evaluation.ruler.common_words import CommonWords
from ic.evaluation.ruler.frequent_words import FrequentWords
from ic.evaluation.ruler.niah import Needles
from ic.evaluation.ruler.question_answering import QuestionAnswering
from ic.evaluation.ruler.task import Task
from ic.evaluation.ruler.texts import Texts
from ic.evaluation.ruler.variable_tracking import VariableTracking


def make_task(name: str, texts: Texts, count_tokens: Callable[[str], int]) -> Task:
    """A task of `grid.TASKS`; those that give an example measure it with `count_tokens`."""
    match name:
        case "niah_single_1":
            return Needles("noise")
        case "niah_single_2":
            return Needles("essay", essay=texts.essay)
        case "niah_single_3":
            return Needles("essay", values="uuids", essay=texts.essay)
        case "niah_multikey_1":
            return Needles("essay", num_keys=4, essay=texts.essay)
        case "niah_multikey_2":
            return Needles("needle")
        case "niah_multikey_3":
            return Needles("needle", keys="uuids", values="uuids")
        case "niah_multivalue":
            return Needles("essay", num_values=4, essay=texts.essay)
        case "niah_multiquery":
            return Needles("essay", num_keys=4, num_queries=4, essay=texts.essay)
        case "vt":
            return VariableTracking(count_tokens)
        case "cwe":
            return CommonWords(count_tokens)
        case "fwe":
            return FrequentWords()
        case "qa_1":
            return QuestionAnswering(texts.squad)
    assert name == "qa_2"
    return QuestionAnswering(texts.hotpotqa)

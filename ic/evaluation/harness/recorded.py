"""A model of the harness that gives the answers of another, so that the harness scores them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM


class RecordedLM(LM):
    """Gives recorded responses.

    Args:
        responses: to the requests of each task and document, in the order of the requests.
    """

    def __init__(self, responses: Mapping[tuple[str, int], Sequence[Any]]) -> None:
        super().__init__()
        self._responses = responses

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        return [tuple(response) for response in self._of(requests)]  # JSON knows no tuples

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        return self._of(requests)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        return self._of(requests)

    def _of(self, requests: Sequence[Instance]) -> list[Any]:
        return [self._responses[r.task_name, r.doc_id][r.idx] for r in requests]

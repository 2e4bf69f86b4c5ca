"""Answers to a judge, its scores back: several at a time, each written down as it comes."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from ic.evaluation.judge.client import JudgeClient, RefusedError
from ic.evaluation.judge.prometheus import Messages
from ic.files.json_lines import append_row, read_rows


@dataclass(frozen=True)
class Question:
    """What a judge is asked once.

    Attributes:
        messages: the conversation.
        parse: finds the result in the judge's answer.
    """

    messages: Messages
    parse: Callable[[str], str | int | None]


@dataclass(frozen=True)
class Judgement:
    """What a judge answered.

    Attributes:
        key: identifies the question, the judge and how it was asked.
        result: the score or verdict; None where the answer stays unjudged.
        times_asked: until there was a result.
        text: the judge's last answer, or why it refuses one.
    """

    key: str
    result: str | int | None
    times_asked: int
    text: str


class Judge:
    """Asks a client, and keeps a file of what it answered: a line for each judgement.

    A judgement in the file is not asked for again, whether there was a score in it or not.

    Args:
        file: where judgements of this process go; those of other files of its name's beginning in
            the same folder count, too.
    """

    def __init__(self, client: JudgeClient, file: Path) -> None:
        self.client = client
        self.file = file
        self._lock = threading.Lock()
        stem = file.name.partition(".")[0]
        self._known = {
            row["key"]: Judgement(**row)
            for each in sorted(file.parent.glob(f"{stem}*.jsonl"))
            for row in read_rows(each)
        }
        self._has_answered = bool(self._known)

    def ask(self, questions: Sequence[Question]) -> list[Judgement]:
        """Judgements in the order of the questions.

        Raises:
            RunFailedError: the server is gone, or refuses the first request of all. What it has
                answered is kept.
        """
        pool = ThreadPoolExecutor(self.client.config.concurrency)
        try:
            # Equal questions are one.
            keys = [self._key(question) for question in questions]
            missing = {k: q for k, q in zip(keys, questions, strict=True) if k not in self._known}
            pending = [pool.submit(self._ask, key, question) for key, question in missing.items()]
            for future in as_completed(pending):
                future.result()
        except BaseException:
            self.client.close()  # what is under way need not be waited for
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        pool.shutdown()
        return [self._known[key] for key in keys]

    def _ask(self, key: str, question: Question) -> None:
        config = self.client.config
        times, text, result = 0, "", None
        try:
            while result is None and times < config.times_asked:
                again = times > 0 and config.retry_temperature is not None
                temperature = config.retry_temperature if again else config.temperature
                reply = self.client.complete(question.messages, temperature)
                times, text = times + 1, reply.text
                # Of an answer that was cut off, the end is not the judge's.
                result = question.parse(text) if reply.whole else None
        except RefusedError as error:
            # One request that is too long is its own fault; if nothing has been answered yet, it is
            # the fault of all.
            if not self._has_answered:
                raise
            times, text = times + 1, str(error)
        judgement = Judgement(key, result, times, text)
        with self._lock:
            self._has_answered = True
            append_row(self.file, asdict(judgement))
            self._known[key] = judgement

    def _key(self, question: Question) -> str:
        config = self.client.config
        asked = [
            question.messages,
            config.model,
            config.temperature,
            config.retry_temperature,
            config.max_tokens,
            config.times_asked,
            config.request,
        ]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:24]

"""Many prompts -> a file of their answers, in their order; an interrupted run goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from ic.files.json_lines import append_row, read_rows
from ic.inference.engine.request import Finish, Output, Request
from ic.inference.generate.answers import Answers
from ic.inference.generate.options import GenerateOptions
from ic.inference.generate.prompts import Prompt

Row = dict[str, Any]


class AnswerFile:
    """The file, and what it lacks.

    Args:
        model: what answers, so that another model's answers are not gone on with.

    Raises:
        ValueError: it holds answers to other prompts, of other options or of another model.
    """

    def __init__(self, options: GenerateOptions, prompts: Sequence[Prompt], model: str) -> None:
        assert options.prompt_file is not None
        given = options.output
        self.path = Path(given or options.prompt_file.removesuffix(".jsonl") + ".answers.jsonl")
        self.requests = [
            Request(str(number), prompt.ids, options.sampling(number))
            for number, prompt in enumerate(prompts)
        ]
        self._prompts = prompts
        self._model = model
        rows = read_rows(self.path)
        for number, row in enumerate(rows):
            if number >= len(prompts) or row.get("key") != self._key(number):
                raise ValueError(
                    f"{self.path}, line {number + 1}: answers another prompt, or was drawn with "
                    "other options or another model; give another output=, or delete the file"
                )
        self.num_kept = len(rows)

    def _key(self, number: int) -> str:
        request = self.requests[number]
        asked = [self._model, request.prompt_ids, asdict(request.sampling)]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]

    def fill(self, answers: Answers, at_once: int, console: Console) -> int:
        """Answer what has no answer yet -> how many could not be answered.

        Args:
            at_once: requests that the model is given at a time.
        """
        missing = iter(self.requests[self.num_kept :])
        collected: dict[int, Row] = {}
        next_row, failed = self.num_kept, 0
        with Progress(console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task("answers", total=len(self.requests), completed=next_row)
            in_work = 0
            while True:
                while in_work < at_once and (request := next(missing, None)) is not None:
                    answers.add(request)
                    collected[int(request.id)] = {"ids": [], "text": "", "logprobs": []}
                    in_work += 1
                if not in_work:
                    return failed
                for output in answers.step():
                    number = int(output.request_id)
                    self._collect(collected[number], output)
                    if output.finish is not None:
                        in_work -= 1
                        failed += output.finish == Finish.ERROR
                        progress.advance(task)
                while next_row in collected and "finish" in collected[next_row]:
                    append_row(self.path, self._row(next_row, collected.pop(next_row)))
                    next_row += 1

    def _collect(self, row: Row, output: Output) -> None:
        row["ids"] += output.token_ids
        row["text"] += output.text
        row["logprobs"] += [asdict(each) for each in output.logprobs or ()]
        if output.finish is not None:
            row["finish"] = output.finish.value
            row["error"] = output.error

    def _row(self, number: int, collected: Row) -> Row:
        prompt, sampling = self._prompts[number], self.requests[number].sampling
        row: Row = {
            **prompt.beside,
            "text": collected["text"],
            "finish": collected["finish"],
            "prompt_tokens": len(prompt.ids),
            "tokens": len(collected["ids"]),
        }
        if sampling.logprobs is not None:
            row["logprobs"] = collected["logprobs"]
        if collected["error"] is not None:
            row["error"] = collected["error"]
        return {**row, "key": self._key(number)}

"""Questions and the documents that answer them: SQuAD's, HotpotQA's, or those that are shipped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHIPPED = "shipped"
_ASSET = Path(__file__).parent / "assets" / "questions.json"
_KEYS = {
    "squad": "SQuAD v2's dev-v2.0.json",
    "hotpotqa": "HotpotQA's hotpot_dev_distractor_v1.json",
}


@dataclass(frozen=True)
class Question:
    """Numbers of documents: `documents` answer it, `related` are put in before others."""

    query: str
    outputs: list[str]
    documents: list[int]
    related: list[int]


@dataclass(frozen=True)
class Questions:
    """Questions in their order, and documents sorted, each once.

    Attributes:
        name: of the file, or `shipped`.
        digest: of what was read.
    """

    questions: list[Question]
    documents: list[str]
    name: str
    digest: str


def shipped_paragraphs() -> list[dict[str, Any]]:
    """Pairs of paragraphs `a` and `b` of an invented country, our own text; see `questions.json`.

    Each has `title`, `text`, `question` and `answer`; `both` asks what takes both.
    """
    pairs: list[dict[str, Any]] = json.loads(_shipped_text())["pairs"]
    return pairs


def squad(path: str | None) -> Questions:
    """Questions that have an answer in one paragraph; `related` are those of the same article.

    Raises:
        ValueError: the file is missing, or is not SQuAD's.
    """
    if path is not None:
        return _read(path, "squad", _of_squad)
    articles = [
        {
            "paragraphs": [
                {
                    "context": paragraph["text"],
                    "qas": [
                        {
                            "question": paragraph["question"],
                            "answers": [{"text": paragraph["answer"]}],
                        }
                    ],
                }
                for paragraph in (pair["a"], pair["b"])
            ]
        }
        for pair in shipped_paragraphs()
    ]
    return _of_squad({"data": articles}, SHIPPED, _digest(_shipped_text()))


def hotpotqa(path: str | None) -> Questions:
    """Questions that take two of their documents.

    Raises:
        ValueError: the file is missing, or is not HotpotQA's.
    """
    if path is not None:
        return _read(path, "hotpotqa", _of_hotpotqa)
    rows = [
        {
            "question": pair["both"]["question"],
            "answer": pair["both"]["answer"],
            "context": [[part["title"], [part["text"]]] for part in (pair["a"], pair["b"])],
        }
        for pair in shipped_paragraphs()
    ]
    return _of_hotpotqa(rows, SHIPPED, _digest(_shipped_text()))


def _of_squad(data: Any, name: str, digest: str) -> Questions:
    documents = sorted({p["context"] for article in data["data"] for p in article["paragraphs"]})
    number = {document: index for index, document in enumerate(documents)}
    questions = []
    for article in data["data"]:
        of_article = [number[p["context"]] for p in article["paragraphs"]]
        for paragraph in article["paragraphs"]:
            own = number[paragraph["context"]]
            related = [index for index in of_article if index != own]
            for qa in paragraph["qas"]:
                if not qa.get("is_impossible", False):
                    outputs = [str(answer["text"]) for answer in qa["answers"]]
                    questions.append(Question(qa["question"], outputs, [own], related))
    return Questions(questions, documents, name, digest)


def _of_hotpotqa(data: Any, name: str, digest: str) -> Questions:
    contexts = [[f"{title}\n{''.join(parts)}" for title, parts in row["context"]] for row in data]
    documents = sorted({document for context in contexts for document in context})
    number = {document: index for index, document in enumerate(documents)}
    questions = [
        Question(row["question"], [str(row["answer"])], [number[text] for text in context], [])
        for row, context in zip(data, contexts, strict=True)
    ]
    return Questions(questions, documents, name, digest)


def _read(path: str, key: str, parse: Callable[[Any, str, str], Questions]) -> Questions:
    wanted = f"give {_KEYS[key]}, or leave suite.ruler.{key} out for the questions that are shipped"
    where = f"suite.ruler.{key}={path}"
    try:
        text = Path(path).read_text(encoding="utf-8")
        found = parse(json.loads(text), Path(path).name, _digest(text))
    except OSError as error:
        raise ValueError(f"{where}: cannot be read ({error.strerror}); {wanted}") from error
    except ValueError as error:  # not UTF-8, not JSON, or rows of another form
        raise ValueError(f"{where}: is not JSON of that form ({error}); {wanted}") from error
    except (KeyError, TypeError, AttributeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{where}: is JSON of another form ({what}); {wanted}") from error
    if not found.questions or not all(q.outputs and all(q.outputs) for q in found.questions):
        raise ValueError(f"{where}: holds no question with an answer; {wanted}")
    return found


def _shipped_text() -> str:
    return _ASSET.read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]

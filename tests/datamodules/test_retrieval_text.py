"""Retrieval over the user's documents: rows of text alone, facts between sentences, conversations;
the documents are tokenized once.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from ic.datamodules.chat_templates import set_chat_template
from ic.datamodules.retrieval import RetrievalBatches, RetrievalDataModule
from ic.datamodules.retrieval_options import RetrievalDataOptions
from ic.datamodules.token_store import TokenStore
from ic.model.byte_tokenizer import ByteTokenizer
from tests.datamodules.test_retrieval_data import answers, bpe


def sentence(book: int, number: int) -> str:
    return f"In book {book} the whale number {number} swam past, as Mr. Bell saw."


def book(number: int, sentences: int) -> str:
    """Numbered sentences, three to a paragraph."""
    ends = ("\n\n", " ", " ")
    return "".join(sentence(number, i) + ends[i % 3] for i in range(1, sentences + 1)).strip()


@pytest.fixture
def files(tmp_path: Path) -> dict[str, list[str]]:
    """Three books of about 26 kB, and nine of 1 kB for validation."""
    for name, books in (
        ("train", [(1, 400), (2, 400), (3, 400)]),
        ("val", [(n, 15) for n in range(4, 13)]),
    ):
        lines = [json.dumps({"text": book(*each)}) for each in books]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return {f"{name}_files": [f"{tmp_path}/{name}.jsonl"] for name in ("train", "val")}


@pytest.fixture
def make(tmp_path: Path, files: dict[str, list[str]]) -> Callable[..., RetrievalBatches]:
    def make(
        tokenizer: PreTrainedTokenizerBase | None = None, **changes: object
    ) -> RetrievalBatches:
        given: dict[str, object] = {
            "context_length": 2048,
            "tokens_per_batch": 8192,
            "haystack_weights": {"text": 1.0},
            "task_weights": {"fact": 1.0},
            "skip_probability": 0.0,
            "fact_share": 0.2,
            "token_cache": str(tmp_path / "tokens"),
            **files,
            **changes,
        }
        return RetrievalBatches(RetrievalDataOptions(**given), tokenizer or ByteTokenizer())

    return make


def chatml() -> PreTrainedTokenizerBase:
    tokenizer = deepcopy(bpe())
    set_chat_template(tokenizer, "chatml")
    return tokenizer


def whales(text: str) -> list[tuple[int, int]]:
    """Books and numbers of the whole sentences in a text, in their order."""
    found = re.findall(r"In book (\d+) the whale number (\d+) swam past, as Mr\. Bell saw\.", text)
    return [(int(book), int(number)) for book, number in found]


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), bpe()], ids=["bytes", "bpe"])
def test_a_row_of_text_is_one_document_from_a_sentence_on(
    make: Callable[..., RetrievalBatches], tokenizer: PreTrainedTokenizerBase
) -> None:
    batch = make(tokenizer, facts_fraction=0.0)(split="train", step=3, rank=1, context_length=2048)
    assert "document_ids" not in batch  # each row lies in one book
    assert not batch["answer_mask"].any()
    assert batch["labels"].equal(batch["input_ids"])
    begins = set()
    for ids in batch["input_ids"]:
        text = tokenizer.decode(ids)
        (number,) = {book for book, _ in whales(text)}
        at = book(number, 400).index(text)
        begins.add(at)
        assert at == 0 or re.search(r"saw\.$", book(number, 400)[:at])
    assert len(begins) == 4


def test_short_documents_are_packed_and_do_not_see_each_other(
    make: Callable[..., RetrievalBatches],
) -> None:
    batch = make(facts_fraction=0.0)(split="validation", step=0, rank=0, context_length=2048)
    assert batch["document_ids"].dtype == torch.int32
    for ids, documents in zip(batch["input_ids"], batch["document_ids"], strict=True):
        assert set(documents.diff().tolist()) == {0, 1}
        texts = [
            bytes(ids[documents == n].tolist()).decode() for n in range(int(documents[-1]) + 1)
        ]
        assert len(texts) > 1
        for text in texts[:-1]:
            assert text == book(whales(text)[0][0], 15) + "\n\n"
        assert any(f"{book(n, 15)}\n\n".startswith(texts[-1]) for n in range(4, 13))


@pytest.mark.parametrize("where", ["along", "end", "chat"])
@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), chatml()], ids=["bytes", "bpe"])
def test_facts_stand_between_whole_sentences_of_one_document(
    make: Callable[..., RetrievalBatches], tokenizer: PreTrainedTokenizerBase, where: str
) -> None:
    maker = make(tokenizer, question_weights={where: 1.0})
    batch = maker(split="train", step=0, rank=0, context_length=2048)
    assert "document_ids" not in batch
    assert batch["labels"].equal(batch["input_ids"])
    assert batch["position_ids"].equal(torch.arange(2048).expand(4, -1))
    for ids in batch["input_ids"]:
        found = whales(tokenizer.decode(ids))
        numbers = [number for _, number in found]
        assert len({book for book, _ in found}) == 1
        # One sentence after the other; the row begins within one.
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        assert len(numbers) > 10
    for before, answer, _ in answers(batch, tokenizer):
        if where == "chat":
            # The value, with a lead before it or without.
            said = answer.removesuffix("<|im_end|>").removesuffix("<|eos|>").removesuffix(".")
            assert any(said[at:].strip() in before for at in range(min(len(said) - 1, 60)))
        else:
            value = re.fullmatch(r"(.+?) ?(\n|_|\W)", answer.lstrip(" "), re.DOTALL)[1]
            assert value in before


def test_questions_at_the_end_come_one_after_the_other(
    make: Callable[..., RetrievalBatches],
) -> None:
    batch = make(question_weights={"end": 1.0}, fact_share=0.4)(
        split="train", step=1, rank=0, context_length=2048
    )
    for ids, marks in zip(batch["input_ids"], batch["answer_mask"], strict=True):
        first = int(marks.nonzero()[0])
        text = bytes(ids.tolist()).decode()
        last_sentence = text.rindex("swam past")
        asked = text[:first].rindex("\n\n", last_sentence)
        assert last_sentence < asked < first
        assert text[last_sentence:].startswith("swam past, as Mr. Bell saw.")  # it is whole
        assert marks[-1]  # the row ends with an answer, as a prompt's would
        assert marks.int().diff().eq(1).sum() > 1


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), chatml()], ids=["bytes", "chatml"])
def test_a_conversation_is_what_the_template_writes(
    make: Callable[..., RetrievalBatches], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Cut into turns and rendered anew by the tokenizer itself, a row is the same text; the answers
    are the assistant's turns up to the token that ends them.
    """
    user, assistant, end, end_of_assistant = {
        True: ("<|user|>", "<|assistant|>", "<|end|>", "<|eos|>"),
        False: ("<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>", "<|im_end|>"),
    }[isinstance(tokenizer, ByteTokenizer)]
    maker = make(tokenizer, question_weights={"chat": 1.0})
    batch = maker(split="train", step=0, rank=0, context_length=2048)
    for ids, marks in zip(batch["input_ids"], batch["answer_mask"], strict=True):
        text = tokenizer.decode(ids)
        turns = []
        for turn in text.split(user)[1:]:
            asked, answered = turn.split(assistant)
            turns += [
                {"role": "user", "content": asked.strip("\n").removesuffix(end)},
                {
                    "role": "assistant",
                    "content": answered.strip("\n").removesuffix(end_of_assistant),
                },
            ]
        rendered = tokenizer.apply_chat_template(turns, tokenize=False)
        assert rendered.replace("\n", "") == text.replace("\n", "")
        assert len(turns) >= 2
        edges = torch.nn.functional.pad(marks.int(), (1, 1)).diff()
        starts, ends = (edges == 1).nonzero().flatten(), (edges == -1).nonzero().flatten()
        replies = [tokenizer.decode(ids[a:b]) for a, b in zip(starts, ends, strict=True)]
        assert replies == [turn["content"] + end_of_assistant for turn in turns[1::2]]
        assert "\n\n" in turns[0]["content"]


def test_chat_questions_need_a_template(make: Callable[..., RetrievalBatches]) -> None:
    tokenizer = ByteTokenizer(chat_template="")
    make(tokenizer)
    with pytest.raises(ValueError, match=r"data.question_weights.chat: the tokenizer has no chat"):
        make(tokenizer, question_weights={"chat": 1.0})
    twice = "{% for m in messages %}{{ m['content'] }} {{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="does not write each turn once"):
        make(ByteTokenizer(chat_template=twice), question_weights={"chat": 1.0})


@pytest.mark.parametrize(("fraction", "ranks"), [(0.5, 2), (0.25, 4)])
def test_every_step_has_its_share_of_rows_with_facts(
    make: Callable[..., RetrievalBatches], fraction: float, ranks: int
) -> None:
    maker = make(facts_fraction=fraction, tokens_per_batch=2048)
    for step in range(4):
        batches = [
            maker(split="train", step=step, rank=rank, context_length=2048) for rank in range(ranks)
        ]
        has_facts = [bool(batch["answer_mask"].any()) for batch in batches]
        assert sum(has_facts) == fraction * ranks
        assert len({bytes(batch["input_ids"].numpy().tobytes()) for batch in batches}) == ranks
    both = make(facts_fraction=0.5)(split="test", step=0, rank=0, context_length=2048)
    assert both["answer_mask"].any(dim=1).tolist() == [False, True, False, True]
    assert [bool(row) for row in both["answers"]] == [False, True, False, True]


def test_documents_that_are_too_short_are_left_out(
    make: Callable[..., RetrievalBatches], files: dict[str, list[str]]
) -> None:
    both = {
        "val_files": files["train_files"],
        "train_files": [*files["train_files"], *files["val_files"]],
    }
    maker = make(facts_fraction=0.0, least_document_tokens=2000, **both)
    for step in range(5):
        ids = maker(split="train", step=step, rank=0, context_length=2048)["input_ids"]
        assert {book for row in ids for book, _ in whales(bytes(row.tolist()).decode())} <= {
            1,
            2,
            3,
        }
    longest = len(book(1, 400))
    with pytest.raises(
        ValueError, match=rf"least_document_tokens=99999; the longest has {longest}"
    ):
        make(least_document_tokens=99999, **both)


def test_the_share_of_facts_is_drawn(make: Callable[..., RetrievalBatches]) -> None:
    changes = {"question_weights": {"end": 1.0}, "context_length": 8192, "fact_share": 0.6}
    shares = {}
    for least in (0.02, 1.0):
        maker = make(least_fact_share=least, **changes)
        rows = [
            maker(split="train", step=step, rank=0, context_length=8192)["input_ids"][0]
            for step in range(12)
        ]
        shares[least] = [
            1 - len(re.findall("In book", bytes(row.tolist()).decode())) * 66 / 8192 for row in rows
        ]
    assert min(shares[1.0]) > 0.45
    assert min(shares[0.02]) < 0.2
    assert max(shares[0.02]) > 0.35


# --- Tokenized once ---------------------------------------------------------------------------


def _open(files: dict[str, list[str]], cache: str, results: Any) -> None:
    options = RetrievalDataOptions(
        context_length=2048, tokens_per_batch=2048, token_cache=cache, **files
    )
    maker = RetrievalBatches(options, ByteTokenizer())
    results.put(int(maker(split="train", step=0, rank=0, context_length=2048)["input_ids"].sum()))


def test_documents_are_tokenized_once(
    make: Callable[..., RetrievalBatches], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = {"split": "train", "step": 0, "rank": 0, "context_length": 2048}
    first = make()(**step)["input_ids"]
    cache = tmp_path / "tokens"
    folders = {path for path in cache.iterdir() if path.is_dir()}
    assert len(folders) == 2
    store = TokenStore.open(next(iter(folders)))
    assert isinstance(store.tokens, np.memmap)
    assert store.tokens.dtype == np.uint16
    assert set(store.documents.tolist()) <= set(store.sentences.tolist())
    with monkeypatch.context() as patch:
        patch.setattr("ic.datamodules.token_store._tokenize", lambda *_: pytest.fail("again"))
        assert make()(**step)["input_ids"].equal(first)
        with pytest.raises(pytest.fail.Exception, match="again"):  # another tokenizer
            make(bpe())
        train = tmp_path / "train.jsonl"
        train.write_text(train.read_text().replace("whale", "shark"))
        with pytest.raises(pytest.fail.Exception, match="again"):  # other text of the same size
            make()
    assert not make()(**step)["input_ids"].equal(first)
    assert {path for path in cache.iterdir() if path.is_dir()} > folders
    assert make(token_cache=None)(**step)["input_ids"].equal(make()(**step)["input_ids"])


@pytest.mark.parametrize("threads", [None, "true"])
def test_workers_behind_a_tokenizer_of_threads_are_quiet(
    files: dict[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    threads: str | None,
) -> None:
    """With "true" in the environment the workers waited for threads that they do not have."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")  # the end of the test takes it away
    if threads is None:
        monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    options = RetrievalDataOptions(
        context_length=1024, tokens_per_batch=1024, num_workers=2, token_cache=None, **files
    )
    data = RetrievalDataModule(options, bpe())
    got = [batch for batch, _ in zip(data.train_dataloader(), range(3), strict=False)]
    alone = RetrievalBatches(options, bpe())
    for step, batch in enumerate(got):
        own = alone(split="train", step=step, rank=0, context_length=1024)
        assert batch["input_ids"].equal(own["input_ids"])
    assert "forked" not in capfd.readouterr().err


def test_a_store_that_is_not_whole_is_made_again(
    make: Callable[..., RetrievalBatches], tmp_path: Path
) -> None:
    step = {"split": "train", "step": 0, "rank": 0, "context_length": 2048}
    first = make()(**step)["input_ids"]
    for folder in (path for path in (tmp_path / "tokens").iterdir() if path.is_dir()):
        (folder / "tokens.npy").write_bytes((folder / "tokens.npy").read_bytes()[:1000])
    assert make()(**step)["input_ids"].equal(first)
    assert make()(**step)["input_ids"].equal(first)


def test_where_nothing_can_be_kept_the_run_goes_on(
    make: Callable[..., RetrievalBatches], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.warns(UserWarning, match="data.token_cache=.*file/tokens: Not a directory"):
        batch = make(token_cache=str(tmp_path / "file/tokens"))(
            split="train", step=0, rank=0, context_length=2048
        )
    assert batch["input_ids"].shape == (4, 2048)


@pytest.mark.slow
def test_processes_of_a_host_share_what_one_of_them_makes(
    files: dict[str, list[str]], tmp_path: Path
) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    arguments = (files, str(tmp_path / "shared"), results)
    processes = [context.Process(target=_open, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len({results.get() for _ in processes}) == 1
    left = sorted(os.listdir(tmp_path / "shared"))
    assert len(left) == 4, left  # two stores and their locks, nothing half written

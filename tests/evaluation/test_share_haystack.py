"""Depths that share a haystack, the cache that goes over between their prompts, and ranks that
share a grid."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from ic.datamodules.needles import answer_keys
from ic.evaluation.options import CONTROL
from ic.evaluation.passkey.grid import Cell, PasskeyGridConfig
from ic.evaluation.passkey.prompts import build_prompt
from ic.evaluation.passkey.shares import haystack_of
from ic.evaluation.passkey.suite import PasskeySuite
from ic.evaluation.runner import run_suite
from ic.evaluation.shares import batch_of_tokens, share_of_samples
from ic.evaluation.suite import Sample
from ic.files.json_lines import rank_file, read_rows, write_rows
from ic.inference.greedy import GreedyDecoder
from ic.model import MLAForCausalLM
from ic.model.byte_tokenizer import ByteTokenizer
from tests.conftest import SHORT
from tests.evaluation.oracle import Oracle

TOKENIZER = ByteTokenizer()
DEPTHS = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
ROOT = Path(__file__).resolve().parents[2]


def shared(**changes) -> PasskeyGridConfig:
    values = {
        "lengths": [256, 512],
        "depths": DEPTHS,
        "samples": 2,
        "control_samples": 2,
        "fillers": ["random"],
        "tasks": ["single", "multi_key"],
        "num_needles": 2,
        "share_haystack": True,
    }
    return PasskeyGridConfig(**(values | changes))


def prompt_of(grid: PasskeyGridConfig, task: str, depth: float, length: int = 512) -> Sample:
    return build_prompt(TOKENIZER, grid, Cell(task, length, depth, "random", 1), 0)


def text_of(prompt: Sample) -> str:
    return bytes(prompt.ids.tolist()).decode()


def common(left: str, right: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=True)) if a != b), len(left))


def test_single_keys_hide_in_one_haystack() -> None:
    grid = shared()
    texts = {depth: text_of(prompt_of(grid, "single", depth)) for depth in [*DEPTHS, CONTROL]}
    needle = len(" The pass key is 12345. Remember it. 12345 is the pass key. ")
    question = len(" What is the pass key? The pass key is")
    room = 512 - needle - question
    stripped = set()
    for depth in DEPTHS:
        at, text = round(depth * room), texts[depth]
        assert text[at:].startswith(" The pass key is ")
        assert common(text, texts[CONTROL]) == at
        stripped.add(text[:at] + text[at + needle : 512 - question])
    assert stripped == {texts[CONTROL][:room]}
    keys = {answer_keys(text)[0] for depth, text in texts.items() if depth != CONTROL}
    assert len(keys) == len(DEPTHS)  # each depth has its own
    other = text_of(build_prompt(TOKENIZER, grid, Cell("single", 512, 0.4, "random", 2), 1))
    assert common(other, texts[0.4]) < 20  # another sample, another filler


def test_every_key_of_a_haystack_is_asked_for() -> None:
    grid = shared()
    by_haystack: dict[int, dict[float, str]] = {}
    for depth in DEPTHS:
        number = haystack_of(grid, Cell("multi_key", 512, depth, "random", 1))
        by_haystack.setdefault(number, {})[depth] = text_of(prompt_of(grid, "multi_key", depth))
    assert {n: list(texts) for n, texts in by_haystack.items()} == {
        0: [0.0, 0.4, 0.8],
        1: [0.2, 0.6, 1.0],
    }
    question = len(" What is the pass key for abc? The pass key for abc is")
    for texts in by_haystack.values():
        (context,) = {text[:-question] for text in texts.values()}
        keys = answer_keys(context)
        assert len(set(keys)) == 3  # the one asked for and two distractors
        for key, depth in zip(keys, texts, strict=True):  # in the order of the text
            prompt = prompt_of(grid, "multi_key", depth)
            assert prompt.expected == [key]
            name = text_of(prompt)[-len("abc is") : -len(" is")]
            assert f" The pass key for {name} is {key}. " in context
    control = prompt_of(grid, "multi_key", CONTROL)
    assert text_of(control)[:-question] == by_haystack[0][0.0][:-question]
    assert text_of(control)[-6:-3] not in text_of(control)[:-question]
    assert control.expected[0] not in text_of(control)


def test_the_cache_goes_over_to_the_next_prompt(make_model) -> None:
    model = make_model(length_temperature="ssmax")
    processed = 0

    def count(_: MLAForCausalLM, args: tuple[torch.Tensor]) -> None:
        nonlocal processed
        processed += args[0].shape[1]

    model.register_forward_pre_hook(count)
    prompts = [torch.randint(3, 97, (2, 90), generator=torch.Generator().manual_seed(0))]
    for at in (60, 20, 89, 0):
        changed = prompts[-1].clone()
        changed[1, at] = 97 - changed[1, at]  # one row differs: the batch begins alike up to it
        prompts.append(changed)
    prompts += [prompts[-1].clone(), prompts[-1][:, :70], prompts[-1][:1]]
    decoder, computed, given = GreedyDecoder(model, 1000), [], []
    for ids in prompts:
        processed = -4  # after the first, each of five new tokens goes through the model
        given.append(decoder.answers(ids, 5))
        computed.append(processed)
    assert computed == [90, 30, 70, 1, 90, 1, 1, 90]
    for kept, ids in zip(given, prompts, strict=True):
        assert kept.equal(GreedyDecoder(model, 1000).answers(ids, 5))


def shares_of(suite: PasskeySuite, world: int) -> list[list[dict[Cell, list[int]]]]:
    """What each rank answers if nothing is answered yet."""
    missing = {cell: list(range(cell.samples)) for cell in suite.cells()}
    size = batch_of_tokens(suite.tokens_per_batch)
    return [share_of_samples(suite, missing, rank, world, size) for rank in range(world)]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3, 16])
def test_ranks_share_the_cells(world: int, share: bool) -> None:
    grid = shared(share_haystack=share)
    shares = shares_of(PasskeySuite(grid), world)
    taken = [cell for lists in shares for together in lists for cell in together]
    assert sorted(map(str, taken)) == sorted(map(str, grid.cells()))
    for together in (list(part) for parts in shares for part in parts):
        assert share or len(together) == 1
        assert len({(cell.task, cell.length_tokens) for cell in together}) == 1
        order = [(haystack_of(grid, cell), -cell.depth) for cell in together if cell.depth >= 0]
        assert order == sorted(order)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("share", [True, False])
def test_ranks_have_equal_work(world: int, share: bool) -> None:
    grid = shared(share_haystack=share, lengths=[512, 2048], samples=1)
    work = []
    for rank in range(world):
        pairs, before = 0, ""
        for together in shares_of(PasskeySuite(grid), world)[rank]:
            for cell in together:
                text = text_of(build_prompt(TOKENIZER, grid, cell, 0))
                kept = common(before, text) if share and len(before) == len(text) else 0
                pairs += len(text) ** 2 - kept**2
                before = text
        work.append(pairs)
    # Two groups of 2048 tokens, of seven prompts and of two haystacks, do not divide by four.
    assert max(work) < 1.2 * sum(work) / world


class ThreadRanks:
    """Two ranks as two threads; they fail together."""

    meeting = threading.Barrier(2)
    world_size = 2
    sent: ClassVar[list[Any]] = []

    def __init__(self, rank: int) -> None:
        self.global_rank = rank

    def barrier(self, name: str | None = None) -> None:
        self.meeting.wait()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if self.global_rank == src:
            self.sent.append(obj)
        self.meeting.wait()
        held = self.sent[-1]
        self.meeting.wait()
        return held


def test_two_ranks_merge_their_cells(make_model, tmp_path: Path) -> None:
    grid = shared()
    alone = run_suite(
        Oracle(make_model(vocab_size=320).config),
        TOKENIZER,
        PasskeySuite(grid),
        tmp_path / "alone.jsonl",
    )
    file = tmp_path / "samples.jsonl"
    earlier = read_rows(tmp_path / "alone.jsonl")[3:5]  # of an earlier run of more ranks
    write_rows(rank_file(file, 5), earlier)

    oracles = [Oracle(make_model(vocab_size=320).config) for _ in range(2)]

    def rank(number: int) -> tuple[list[dict], list[tuple[Cell, int]]]:
        seen: list[tuple[Cell, int]] = []
        try:
            rows = run_suite(
                oracles[number],
                TOKENIZER,
                PasskeySuite(grid),
                file,
                lambda cell, row, _: seen.append((cell, row["index"])),
                ranks=ThreadRanks(number),
            )
        except BaseException:
            ThreadRanks.meeting.abort()  # or the other waits for ever
            raise
        return rows, seen

    with ThreadPoolExecutor(2) as pool:
        (first, seen), (second, _) = pool.map(rank, range(2))
    timeless = [{**row, "seconds": 0} for row in alone]
    assert [{**row, "seconds": 0} for row in first] == timeless
    assert second == first
    every = [(cell, index) for cell in grid.cells() for index in range(cell.samples)]
    assert sorted(seen, key=str) == sorted(every, key=str)
    assert [path.name for path in tmp_path.glob("samples*")] == ["samples.jsonl"]
    rows = read_rows(file)
    assert len(rows) == len(every)
    assert all(row in rows for row in earlier)  # with their seconds: they were not answered again


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ["evaluation.depths=[0,1]"],
        # Pieces of 64 tokens: the cache goes over to the next prompt up to the last whole one.
        [
            "context_parallel_size=2",
            "evaluation.depths=[0.3,0.7]",
            "evaluation.share_haystack=true",
            "evaluation.tasks=[single,multi_key]",
            "evaluation.num_needles=1",
            "evaluation.prefill_chunk_tokens=64",
        ],
    ],
    ids=["cells", "prompts"],
)
def test_evaluate_on_two_devices_equals_one(
    ic: Callable[..., int], tmp_path: Path, settings: list[str]
) -> None:
    assert ic(*SHORT, "trainer.max_steps=1", "callbacks.passkey=null") == 0
    command = [
        "evaluate",
        "checkpoint=runs/debug/default/checkpoints/last",
        "accelerator=cpu",
        "evaluation.lengths=[256]",
        "evaluation.samples=2",
        "evaluation.control_samples=1",
    ]
    alone = [setting for setting in settings if not setting.startswith("context")]
    assert ic(*command, *alone, "output=one") == 0
    done = subprocess.run(
        [sys.executable, "-m", "ic", *command, *settings, "output=two", "devices=2"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    one, two = (read_rows(tmp_path / name / "samples.jsonl") for name in ("one", "two"))
    key = ("length_tokens", "depth", "filler", "index", "correct", "text")
    assert sorted(json.dumps([row[k] for k in key]) for row in one) == sorted(
        json.dumps([row[k] for k in key]) for row in two
    )


def test_refuses_prompts_shared_by_some(
    ic: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    assert ic("evaluate", "checkpoint=model", "accelerator=cpu", "context_parallel_size=2") == 2
    error = capsys.readouterr().err
    assert "context_parallel_size=2 with 1 processes: choose 1 or 1" in error


def test_refuses_other_tasks() -> None:
    with pytest.raises(ValueError, match=r"tasks=\['multi_value'\].*share_haystack takes single"):
        shared(tasks=["multi_value"])


def test_work_grows_with_the_square_of_the_length() -> None:
    suite = PasskeySuite(shared(share_haystack=False))
    cells = [Cell("single", 256, 0.5, "random", 3), Cell("single", 512, 0.5, "random", 2)]
    assert suite.work(cells) == 3 * 256**2 + 2 * 512**2

"""The line that says how long an epoch is, and how often a run reads its examples."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ic.datamodules.epochs import EpochDataModule
from ic.datamodules.options import PreferenceDataOptions, SFTDataOptions
from ic.datamodules.preference import PreferenceDataModule
from ic.datamodules.sft import SFTDataModule
from ic.model.byte_tokenizer import ByteTokenizer

# Five of 20 tokens, the byte tokenizer's eos among them: three fit a row of 64, two the next.
CHATS = [{"prompt": f"{n:017}", "completion": "ok"} for n in range(5)]
# Of 4 + 3 + 2 tokens.
PAIRS = [{"prompt": f"{n:04}", "chosen": "ab", "rejected": "c"} for n in range(3)]

# Needles take longer rows.
NEEDLES = {"packing": False, "context_length": 128, "tokens_per_batch": 128}


@pytest.fixture
def sft(tmp_path: Path) -> Callable[..., SFTDataModule]:
    return lambda rows=CHATS, **changes: SFTDataModule(
        SFTDataOptions(
            train_files=[write(tmp_path, rows)],
            **{"context_length": 64, "tokens_per_batch": 64, **changes},
        ),
        ByteTokenizer(),
    )


@pytest.fixture
def preference(tmp_path: Path) -> Callable[..., PreferenceDataModule]:
    return lambda **changes: PreferenceDataModule(
        PreferenceDataOptions(
            train_files=[write(tmp_path, PAIRS)],
            **{"context_length": 64, "tokens_per_batch": 128, **changes},
        ),
        ByteTokenizer(),
    )


def write(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[..., tuple[list[str], list[str]]]:
    """What `setup` says and what it warns of, about the training files."""
    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")

    def of(
        data: EpochDataModule,
        max_steps: int,
        ranks: int = 1,
        accumulate: int = 1,
        stage: str = "fit",
    ) -> tuple[list[str], list[str]]:
        data.trainer = SimpleNamespace(
            max_steps=max_steps,
            distributed_sampler_kwargs={"rank": 0, "num_replicas": ranks},
            accumulate_grad_batches=accumulate,
            world_size=ranks,
            global_rank=0,
        )
        caplog.clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            data.setup(stage)
        lines = [line for line in caplog.messages if "an epoch is" in line]
        return lines, [text for w in caught if "an epoch is" in (text := str(w.message))]

    return of


PACKED = "data.train_files: 5 conversations, 100 tokens in 2 rows of at most 64: "
PADDED = "data.train_files: 5 conversations, 100 tokens: "


@pytest.mark.parametrize(
    ("changes", "run", "line"),
    [
        ({}, {"max_steps": 2}, PACKED + "an epoch is 2 steps; trainer.max_steps=2 reads them once"),
        ({}, {"max_steps": -1}, PACKED + "an epoch is 2 steps"),
        (
            {},
            {"max_steps": 20},  # ten times, the most that is no warning
            PACKED + "an epoch is 2 steps; trainer.max_steps=20 reads them 10 times",
        ),
        (
            {},
            {"max_steps": 3, "ranks": 2},
            PACKED + "an epoch is 1 step; trainer.max_steps=3 reads them 3 times",
        ),
        (
            {"packing": False},
            {"max_steps": 2},
            PADDED + "an epoch is 5 steps; trainer.max_steps=2 reads 40 % of them",
        ),
        (
            {"packing": False},
            {"max_steps": 4, "ranks": 2},
            PADDED + "an epoch is 2.5 steps; trainer.max_steps=4 reads them 1.6 times",
        ),
        (
            {"packing": False, "tokens_per_batch": 128},
            {"max_steps": -1, "accumulate": 5, "ranks": 2},
            PADDED + "an epoch is 0.25 steps",  # 5 of 20 rows
        ),
        (
            {**NEEDLES, "needle_fraction": 0.75},
            {"max_steps": 30},
            # Five of twenty micro-batches.
            PADDED + "an epoch is about 20 steps; trainer.max_steps=30 reads them about 1.5 times",
        ),
        (
            {**NEEDLES, "needle_fraction": 0.75},
            {"max_steps": 2},
            PADDED + "an epoch is about 20 steps; trainer.max_steps=2 reads about 10 % of them",
        ),
    ],
)
def test_conversations(
    sft: Callable[..., SFTDataModule],
    said: Callable[..., tuple[list[str], list[str]]],
    changes: dict[str, Any],
    run: dict[str, int],
    line: str,
) -> None:
    assert said(sft(**changes), **run) == ([line], [])


def test_pairs(
    preference: Callable[..., PreferenceDataModule],
    said: Callable[..., tuple[list[str], list[str]]],
) -> None:
    start = "data.train_files: 3 pairs, 27 tokens: an epoch is "
    reads = "; trainer.max_steps="
    assert said(preference(), 3) == ([f"{start}3 steps{reads}3 reads them once"], [])
    # Two ranks with two micro-batches of a pair each: three of four.
    assert said(preference(), 3, ranks=2, accumulate=2) == (
        [f"{start}0.75 steps{reads}3 reads them 4 times"],
        [],
    )
    assert said(preference(share_prompt=False), -1) == ([f"{start}3 steps"], [])


def test_more_than_ten_readings_are_a_warning(
    sft: Callable[..., SFTDataModule],
    preference: Callable[..., PreferenceDataModule],
    said: Callable[..., tuple[list[str], list[str]]],
) -> None:
    often = "an epoch is 2 steps; trainer.max_steps=22 reads them 11 times"
    advice = "or a lower trainer.max_steps"
    assert said(sft(), 22) == ([], [f"{PACKED}{often}: give more conversations, {advice}"])
    lines, warned = said(preference(), 3000)
    assert not lines
    assert warned[0].endswith(f"reads them 1,000 times: give more pairs, {advice}")


def test_a_conversation_that_was_split_is_one(
    sft: Callable[..., SFTDataModule], said: Callable[..., tuple[list[str], list[str]]]
) -> None:
    long = [{"prompt": "p", "completion": "c" * 126}]  # 128 tokens
    assert said(sft(long, too_long="split"), -1)[0] == [
        "data.train_files: 1 conversation, 128 tokens in 2 rows of at most 64: an epoch is 2 steps"
    ]


def test_is_said_of_training_alone(
    sft: Callable[..., SFTDataModule],
    said: Callable[..., tuple[list[str], list[str]]],
    tmp_path: Path,
) -> None:
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text(json.dumps({"prompt": "held", "completion": "out"}))
    data = sft(val_files=[str(held_out)], test_files=[str(held_out)])
    assert len(said(data, 2)[0]) == 1
    for stage in ("validate", "test", "predict"):
        assert said(data, 2, stage=stage) == ([], [])


@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_an_epoch_is_as_long_as_the_line_says(
    sft: Callable[..., SFTDataModule], fraction: float
) -> None:
    """Counted in the batches, until each conversation was read once."""
    data = sft(**NEEDLES, needle_fraction=fraction)
    batches = islice(iter(data.train_dataloader()), 10 if fraction else 5)
    texts = [bytes(row[:17].clamp(max=255).tolist()) for b in batches for row in b["input_ids"]]
    assert {row["prompt"].encode() for row in CHATS} <= set(texts)
    assert data.epoch_length().steps == len(texts)
    assert data.epoch_length().reads(3 * len(texts)) == 3


def test_fit_says_it_once_also_where_it_resumes(
    ic: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = write(tmp_path, CHATS)
    (tmp_path / "held-out.jsonl").write_text(json.dumps({"prompt": "held", "completion": "out"}))
    command = ["fit", "experiment=sft_tiny", f"data.train_files=[{file}]"]
    command += ["data.val_files=[held-out.jsonl]", "trainer.val_check_interval=1"]
    command += ["data.context_length=64", "data.tokens_per_batch=64", "optimizer.warmup_steps=1"]
    command += ["trainer.accumulate_grad_batches=2", "ckpt_path=auto", "allow_config_change=true"]
    for steps, times in ((1, "once"), (2, "2 times")):
        assert ic(*command, f"trainer.max_steps={steps}") == 0
        said = capsys.readouterr().err
        assert ("continuing from" in said) == (steps == 2)
        assert [line for line in said.splitlines() if "an epoch is" in line] == [
            f"{PACKED}an epoch is 1 step; trainer.max_steps={steps} reads them {times}"
        ]

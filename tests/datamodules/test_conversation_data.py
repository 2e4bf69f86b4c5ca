"""SFT and preference data: formats, masks, packing, order, resume, and one clear line for bad rows."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset, DatasetDict

from ic.datamodules.options import PreferenceDataOptions, SFTDataOptions
from ic.datamodules.preference import PreferenceDataModule
from ic.datamodules.sft import SFTDataModule
from ic.model.byte_tokenizer import ByteTokenizer

USER, GOOD, BAD = (
    {"role": r, "content": c}
    for r, c in (("user", "Höhe?"), ("assistant", "3 m."), ("assistant", "No."))
)
CHAT = {"messages": [USER, GOOD]}
PAIR = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
RENDERED = b"<|user|>H\xc3\xb6he?<|end|><|assistant|>3 m.<|eos|>".decode()


def sft(path: Path | str, **changes: Any) -> SFTDataModule:
    config = SFTDataOptions(
        train_files=[str(path)], **{"context_length": 64, "tokens_per_batch": 64, **changes}
    )
    return SFTDataModule(config, ByteTokenizer())


def preference(path: Path | str, **changes: Any) -> PreferenceDataModule:
    config = PreferenceDataOptions(
        train_files=[str(path)], **{"context_length": 64, "tokens_per_batch": 128, **changes}
    )
    return PreferenceDataModule(config, ByteTokenizer())


def write(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"data.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "folder":
        Dataset.from_list(rows).save_to_disk(path)
    else:
        DatasetDict(
            {"train": Dataset.from_list(rows), "test": Dataset.from_list(rows[:1])}
        ).save_to_disk(path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder", "splits"])
def test_formats_of_files(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind, [CHAT, CHAT])
    chats = sft(path).examples("train_files")
    assert len(chats) == 2
    decode = ByteTokenizer().decode
    assert decode(chats[1].tokens) == RENDERED
    assert decode(chats[1].tokens[chats[1].is_target]) == "3 m.<|eos|>"
    assert chats[1].where.startswith(str(path))
    (pair,) = preference(write(tmp_path, kind, [PAIR])).examples("train_files")
    assert decode(np.concatenate([pair.prompt, pair.chosen])) == RENDERED
    assert decode(pair.rejected) == "No.<|eos|>"


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"prompt": "Q: x A:", "completion": " y"}, "Q: x A:", " y<|eos|>"),
        ({"prompt": [USER], "completion": [GOOD]}, RENDERED[: RENDERED.index("3")], "3 m.<|eos|>"),
    ],
)
def test_prompt_and_completion(
    tmp_path: Path, row: dict[str, Any], prompt: str, completion: str
) -> None:
    (chat,) = sft(write(tmp_path, "jsonl", [row])).examples("train_files")
    decode = ByteTokenizer().decode
    assert decode(chat.tokens[~chat.is_target]) == prompt
    assert decode(chat.tokens[chat.is_target]) == completion


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        (
            {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
            RENDERED[: RENDERED.index("3")],
            "3 m.<|eos|>",
            "No.<|eos|>",
        ),
        (
            {"prompt": "Höhe?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            RENDERED[: RENDERED.index("3")],
            "3 m.<|eos|>",
            "No.<|eos|>",
        ),
        (
            {"chosen": "It is blue.", "rejected": "It is bright."},
            "It is b",
            "lue.<|eos|>",
            "right.<|eos|>",
        ),
        (
            {"chosen": "It is blue.", "rejected": "It is red."},
            "It is",
            " blue.<|eos|>",
            " red.<|eos|>",
        ),
        ({"prompt": "2+2=", "chosen": "4", "rejected": "5"}, "2+2=", "4<|eos|>", "5<|eos|>"),
    ],
)
def test_prompts_of_pairs(
    tmp_path: Path, row: dict[str, Any], prompt: str, chosen: str, rejected: str
) -> None:
    (pair,) = preference(write(tmp_path, "jsonl", [row])).examples("train_files")
    decode = ByteTokenizer().decode
    assert (decode(pair.prompt), decode(pair.chosen), decode(pair.rejected)) == (
        prompt,
        chosen,
        rejected,
    )


def test_pair_batch(tmp_path: Path) -> None:
    rows = [PAIR, {"prompt": "ab", "chosen": "cdefgh", "rejected": "x"}]
    data = preference(write(tmp_path, "jsonl", rows), share_prompt=False)
    batch = data.collate(data.examples("train_files"))
    assert batch["branches"] is None
    S, T = batch["input_ids"].shape
    assert (4, max(p.num_tokens for p in data.examples("train_files"))) == (S, T)
    assert batch["input_ids"][3].tolist() == [*b"abx", 257] + [258] * (T - 4)
    assert batch["labels"][3].tolist() == [-100, -100, ord("x"), 257] + [-100] * (T - 4)
    assert batch["completion_index"][3].tolist() == [0, 0, 1, 2] + [0] * (T - 4)
    assert batch["completion_sequence"][3].tolist() == [0, 0, 3, 3] + [0] * (T - 4)
    assert batch["completion_tokens"].tolist() == [5, 7, 4, 2]
    assert batch["position_ids"].equal(torch.arange(T).expand(S, T))
    assert len(set(batch["pair_keys"])) == 2


def test_pair_batch_with_shared_prompts(tmp_path: Path) -> None:
    """The prompt's last token stands before both completions, since it predicts their first."""
    rows = [PAIR, {"prompt": "ab", "chosen": "cdefgh", "rejected": "x"}]
    data = preference(write(tmp_path, "jsonl", rows))
    batch = data.collate(data.examples("train_files"))
    N, T = batch["input_ids"].shape
    first = data.examples("train_files")[0]
    assert (2, len(first.prompt) + len(first.chosen) + len(first.rejected) + 1) == (N, T)
    pad = [0] * (T - 12)
    chosen, rejected = [*b"cdefgh", 257], [ord("x"), 257]
    assert batch["branches"][1] == (1, 9)
    assert batch["input_ids"][1, :12].tolist() == [*b"ab", *chosen, ord("b"), *rejected]
    assert batch["labels"][1, :12].tolist() == [-100, -100, *chosen, -100, *rejected]
    assert batch["completion_index"][1].tolist() == [0, 0, *range(1, 8), 0, 1, 2, *pad]
    assert batch["completion_sequence"][1].tolist() == [0, 0, *[1] * 7, 0, 3, 3, *pad]
    assert batch["position_ids"][1].tolist() == [*range(9), *range(1, T - 8)]
    assert batch["completion_tokens"].tolist() == [5, 7, 4, 2]
    assert batch["pair_tokens"].tolist() == [first.num_tokens, 9]


def test_packed_rows(tmp_path: Path) -> None:
    rows = [{"prompt": "a" * n, "completion": "b"} for n in (3, 50, 20, 2)]
    data = sft(write(tmp_path, "jsonl", rows), shuffle=False)
    first = next(iter(data.train_dataloader()))
    # 3 + 2 tokens, then 50 + 2 fill a row to 57; the last, 4, fits behind them.
    assert first["document_ids"][0].tolist() == [0] * 5 + [1] * 52 + [2] * 4 + [3] * 3
    assert first["position_ids"][0].tolist() == [*range(5), *range(52), *range(4), *range(3)]
    targets = (first["labels"][0] != -100).nonzero().flatten().tolist()
    assert targets == [3, 4, 55, 56, 59, 60]
    assert first["labels"][0][targets].equal(first["input_ids"][0][targets])


@pytest.mark.parametrize("kind", ["sft", "preference"])
@pytest.mark.parametrize("workers", [0, 2])
def test_order_and_resume(tmp_path: Path, kind: str, workers: int) -> None:
    rows = [
        {"prompt": f"{i:02d}", "completion": "c", "chosen": "c", "rejected": "d"} for i in range(11)
    ]
    path = write(tmp_path, "jsonl", rows)
    make = sft if kind == "sft" else preference
    size = {"tokens_per_batch": 128} if kind == "sft" else {"tokens_per_batch": 256}
    settings = {**size, **({"packing": False} if kind == "sft" else {})}

    def names(batches: list[dict[str, Any]]) -> list[str]:
        half = slice(0, 2)  # the chosen sequences come first
        return [bytes(row[:2].tolist()).decode() for b in batches for row in b["input_ids"][half]]

    unbroken = list(islice(iter(make(path, **settings).train_dataloader()), 11))
    drawn = names(unbroken)
    assert sorted(drawn[:11]) == sorted(drawn[11:22]) == [f"{i:02d}" for i in range(11)]
    assert drawn[:11] != drawn[11:22]
    data = make(path, **settings, num_workers=workers)
    for batch in islice(iter(data.train_dataloader()), 4):
        data.on_before_batch_transfer(batch, 0)
    again = make(path, **settings)
    again.load_state_dict(data.state_dict())
    rest = list(islice(iter(again.train_dataloader()), 7))
    assert [b["step"] for b in rest] == list(range(4, 11))
    assert names(rest) == drawn[8:]
    write(tmp_path, "jsonl", rows[1:])
    with pytest.raises(ValueError, match="other"):
        make(path, **settings).load_state_dict(data.state_dict())


@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_a_position_in_other_data_is_refused(tmp_path: Path, kind: str) -> None:
    """Also where lengths and targets are the same and the words alone differ."""
    other_answer = {**GOOD, "content": "4 m."}
    rows = {
        "sft": ([CHAT], [{"messages": [USER, other_answer]}]),
        "preference": ([PAIR], [{**PAIR, "chosen": [other_answer]}]),
    }
    trained, other = (
        (sft if kind == "sft" else preference)(write(folder, "jsonl", data))
        for folder, data in zip((tmp_path / "a", tmp_path / "b"), rows[kind], strict=True)
        if folder.mkdir() is None
    )
    state = trained.state_dict()
    trained.load_state_dict(state)
    with pytest.raises(ValueError, match="the checkpoint was trained on other"):
        other.load_state_dict(state)


@pytest.mark.parametrize("longer", ["chosen", "rejected"])
@pytest.mark.parametrize("share_prompt", [True, False])
def test_a_pair_is_as_long_as_its_longer_side(
    tmp_path: Path, longer: str, share_prompt: bool
) -> None:
    pair = {**PAIR, longer: [{**GOOD, "content": "five meters. " * 4}]}
    path = write(tmp_path, "jsonl", [pair])
    (read,) = preference(
        path, share_prompt=share_prompt, context_length=128, tokens_per_batch=256
    ).examples("train_files")
    sides = {name: len(read.prompt) + len(getattr(read, name)) for name in ("chosen", "rejected")}
    assert sides[longer] == max(sides.values()) > min(sides.values()) + 40
    assert read.num_tokens == sides[longer]
    limits = {"share_prompt": share_prompt, "tokens_per_batch": 2 * sides[longer]}
    fitting = preference(path, context_length=sides[longer], **limits)
    assert len(fitting.examples("train_files")) == 1
    with pytest.raises(ValueError, match=f"{sides[longer]} tokens, more than data.context_length"):
        preference(path, context_length=sides[longer] - 1, **limits).examples("train_files")


def test_ranks_share_the_rows(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i:02d}", "chosen": "c", "rejected": "d"} for i in range(7)]
    path = write(tmp_path, "jsonl", rows)
    seen = []
    for rank in (0, 1):
        data = preference(path)
        data.trainer = SimpleNamespace(
            distributed_sampler_kwargs={"rank": rank, "num_replicas": 2},
            accumulate_grad_batches=1,
            world_size=2,
            global_rank=rank,
        )
        seen.append([b["pair_keys"][0] for b in islice(iter(data.train_dataloader()), 7)])
    together = [key for pair in zip(*seen, strict=True) for key in pair]
    assert len(set(together[:7])) == len(set(together[7:])) == 7


@pytest.mark.parametrize(
    ("rule", "kept", "report"),
    [("drop", [9], "dropped 1 of 2"), ("split", [64, 64, 9], "split 1 of 2")],
)
def test_too_long_is_reported(
    tmp_path: Path, rule: str, kept: list[int], report: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")
    rows = [{"prompt": "p" * 10, "completion": "c" * 117}, {"prompt": "p" * 5, "completion": "ccc"}]
    path = write(tmp_path, "jsonl", rows)
    assert [len(c) for c in sft(path, too_long=rule).examples("train_files")] == kept
    assert report in caplog.messages[0]
    assert f"{path}:1" in caplog.messages[0]
    with pytest.raises(
        ValueError, match=rf"{path}:1: 128 tokens, more than data.context_length=64"
    ):
        sft(path).examples("train_files")


BAD_PAIRS = [
    ({"prompt": "a", "chosen": "b"}, 'no "rejected"; the columns are prompt, chosen'),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
    ({"prompt": "a", "chosen": " ", "rejected": "b"}, '"chosen" is empty'),
    (
        {"prompt": [USER], "chosen": [GOOD], "rejected": [{"role": "assistant", "content": ""}]},
        '"rejected" is empty',
    ),
    (
        {"prompt": [USER], "chosen": "text", "rejected": [BAD]},
        '"chosen" must be a list of messages',
    ),
    (
        {"prompt": "a", "chosen": "b" * 64, "rejected": "c"},
        "66 tokens, more than data.context_length=64",
    ),
    ({"prompt": "", "chosen": "b", "rejected": "c"}, '"prompt" must be text or messages'),
    ({"chosen": "b", "rejected": "c"}, "do not begin with a common one"),
    ({"chosen": "ab", "rejected": "a"}, '"rejected" is empty behind what both have in common'),
    ({"prompt": [{"role": "user"}], "chosen": [GOOD], "rejected": [BAD]}, 'no "content"'),
]


@pytest.mark.parametrize(("row", "message"), BAD_PAIRS, ids=[m for _, m in BAD_PAIRS])
def test_bad_pairs_name_their_row(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = write(tmp_path, "jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}, row])
    with pytest.raises(ValueError, match="data.jsonl:2: ") as error:
        preference(path).examples("train_files")
    assert message in str(error.value)


BAD_CHATS = [
    ({"text": "a"}, 'neither "messages" nor "prompt"; the columns are text'),
    ({"prompt": "a"}, 'no "completion"'),
    ({"messages": [USER]}, "the assistant writes nothing"),
    ({"messages": []}, "must be a list of messages"),
    ({"prompt": "a", "completion": ""}, '"completion" is empty'),
]


@pytest.mark.parametrize(("row", "message"), BAD_CHATS, ids=[m for _, m in BAD_CHATS])
def test_bad_conversations_name_their_row(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    path = write(tmp_path, "jsonl", [CHAT, row])
    with pytest.raises(ValueError, match="data.jsonl:2: ") as error:
        sft(path).examples("train_files")
    assert message in str(error.value)


def test_template_must_tell_the_assistant(tmp_path: Path) -> None:
    data = sft(write(tmp_path, "jsonl", [CHAT]))
    data.tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    with pytest.raises(ValueError, match=r"data.jsonl:1: .*\{% generation %\}"):
        data.examples("train_files")
    data.tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"data.jsonl:1: .*no chat template"):
        data.examples("train_files")


def test_other_bad_files(tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"messages": 1}\n{"mess\n')
    with pytest.raises(ValueError, match=r"broken.jsonl:1: .*list of messages, not 1"):
        sft(broken).examples("train_files")
    broken.write_text('["a"]\n')
    with pytest.raises(
        ValueError, match=r"broken.jsonl:1: is an array; a line must be one JSON object"
    ):
        sft(broken).examples("train_files")
    broken.write_text('{"mess\n')
    with pytest.raises(ValueError, match=r"broken.jsonl:1: not valid JSON"):
        sft(broken).examples("train_files")
    with pytest.raises(ValueError, match="is not a folder that datasets.save_to_disk wrote"):
        sft(tmp_path).examples("train_files")
    with pytest.raises(ValueError, match="no bundled:x; there are conversations-train.jsonl"):
        sft("bundled:x").examples("train_files")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="is text; give .jsonl"):
        sft(tmp_path / "a.txt").examples("train_files")
    with pytest.raises(ValueError, match="data.train_files is empty"):
        SFTDataModule(SFTDataOptions(), ByteTokenizer()).setup("fit")


@pytest.mark.parametrize("name", ["conversations", "preferences"])
def test_bundled_sets_hold_out_their_questions(name: str) -> None:
    asked = {}
    for split in ("train", "val"):
        source = f"bundled:{name}-{split}.jsonl"
        if name == "conversations":
            texts = [
                ByteTokenizer().decode(c.tokens)
                for c in sft(source, context_length=256, tokens_per_batch=256).examples(
                    "train_files"
                )
            ]
        else:
            pairs = preference(source, context_length=256, tokens_per_batch=512).examples(
                "train_files"
            )
            texts = [ByteTokenizer().decode(pair.prompt) for pair in pairs]
        asked[split] = {text.partition("<|end|>")[0] for text in texts}
        assert len(asked[split]) == len(texts) == {"train": 288, "val": 96}[split]
    assert not asked["train"] & asked["val"]

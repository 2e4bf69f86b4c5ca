"""Conversations that a model writes by itself: what is asked of it, and what is kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from ic.datamodules.options import SFTDataOptions
from ic.datamodules.sft import SFTDataModule
from ic.inference.chats.options import MakeChatsOptions
from ic.inference.chats.user_turns import UserTurns
from ic.inference.chats.writer import normalised, only_repeats
from ic.model import MLAForCausalLM
from ic.model.byte_tokenizer import ByteTokenizer
from tests.bounds import check_bounds
from tests.checkpoint.gguf_files import byte_level_bpe
from tests.inference.chats.writers import (
    DRAWN,
    END,
    EOS,
    OPTIONS,
    Capture,
    Run,
    chats,
    letters,
    llama,
)


def by_hand(model: Any, rendered: str, most: int, ends: set[int]) -> str:
    """What a model continues a prompt with, token by token, without a cache."""
    tokenizer = ByteTokenizer()
    ids = tokenizer(rendered)["input_ids"]
    new: list[int] = []
    while len(new) < most:
        token = int(model(torch.tensor([ids + new])).logits[0, -1].argmax())
        if token in ends:
            break
        new.append(token)
    return str(tokenizer.decode(new)).strip()


@pytest.mark.parametrize("kind", ["llama", "mla"])
def test_each_turn_is_what_the_model_writes_by_itself(
    ic: Run, writer: Path, tmp_path: Path, make_model: Callable[..., MLAForCausalLM], kind: str
) -> None:
    """Answers are the greedy ones, whatever stands in the batch with them; so is a question, where
    the likeliest token alone may be drawn.
    """
    if kind == "mla":
        letters(make_model(vocab_size=320, eos_token_id=EOS), 2.0).save_pretrained(writer)
    asked = ("turns=2", "system=Be brief.", "keep_unfinished=true", *OPTIONS)
    assert ic("make_chats", f"checkpoint={writer}", "output=c.jsonl", "count=3", *asked) == 0
    found = chats(tmp_path / "c.jsonl")
    assert len(found) == 3
    model: Any = AutoModelForCausalLM.from_pretrained(writer).eval()
    lengths = set()
    for chat in found:
        assert [message["role"] for message in chat] == ["system", *["user", "assistant"] * 2]
        assert chat[0]["content"] == "Be brief."
        for turn in (2, 4):
            prompt = ByteTokenizer().apply_chat_template(
                chat[:turn], tokenize=False, add_generation_prompt=True
            )
            assert chat[turn]["content"] == by_hand(model, str(prompt), 16, {EOS, END})
            lengths.add(len(str(prompt)))
    assert len(lengths) > 2  # prompts of several lengths were padded
    likeliest = ("question_top_p=1e-6", "keep_unfinished=true", *OPTIONS)
    assert ic("make_chats", f"checkpoint={writer}", "output=l.jsonl", "count=1", *likeliest) == 0
    ((question, _),) = chats(tmp_path / "l.jsonl")
    assert question["content"] == by_hand(model, "<|user|>", 12, {EOS, END})


def test_questions_are_drawn_from_behind_the_beginning_of_a_users_turn(writer: Path) -> None:
    options = MakeChatsOptions(checkpoint=str(writer), output="c.jsonl", seed=3)
    tokenizer = ByteTokenizer()
    turns = UserTurns.of(tokenizer, options)
    assert turns.end == END
    assert tokenizer.decode(turns.prompt([])) == "<|user|>"
    before = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert tokenizer.decode(turns.prompt(before)) == "<|user|>a<|end|><|assistant|>b<|eos|><|user|>"


def test_what_is_of_no_use_is_dropped_and_counted(
    ic: Run, writer: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Turns of one letter or none: most questions were there before, and too few are left."""
    command = ("make_chats", f"checkpoint={writer}", "output=c.jsonl", "keep_unfinished=true")
    short = ("max_question_tokens=1", "max_answer_tokens=1", "accelerator=cpu", "batch_size=40")
    assert ic(*command, *short, "count=40", "most_attempts=3") == 1
    out, error = capsys.readouterr()
    rows = [json.loads(line) for line in (tmp_path / "c.jsonl.batches").read_text().splitlines()]
    made = [chat for row in rows[1:] for chat in row["chats"]]
    questions = [chat[0]["content"] for chat in made]
    assert 2 <= len(set(questions)) == len(questions) <= 26
    assert sum(row["begun"] for row in rows[1:]) == 120
    dropped = sum(sum(row["dropped"].values()) for row in rows[1:])
    assert dropped == 120 - len(made)
    assert f"only {len(made)} of 40 conversations could be made of 120 begun" in error
    assert f"take those with count={len(made)}" in error
    assert "question that was there before" in error
    assert "empty" in error
    assert not (tmp_path / "c.jsonl").exists()
    assert f"120 begun, {dropped} dropped" in out
    assert ic(*command, *short, f"count={len(made)}") == 0
    assert chats(tmp_path / "c.jsonl") == made


def test_unfinished_turns_are_dropped(ic: Run, writer: Path, capsys: Capture) -> None:
    """A model that never ends a turn makes nothing of all it may begin."""
    letters(llama(), 0.0).save_pretrained(writer)
    command = ("make_chats", f"checkpoint={writer}", "output=c.jsonl", "count=3", *DRAWN)
    assert ic(*command, "most_attempts=2") == 1
    error = capsys.readouterr().err
    assert "only 0 of 3 conversations could be made of 6 begun" in error
    assert "6 unfinished question; raise most_attempts\n" in error


def test_the_reader_of_sft_takes_the_file(ic: Run, writer: Path, tmp_path: Path) -> None:
    command = ("make_chats", f"checkpoint={writer}", "output=c.jsonl", "count=5", *DRAWN)
    assert ic(*command) == 0
    data = SFTDataOptions(train_files=[str(tmp_path / "c.jsonl")], tokens_per_batch=4096)
    read = SFTDataModule(data, ByteTokenizer()).examples("train_files")
    assert len(read) == 5
    for conversation, chat in zip(read, chats(tmp_path / "c.jsonl"), strict=True):
        targets = conversation.tokens[conversation.is_target].tolist()
        assert ByteTokenizer().decode(targets) == chat[1]["content"] + "<|eos|>"


def test_refusals_come_before_the_weights(
    ic: Run, writer: Path, tmp_path: Path, capsys: Capture
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(writer, bare)
    for file in bare.iterdir():
        if file.name not in ("config.json", "generation_config.json"):
            file.unlink()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level_bpe(), eos_token="<|end|>")
    tokenizer.save_pretrained(bare)
    made = ("output=c.jsonl", *OPTIONS)
    assert ic("make_chats", f"checkpoint={bare}", *made) == 2
    assert "its tokenizer has no chat template" in capsys.readouterr().err.splitlines()[-1]
    (writer / "model.safetensors").unlink()
    assert ic("make_chats", f"checkpoint={writer}", *made, "turns=40") == 2
    assert "come to 1120 tokens" in capsys.readouterr().err.splitlines()[-1]
    assert ic("make_chats", "checkpoint=nowhere", *made) == 2
    assert not list(tmp_path.glob("c.jsonl*"))


def test_a_system_message_counts_by_its_tokens(
    ic: Run, writer: Path, tmp_path: Path, capsys: Capture
) -> None:
    """The byte tokenizer has a token for each of two bytes of these letters."""
    most = ("turns=1", "max_question_tokens=120", "max_answer_tokens=120", "accelerator=cpu")
    command = ("make_chats", f"checkpoint={writer}", "output=c.jsonl", *most)
    (writer / "model.safetensors").unlink()
    for times, said in ((200, "the model has 512 positions"), (100, "model.safetensors")):
        assert ic(*command, f"system={'ä' * times}") == 2
        assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("text", "repeats"),
    [
        ("no no no no no", True),
        ("abcabcabcab", False),  # three times and a part
        ("abcabcabcabca", True),
        ("I do not know. I do not know.", False),
        ("Well, no no no no no", False),
        ("", False),
    ],
)
def test_nothing_but_repetition(text: str, repeats: bool) -> None:
    assert only_repeats(text) == repeats


def test_questions_are_compared_by_their_words() -> None:
    assert normalised(" What's  UP,\nDoc? ") == normalised("what s up doc") == "what s up doc"
    assert normalised("?! ...") == ""
    assert normalised("Größe") != normalised("Grösse2")


def test_bounds() -> None:
    for name in ("count", "turns", "batch_size", "most_attempts"):
        check_bounds(MakeChatsOptions, "", name, [1], [0])
    check_bounds(MakeChatsOptions, "", "max_question_tokens", [1], [0])
    check_bounds(MakeChatsOptions, "", "max_answer_tokens", [1], [0])
    check_bounds(MakeChatsOptions, "", "question_temperature", [1e-9, 2], [0, 2.1])
    check_bounds(MakeChatsOptions, "", "answer_temperature", [0, 2], [-0.1, 2.1])
    check_bounds(MakeChatsOptions, "", "question_top_p", [1e-9, 1], [0, 1.1])
    check_bounds(MakeChatsOptions, "", "seed", [0], [-1])
    with pytest.raises(ValueError, match=r"must end in \.jsonl"):
        MakeChatsOptions(output="c.json")

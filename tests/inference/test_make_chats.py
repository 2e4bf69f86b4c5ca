"""Conversations that a model writes by itself: what is asked of it, what is kept, and going on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from ic.datamodules.options import SFTDataOptions
from ic.datamodules.sft import SFTDataModule
from ic.inference.chats.options import MakeChatsOptions
from ic.inference.chats.record import ChatRecord
from ic.inference.chats.user_turns import UserTurns
from ic.inference.chats.writer import ChatWriter, normalised, only_repeats
from ic.inference.loading import Loaded
from ic.model import MLAForCausalLM
from ic.model.byte_tokenizer import ByteTokenizer
from tests.bounds import check_bounds
from tests.checkpoint.gguf_files import byte_level_bpe
from tests.conftest import randomize

Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]
EOS, END = 257, 262
OPTIONS = ("max_question_tokens=12", "max_answer_tokens=16", "batch_size=3", "accelerator=cpu")
DRAWN = ("answer_temperature=1.0", *OPTIONS)


@torch.no_grad()
def letters(model: Any, ends: float) -> Any:
    """A random model that writes small letters, and now and then one of the two ends of turns.

    Args:
        ends: scale of the rows of the head that end a turn.
    """
    randomize(model.eval())
    rows = model.lm_head.weight
    kept, end_rows = rows[97:123].clone(), rows[[EOS, END]].clone()
    rows.zero_()
    rows[97:123] = kept * 3
    rows[[EOS, END]] = end_rows * ends
    return model


def llama() -> LlamaForCausalLM:
    torch.manual_seed(2)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    special: dict[str, Any] = {"pad_token_id": 258, "bos_token_id": 256, "eos_token_id": EOS}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=320, max_position_embeddings=512, **sizes, **heads, **special)
    )


@pytest.fixture
def writer(tmp_path: Path) -> Path:
    letters(llama(), 3.0).save_pretrained(tmp_path / "writer")
    ByteTokenizer().save_pretrained(tmp_path / "writer")
    return tmp_path / "writer"


def chats(file: Path) -> list[list[dict[str, str]]]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(list(row) == ["messages"] for row in rows)
    return [row["messages"] for row in rows]


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


def test_an_interrupted_run_goes_on_to_the_same_file(
    ic: Run, writer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    command = ("make_chats", f"checkpoint={writer}", "count=10", *DRAWN)
    assert ic(*command, "output=whole.jsonl") == 0
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert len(whole.splitlines()) == 10
    batch = ChatWriter.batch
    numbers: list[int] = []

    def interrupted(self: ChatWriter, number: int, *rest: Any) -> Any:
        numbers.append(number)
        if numbers == [0, 1, 2]:
            raise KeyboardInterrupt
        return batch(self, number, *rest)

    monkeypatch.setattr(ChatWriter, "batch", interrupted)
    assert ic(*command, "output=part.jsonl") == 130
    assert not (tmp_path / "part.jsonl").exists()
    with (tmp_path / "part.jsonl.batches").open("a") as lines:
        lines.write('{"batch": 2, "chats": [[{"ro')  # killed while it wrote
    assert ic(*command, "output=part.jsonl") == 0
    assert numbers[:4] == [0, 1, 2, 2]
    assert (tmp_path / "part.jsonl").read_bytes() == whole
    read = (tmp_path / "part.jsonl.batches").read_bytes()
    assert read == (tmp_path / "whole.jsonl.batches").read_bytes()
    monkeypatch.undo()
    capsys.readouterr()


def test_a_run_that_was_killed_within_its_first_batch_goes_on(
    ic: Run, writer: Path, tmp_path: Path
) -> None:
    command = ("make_chats", f"checkpoint={writer}", "count=3", *DRAWN)
    assert ic(*command, "output=whole.jsonl") == 0
    whole = (tmp_path / "whole.jsonl.batches").read_bytes()
    settings = whole.index(b"\n") + 1
    for cut in (settings // 2, settings - 1, settings, settings + 20):
        (tmp_path / "part.jsonl.batches").write_bytes(whole[:cut])
        (tmp_path / "part.jsonl").unlink(missing_ok=True)
        for _ in range(2):
            assert ic(*command, "output=part.jsonl") == 0
        assert (tmp_path / "part.jsonl.batches").read_bytes() == whole


def test_a_complete_file_is_kept_and_may_be_lengthened(
    ic: Run, writer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ("make_chats", f"checkpoint={writer}", "output=c.jsonl", *DRAWN)
    assert ic(*command, "count=4") == 0
    four = chats(tmp_path / "c.jsonl")
    capsys.readouterr()
    assert ic(*command, "count=4") == 0
    assert "4 conversations, 4 were there: c.jsonl" in capsys.readouterr().out
    assert chats(tmp_path / "c.jsonl") == four
    assert ic(*command, "count=8") == 0
    assert chats(tmp_path / "c.jsonl")[:4] == four
    assert len(chats(tmp_path / "c.jsonl")) == 8
    for more, said in (
        (["count=2"], "c.jsonl holds 8 conversations, more than count=2"),
        (["count=8", "seed=1", "turns=2"], "turns=1 (now 2), seed=0 (now 1)"),
    ):
        assert ic(*command, *more) == 2
        assert said in capsys.readouterr().err
    kept = (tmp_path / "c.jsonl").read_text().splitlines()
    (tmp_path / "c.jsonl").write_text("\n".join([*kept[:-1], '{"messages": []}']) + "\n")
    assert ic(*command, "count=8") == 2
    assert "c.jsonl was changed after it was made" in capsys.readouterr().err
    (tmp_path / "c.jsonl.batches").unlink()
    assert ic(*command, "count=8") == 2
    assert "no c.jsonl.batches beside it" in capsys.readouterr().err
    assert json.loads((tmp_path / "c.jsonl").read_text().splitlines()[-1]) == {"messages": []}


def test_how_many_are_asked_for_changes_none_of_them(ic: Run, writer: Path, tmp_path: Path) -> None:
    """A file of one, lengthened, is the file of all."""
    command = ("make_chats", f"checkpoint={writer}", *DRAWN)
    assert ic(*command, "output=whole.jsonl", "count=7") == 0
    for count in (1, 7):
        assert ic(*command, "output=part.jsonl", f"count={count}") == 0
        assert len(chats(tmp_path / "part.jsonl")) == count
    assert (tmp_path / "part.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_other_weights_or_another_tokenizer_at_the_same_path_are_refused(
    ic: Run, writer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Before PyTorch is loaded; a copy of the same weights goes on."""
    ByteTokenizer().save_pretrained(tmp_path / "tokenizer")
    command = ("make_chats", f"checkpoint={writer}", "output=c.jsonl", *DRAWN)
    assert ic(*command, "count=2", "tokenizer=tokenizer") == 0
    shutil.copytree(writer, tmp_path / "copy")
    shutil.rmtree(writer)
    shutil.copytree(tmp_path / "copy", writer, copy_function=shutil.copyfile)
    again = (*command, "count=4", f"tokenizer={tmp_path}/copy/../tokenizer")
    assert ic(*again) == 0
    monkeypatch.setattr("ic.inference.chats.make.open_source", None)
    template = tmp_path / "tokenizer/chat_template.jinja"
    kept = template.read_text()
    template.write_text(kept + "{# other #}")
    capsys.readouterr()
    assert ic(*again) == 2
    assert "other settings: tokenizer_identity=" in capsys.readouterr().err.splitlines()[-1]
    template.write_text(kept)
    torch.manual_seed(7)
    letters(llama(), 2.0).save_pretrained(writer)
    assert ic(*again) == 2
    assert "other settings: identity=" in capsys.readouterr().err.splitlines()[-1]


def test_a_damaged_record_is_refused_by_its_line(
    ic: Run, writer: Path, tmp_path: Path, capsys: Capture
) -> None:
    command = ("make_chats", f"checkpoint={writer}", "output=c.jsonl", "count=3", *DRAWN)
    assert ic(*command) == 0
    record, output = tmp_path / "c.jsonl.batches", tmp_path / "c.jsonl"
    first, batch, *rest = record.read_text().splitlines()
    row = json.loads(batch)
    damaged = [
        (["[1]", batch], "c.jsonl.batches, line 1: holds no settings"),
        (['{"batch": 0}', batch], "c.jsonl.batches, line 1: holds no settings"),
        ([first, "[1]"], "c.jsonl.batches, line 2: holds no batch"),
        ([first, batch, first], "c.jsonl.batches, line 3: holds no batch"),
    ]
    for other in ({"chats": [[]]}, {"chats": [["a"]]}, {"begun": None}, {"dropped": {"a": "b"}}):
        line = json.dumps({**row, **other})
        damaged.append(([first, line], "c.jsonl.batches, line 2: holds no batch"))
    for lines, said in damaged:
        record.write_text("\n".join(lines) + "\n")
        capsys.readouterr()
        assert ic(*command) == 2
        assert said in capsys.readouterr().err.splitlines()[-1]
    record.write_text("\n".join([first, batch, *rest]) + "\n")
    output.write_text("3\n")
    assert ic(*command) == 2
    assert "c.jsonl, line 1: holds no conversation" in capsys.readouterr().err.splitlines()[-1]


def test_an_output_that_cannot_be_written_is_refused_at_once(
    ic: Run, writer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("ic.inference.chats.make.open_source", None)  # nothing is loaded
    (tmp_path / "file").write_text("")
    (tmp_path / "a.jsonl").mkdir()
    (tmp_path / "b.jsonl.batches").mkdir()
    for output in ("file/c.jsonl", "a.jsonl", "b.jsonl", "/proc/c.jsonl"):
        assert ic("make_chats", f"checkpoint={writer}", f"output={output}", *OPTIONS) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert f"output={output}: cannot be written" in last
    options = MakeChatsOptions(checkpoint=str(writer), output=str(tmp_path / "new/deep/c.jsonl"))
    ChatRecord(options)
    assert list((tmp_path / "new/deep").iterdir()) == []


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
    for letters, said in ((200, "the model has 512 positions"), (100, "model.safetensors")):
        assert ic(*command, f"system={'ä' * letters}") == 2
        assert said in capsys.readouterr().err.splitlines()[-1]


_TURNS = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{- 'USER' -}}"
    "{%- else -%}{{- 'ASSISTANT' -}}{%- generation -%}{{- message['content'] + eos_token -}}"
    "{%- endgeneration -%}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'ASSISTANT' -}}{%- endif -%}"
)


def written(user: str, assistant: str) -> ByteTokenizer:
    """A tokenizer whose template writes a user's message so, and this before the assistant's."""
    tokenizer = ByteTokenizer()
    template = _TURNS.replace("'USER'", user).replace("'ASSISTANT'", assistant)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("user", "assistant", "end", "end_text", "begin"),
    [
        ("'User: ' + message['content'] + '\n\n'", "'Assistant: '", None, "Assistant:", "User:"),
        ("'<|user|>' + message['content']", "'<|assistant|>'", 261, "", "<|user|>"),
        ("'[INST] ' + message['content'] + ' [/INST]'", "''", None, "[/INST]", "[INST]"),
        (
            "'<|user|>\n' + message['content'] + '<|end|>\n'",
            "'<|assistant|>\n'",
            END,
            "",
            "<|user|>\n",
        ),
    ],
    ids=["DeepSeek-V2", "DeepSeek-V3", "Mistral", "ChatML"],
)
def test_where_a_users_turn_ends(
    user: str, assistant: str, end: int | None, end_text: str, begin: str
) -> None:
    tokenizer = written(user, assistant)
    turns = UserTurns.of(tokenizer, MakeChatsOptions())
    assert (turns.end, turns.end_text) == (end, end_text)
    assert tokenizer.decode(turns.prompt([])) == begin


def test_a_template_that_does_not_end_a_users_turn_is_refused() -> None:
    tokenizer = written("'> ' + message['content'] + '\n'", "''")
    with pytest.raises(ValueError, match="writes nothing between what a user says and the answer"):
        UserTurns.of(tokenizer, MakeChatsOptions())


def test_a_template_without_a_token_at_the_end_of_a_users_turn() -> None:
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = (
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'user' -%}{{- '[INST] ' + message['content'] + ' [/INST]' -}}"
        "{%- else -%}{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}"
        "{%- endif -%}{%- endfor -%}"
    )
    turns = UserTurns.of(tokenizer, MakeChatsOptions())
    assert (turns.end, turns.end_text) == (None, "[/INST]")
    assert tokenizer.decode(turns.prompt([])) == "[INST]"
    tokenizer.chat_template = str(tokenizer.chat_template).replace(
        "'[INST] ' +", "message['content'] +"
    )
    with pytest.raises(ValueError, match="writes what a user says 2 times"):
        UserTurns.of(tokenizer, MakeChatsOptions())


def test_the_record_of_a_batch_that_was_never_written_binds_nothing(
    writer: Path, tmp_path: Path
) -> None:
    output = str(tmp_path / "c.jsonl")
    ChatRecord(MakeChatsOptions(checkpoint=str(writer), output=output, seed=1))
    again = ChatRecord(MakeChatsOptions(checkpoint=str(writer), output=output, seed=2))
    assert (again.begun, again.num_batches, again.is_complete) == (0, 0, False)


@pytest.mark.parametrize(
    ("ids", "found"),
    [
        ([97, 98, END], ("ab", "")),
        ([97, 259, 98, END], ("a<|system|>b", "question with marks of the template in it")),
        ([97, 264, 98, END], ("a<|added|>b", "question with marks of the template in it")),
        ([*b"a<|added|>", END], ("a<|added|>", "question with marks of the template in it")),
        ([*b"a<|eos|>b", END], ("a<|eos|>b", "question with marks of the template in it")),
        ([97, 263, 98, END], ("a\n\nb", "")),
        ([97, 98], ("ab", "unfinished question")),
    ],
)
def test_marks_in_a_turn(writer: Path, ids: list[int], found: tuple[str, str]) -> None:
    """Those of the template, whichever way they are written; not ends of lines that were added."""
    tokenizer = ByteTokenizer()
    tokenizer.add_tokens(["\n\n", "<|added|>"])
    assert not {263, 264}.intersection(tokenizer.all_special_ids)
    options = MakeChatsOptions()
    loaded = Loaded(llama(), tokenizer, "tiny", None, writer)
    turns = UserTurns.of(tokenizer, options)
    made = ChatWriter(loaded, turns, options, lambda who, number, limit: None)
    assert made._text(ids, "question") == found


def test_what_follows_a_textual_end_is_not_looked_at(writer: Path) -> None:
    tokenizer = written("'User: ' + message['content'] + '\n\n'", "'Assistant: '")
    options = MakeChatsOptions()
    loaded = Loaded(llama(), tokenizer, "tiny", None, writer)
    turns = UserTurns.of(tokenizer, options)
    made = ChatWriter(loaded, turns, options, lambda who, number, limit: None)
    assert made._text([*b" Why?\n\nAssistant: B", 259], "question") == ("Why?", "")


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

"""A tokenizer of one's own: trained, saved, used for training, for conversations and for replies."""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from ic.cli import main
from ic.datamodules.chat_templates import TEMPLATES, set_chat_template, stop_tokens
from ic.datamodules.conversations import apply_template
from ic.datamodules.make_tokenizer_options import MakeTokenizerOptions
from ic.datamodules.options import CHAT_TEMPLATES
from ic.datamodules.tokenizers import build_tokenizer, vocabulary_size
from ic.model.byte_tokenizer import VOCAB_SIZE, ByteTokenizer

Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Größe?"},
    {"role": "assistant", "content": "3 m."},
]
# By hand, from the description of ChatML.
CHATML = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nGröße?<|im_end|>\n"
    "<|im_start|>assistant\n3 m.<|im_end|>\n"
)


def call(*args: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(list(args))
    return int(exit_.value.code or 0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    rows = [json.dumps({"text": f"The sea is deep on day {i}, the sky blue. é"}) for i in range(99)]
    (folder / "corpus.jsonl.xz").write_bytes(lzma.compress("\n".join(rows).encode()))
    files = f"files=[{folder}/corpus.jsonl.xz]"
    options = ("vocab_size=300", "chat_template=chatml")
    assert call("make_tokenizer", files, f"output={folder}/out", *options) == 0
    return folder / "out"


def test_the_folder_loads_by_itself(made: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made)
    # 256 bytes, bos, eos, pad, two of the template, and what was learnt.
    assert 261 < len(tokenizer) <= 300
    for text in ("The sea is deep", "größe 東京 🙂\n\n 123", "<|x|>"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert len(tokenizer("The sea is deep")["input_ids"]) < len("The sea is deep") / 2
    digits = tokenizer("4217")["input_ids"]
    assert len(digits) == 4  # each by itself
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|bos|>", "<|eos|>")
    assert tokenizer.pad_token == "<|pad|>"
    assert len(tokenizer("<|im_start|>")["input_ids"]) == 1


@pytest.mark.parametrize("source", ["bytes", "trained"])
def test_chatml(made: Path, source: str) -> None:
    tokenizer = build_tokenizer("bytes" if source == "bytes" else str(made), "chatml")
    ids, mask = apply_template(tokenizer, CHAT, "row 1", mask=True)
    assert tokenizer.decode(ids) == CHATML
    targets = [token for token, is_target in zip(ids, mask, strict=True) if is_target]
    assert tokenizer.decode(targets) == "3 m.<|im_end|>"
    prompt, _ = apply_template(tokenizer, CHAT[:2], "row 1", prompt=True)
    assert tokenizer.decode(prompt) == CHATML[: CHATML.index("3 m.")]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop_tokens(tokenizer) == [tokenizer.eos_token_id, end]
    assert ids.count(end) == 3


def test_templates_are_saved_with_the_tokenizer(made: Path, tmp_path: Path) -> None:
    for place, tokenizer in enumerate((ByteTokenizer(), build_tokenizer(str(made)))):
        for name, template in TEMPLATES.items():
            set_chat_template(tokenizer, name)
            folder = tmp_path / f"{place}-{name}"
            tokenizer.save_pretrained(folder)
            again = build_tokenizer(str(folder))
            assert again.chat_template == template.text
            assert len(again) == len(tokenizer)
            assert apply_template(again, CHAT, "")[0] == apply_template(tokenizer, CHAT, "")[0]
    assert set(CHAT_TEMPLATES) == set(TEMPLATES)
    chatml = build_tokenizer("bytes", "chatml")
    assert vocabulary_size(chatml) == VOCAB_SIZE  # checkpoints of the byte tokenizer go on fitting
    assert stop_tokens(ByteTokenizer()) == [ByteTokenizer().eos_token_id]


def test_a_template_of_one_s_own(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    )
    tokenizer = build_tokenizer("bytes", str(tmp_path / "mine.jinja"))
    ids, _ = apply_template(tokenizer, CHAT[1:], "")
    assert tokenizer.decode(ids) == "user: Größe?\nassistant: 3 m.\n"
    with pytest.raises(ValueError, match="chat_template='none': choose from ic, chatml, or name"):
        build_tokenizer("bytes", "none")


def test_from_the_tokenizer_to_a_reply(
    made: Path, ic: Run, capsys: Capture, tmp_path: Path
) -> None:
    """SFT with a tokenizer and a template that were chosen, then a chat with the checkpoint."""
    chats = [json.dumps({"messages": CHAT}) for _ in range(4)]
    (tmp_path / "chats.jsonl").write_text("\n".join(chats))
    tiny = ("model=mla_tiny", "model.num_hidden_layers=1", "model.hidden_size=32")
    size = ("data.context_length=128", "data.tokens_per_batch=128", "trainer.max_steps=1")
    files = ("data=sft", "data.train_files=[chats.jsonl]", "trainer.accelerator=cpu")
    chosen = (f"tokenizer={made}", "chat_template=ic", "callbacks.memory=null")
    assert ic("fit", *tiny, *size, *files, *chosen, "trainer.devices=1") == 0
    last = tmp_path / "runs/run/default/checkpoints/last"
    assert (last / "chat_template.jinja").read_text() == TEMPLATES["ic"].text
    capsys.readouterr()
    ask = ("generate", f"checkpoint={last}", "prompt=Größe?", "max_new_tokens=4")
    assert ic(*ask, "chat=true", "system=Be brief.") == 0
    replied = capsys.readouterr().out
    assert ic(*ask) == 0
    continued = capsys.readouterr().out
    tokenizer = build_tokenizer(str(last))
    rendered = "<|system|>Be brief.<|end|><|user|>Größe?<|end|><|assistant|>"
    prompt, _ = apply_template(tokenizer, CHAT[:2], "", prompt=True)
    assert tokenizer.decode(prompt) == rendered
    assert ic("generate", f"checkpoint={last}", f"prompt={rendered}", "max_new_tokens=4") == 0
    assert capsys.readouterr().out == replied != continued
    assert ic(*ask, "system=x") == 2
    assert "set chat=true" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": []}, "files is empty"),
        ({"vocab_size": 200}, "vocab_size=200: must be at least 263"),
        ({"format": "csv"}, "format='csv': choose from auto"),
        ({"min_frequency": 0}, "min_frequency=0"),
        ({"chat_template": "alpaca"}, "chat_template='alpaca': choose from ic, chatml"),
    ],
)
def test_refuses(tmp_path: Path, changes: dict, message: str) -> None:
    options = {"files": ["a.txt"], "output": str(tmp_path / "out"), **changes}
    with pytest.raises(ValueError, match=message):
        MakeTokenizerOptions(**options)


def test_another_folder_is_not_overwritten(made: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for overwrite in ("true", "false"):
        options = (f"output={tmp_path}", f"overwrite={overwrite}")
        assert call("make_tokenizer", f"files=[{tmp_path}/notes.txt]", *options) == 2
        assert "exists and holds no tokenizer" in capsys.readouterr().err
    assert call("make_tokenizer", f"files=[{tmp_path}/notes.txt]", f"output={made}") == 2
    assert "replace the tokenizer in it with overwrite=true" in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "blank.txt").write_text("\n\n")

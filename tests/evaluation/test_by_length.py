"""Suites of tasks by length: framing of prompts, losses by piece, tables and options."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from ic.evaluation.by_length import mean_over_tasks
from ic.evaluation.by_length_figure import draw_by_length
from ic.evaluation.framing import frame_prompt
from ic.evaluation.options import SuiteOptions, TaskCell
from ic.evaluation.statistics import Accuracy
from ic.inference import greedy
from ic.inference.greedy import GreedyDecoder
from ic.model import MLAForCausalLM
from ic.model.byte_tokenizer import ByteTokenizer


class _Options(SuiteOptions):
    suite = "example"


def test_frames_are_what_the_template_renders() -> None:
    tokenizer = ByteTokenizer()
    frame = frame_prompt(tokenizer, "chat", " Who?", "It is")
    turn = [{"role": "user", "content": "A long text. Who?"}]
    whole = tokenizer.apply_chat_template(turn, tokenize=True, add_generation_prompt=True)
    text = np.frombuffer(b"A long text.", dtype=np.uint8)
    ids = np.concatenate([frame.before, text, frame.after])
    assert ids.tolist() == [*whole["input_ids"], *b"It is"]
    plain = frame_prompt(tokenizer, "plain", " Who?", " It is")
    assert (plain.before.tolist(), bytes(plain.after.tolist())) == ([], b" Who? It is")


def test_a_chat_needs_a_template() -> None:
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"prompt=chat: the tokenizer has no chat template"):
        frame_prompt(tokenizer, "chat")


@pytest.mark.parametrize("pieces", [1, 7, 1000])
def test_losses_by_piece_are_those_of_the_whole(
    pieces: int, monkeypatch: pytest.MonkeyPatch, make_model: Callable[..., MLAForCausalLM]
) -> None:
    model = make_model().eval()
    ids_BT = torch.randint(0, model.config.vocab_size, (2, 40))
    monkeypatch.setattr(greedy, "LOGITS_BYTES", pieces * 2 * model.config.vocab_size * 4)
    found = GreedyDecoder(model, 1000).losses(ids_BT)
    with torch.no_grad():
        logits = model(ids_BT).logits.float().log_softmax(-1)
    expected = -logits[:, :-1].gather(-1, ids_BT[:, 1:, None])[..., 0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_cells_and_their_counts() -> None:
    options = _Options(lengths=[512, 256], samples=5, samples_by_length={512: 2, 99: 1})
    assert list(options.task_cells(["a", "b"])) == [
        TaskCell("a", 256, 5),
        TaskCell("b", 256, 5),
        TaskCell("a", 512, 2),
        TaskCell("b", 512, 2),
    ]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"lengths": []}, r"suite\.example\.lengths=\[\]: at least one, each at least 128"),
        ({"lengths": [256, 256]}, r"suite\.example\.lengths"),
        ({"samples": 0}, r"suite\.example\.samples=0: must be at least 1"),
        ({"prompt": "x"}, r"suite\.example\.prompt=x: choose chat or plain"),
        ({"samples_by_length": {256: 0}}, r"suite\.example\.samples_by_length"),
    ],
)
def test_options_that_make_no_sense(given: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        _Options(**given)  # type: ignore[arg-type]


def test_each_task_counts_once_in_the_mean() -> None:
    answers = {("a", 8): Accuracy(1, 1), ("b", 8): Accuracy(0, 9), ("b", 16): Accuracy(9, 9)}
    assert mean_over_tasks(answers, 8) == 0.5


def test_picture(tmp_path: Path) -> None:
    answers = {("a", 4096): Accuracy(9, 10), ("a", 8192): Accuracy(0, 10)}
    draw_by_length(answers, tmp_path / "x.png", title="a model", trained_length=4096)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_text_is_light_on_dark_cells_alone(figures: list[Figure], tmp_path: Path) -> None:
    answers = {("a", 512 * 2**n): Accuracy(correct, 10) for n, correct in enumerate((0, 5, 6, 10))}
    draw_by_length(answers, tmp_path / "a.png", title="t")
    colors = [text.get_color() for text in figures[0].axes[0].texts]
    assert colors[0] == colors[1] != colors[2] == colors[3]
    assert sum(to_rgb(colors[0])) > sum(to_rgb(colors[2]))

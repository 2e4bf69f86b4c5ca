"""A conversation of an exact number of tokens: requests, answers, and a question at its end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from ic.evaluation.framing import encode, frame_prompt

_CUT = "\x00"  # stands for the piece that is cut, while the rest is rendered


@dataclass(frozen=True)
class Turn:
    """A request of the user's and the assistant's answer."""

    request: str
    answer: str


def transcript(turns: list[Turn], question: str) -> str:
    """A conversation as plain text that goes on with the assistant's answer."""
    told = "".join(f"User: {turn.request}\nAssistant: {turn.answer}\n\n" for turn in turns)
    return f"{told}User: {question}\nAssistant:"


def end_of_answer(text: str) -> str:
    """What a model answers in a transcript, without the turns that it makes up behind it."""
    return text.split("\nUser:")[0].rstrip("\n").removeprefix(" ")


def render(
    tokenizer: PreTrainedTokenizerBase, prompt: str, turns: list[Turn], question: str
) -> str:
    """A conversation up to where the assistant answers: a transcript, or by the chat template."""
    if prompt == "plain":
        return transcript(turns, question)
    messages = [
        {"role": role, "content": content}
        for turn in turns
        for role, content in (("user", turn.request), ("assistant", turn.answer))
    ]
    messages.append({"role": "user", "content": question})
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


class Conversation:
    """Turns in a random order that does not change as others come and go.

    Args:
        prompt: `plain` or `chat`.
        cut: the request whose answer is cut to give the conversation its length.

    Raises:
        ValueError: `chat`, and the tokenizer has no chat template.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: str, question: str, cut: str
    ) -> None:
        self._tokenizer, self._prompt, self._question = tokenizer, prompt, question
        frame = frame_prompt(tokenizer, prompt)
        self._first = frame.before if prompt == "plain" else np.zeros(0, dtype=np.int64)
        self._cut = Turn(cut, _CUT)
        self._turns: list[tuple[float, Turn]] = []

    def add(self, place: float, turn: Turn) -> None:
        """Add a turn before all whose place is larger; the cut one stands at 0.5."""
        self._turns.append((place, turn))

    def drop(self) -> None:
        """Take the last turn that was added away again."""
        self._turns.pop()

    def frame(self) -> tuple[np.ndarray, np.ndarray]:
        """Token ids before and after the answer that is cut."""
        placed = sorted([*self._turns, (0.5, self._cut)], key=lambda each: each[0])
        turns = [turn for _, turn in placed]
        text = render(self._tokenizer, self._prompt, turns, self._question)
        before, _, after = text.partition(_CUT)
        return np.concatenate([self._first, self._encode(before)]), self._encode(after)

    def _encode(self, text: str) -> np.ndarray:
        if self._prompt == "plain":
            return encode(self._tokenizer, text)
        # With the template's own special tokens as tokens.
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return np.asarray(ids, dtype=np.int64)

"""An aligned model writes both sides of conversations (Magpie, arXiv 2406.08464).

Such a model has learnt what stands behind the beginning of a user's turn, too: given its own chat
template up to there it writes what users wrote to it in training. Given that, it answers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from ic.datamodules.conversations import apply_template
from ic.errors import RunFailedError
from ic.inference.chats.options import MakeChatsOptions
from ic.inference.chats.record import Messages
from ic.inference.chats.user_turns import UserTurns, check_chat, first_messages, marks_of
from ic.inference.loading import Loaded
from ic.inference.model_facts import end_tokens

# An answer is nothing but repetition if it is one piece so many times.
_REPETITIONS = 4
_WORD = re.compile(r"\w+")
# Told of each token: whose turn it is, how many are written, and how many there may be.
OnToken = Callable[[str, int, int], None]


class ChatWriter:
    """Writes conversations batch by batch.

    Args:
        loaded: the model, of ours or of `transformers`; its generation configuration is replaced,
            so that no penalty or filter of it changes what is drawn.
        turns: the user's turns in its template.
        on_token: for a progress bar.
    """

    def __init__(
        self, loaded: Loaded, turns: UserTurns, options: MakeChatsOptions, on_token: OnToken
    ) -> None:
        self._model, self._tokenizer = loaded.model, loaded.tokenizer
        self._turns, self._options, self._on_token = turns, options, on_token
        ends = end_tokens(loaded.model, loaded.tokenizer)
        if turns.end is not None and turns.end not in ends:
            ends.append(turns.end)
        self._ends = ends
        self._marks = marks_of(loaded.tokenizer)
        self._model.generation_config = GenerationConfig()

    def batch(
        self, number: int, num_rows: int, known: set[str]
    ) -> tuple[list[Messages], Counter[str]]:
        """Conversations, fewer than `num_rows` where some are dropped, and why those were.

        The draws depend on the seed, the number and `num_rows` alone.

        Args:
            known: first questions that there are already, as `normalised` has them.

        Raises:
            RunFailedError: the GPU's memory does not suffice.
        """
        options = self._options
        seeds = np.random.SeedSequence([options.seed, number]).generate_state(1, np.uint64)
        torch.manual_seed(int(seeds[0]) >> 1)
        chats = [first_messages(options) for _ in range(num_rows)]
        dropped: Counter[str] = Counter()
        try:
            for turn in range(options.turns):
                chats = self._ask(chats, known if turn == 0 else None, dropped)
                chats = self._answer(chats, dropped)
        except torch.OutOfMemoryError as error:
            raise RunFailedError(
                f"not enough GPU memory for batch_size={options.batch_size}: lower it"
            ) from error
        return chats, dropped

    def _ask(
        self, chats: list[Messages], known: set[str] | None, dropped: Counter[str]
    ) -> list[Messages]:
        """Conversations with a further turn of the user.

        Args:
            known: questions of other conversations; None compares within each one alone.
        """
        options = self._options
        texts = self._write(
            "question",
            [self._turns.prompt(chat) for chat in chats],
            options.max_question_tokens,
            options.question_temperature,
            options.question_top_p,
        )
        seen = None if known is None else set(known)
        kept = []
        for chat, (text, why) in zip(chats, texts, strict=True):
            question = normalised(text)
            others = seen if seen is not None else {normalised(each["content"]) for each in chat}
            if not why and not question:
                why = "empty question"
            if not why and question in others:
                why = "question that was there before"
            if why:
                dropped[why] += 1
                continue
            if seen is not None:
                seen.add(question)
            kept.append([*chat, {"role": "user", "content": text}])
        return kept

    def _answer(self, chats: list[Messages], dropped: Counter[str]) -> list[Messages]:
        """Conversations with the answer to the user's last turn."""
        options = self._options
        texts = self._write(
            "answer",
            [apply_template(self._tokenizer, chat, "a chat", prompt=True)[0] for chat in chats],
            options.max_answer_tokens,
            options.answer_temperature,
            1.0,
        )
        kept = []
        for chat, (text, why) in zip(chats, texts, strict=True):
            answered = [*chat, {"role": "assistant", "content": text}]
            if not why and not text:
                why = "empty answer"
            if not why and only_repeats(text):
                why = "answer that only repeats itself"
            if not why and not self._is_read(answered):
                why = "conversation that data=sft refuses"
            if why:
                dropped[why] += 1
            else:
                kept.append(answered)
        return kept

    def _is_read(self, chat: Messages) -> bool:
        try:
            return check_chat(self._tokenizer, chat, "a chat") > 0
        except ValueError:
            return False

    def _write(
        self, who: str, prompts: list[list[int]], most: int, temperature: float, top_p: float
    ) -> list[tuple[str, str]]:
        """What follows each prompt, and why it is of no use; empty if it is."""
        if not prompts:
            return []
        # Rows end alike, so that shorter ones are padded on the left; hidden, it changes nothing.
        longest = max(map(len, prompts))
        pad = self._ends[0] if self._ends else 0
        ids_BT = torch.full((len(prompts), longest), pad)
        mask_BT = torch.zeros_like(ids_BT)
        for row, prompt in enumerate(prompts):
            ids_BT[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask_BT[row, longest - len(prompt) :] = 1
        drawn: dict[str, Any] = {"do_sample": False}
        if temperature:
            drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        device = self._model.device
        out_BT: Tensor = self._model.generate(
            ids_BT.to(device),
            attention_mask=mask_BT.to(device),
            generation_config=GenerationConfig(
                max_new_tokens=most, eos_token_id=self._ends or None, pad_token_id=pad, **drawn
            ),
            stopping_criteria=StoppingCriteriaList([_Told(self._on_token, who, longest, most)]),
        )
        return [self._text(row, who) for row in out_BT[:, longest:].tolist()]

    def _text(self, ids: list[int], who: str) -> tuple[str, str]:
        """The text of a turn, and why it is of no use."""
        end = next((at for at, token in enumerate(ids) if token in self._ends), len(ids))
        finished = end < len(ids)
        text = str(self._tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False))
        written = ids[:end]
        if who == "question" and self._turns.end_text and self._turns.end_text in text:
            text, finished, written = text.partition(self._turns.end_text)[0], True, []
        text = text.strip()
        # Encoded again, too: a mark may be spelled in other tokens, and is one to whoever reads it.
        again = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        why = ""
        if self._marks.intersection([*written, *again]):
            why = f"{who} with marks of the template in it"
        elif not (finished or self._options.keep_unfinished):
            why = f"unfinished {who}"
        return text, why


class _Told(StoppingCriteria):
    """Tells of each token, and stops nothing."""

    def __init__(self, on_token: OnToken, who: str, prompt_tokens: int, most: int) -> None:
        self._told = on_token, who, prompt_tokens, most

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        on_token, who, prompt_tokens, most = self._told
        on_token(who, input_ids.shape[1] - prompt_tokens, most)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def normalised(question: str) -> str:
    """A question's words, for comparing; empty if there is none."""
    return " ".join(_WORD.findall(question.casefold()))


def only_repeats(text: str) -> bool:
    """Whether a text is one piece several times, the last perhaps cut short."""
    longest = len(text) // _REPETITIONS
    return any(text[size:] == text[:-size] for size in range(1, longest + 1))

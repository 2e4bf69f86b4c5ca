"""Where a user's turn begins and ends in a chat template."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ic.datamodules.options import SFTDataOptions
from ic.datamodules.sft import tokenize_conversation
from ic.inference.chats.options import MakeChatsOptions
from ic.inference.chats.record import Messages

# What no template writes; a letter at both ends, because templates may trim what a user says.
_MARK = "QxUserSaysHerexQ"
# Only the columns and what a conversation needs are looked at, not the lengths.
_SFT = SFTDataOptions()


@dataclass(frozen=True)
class UserTurns:
    """The turns of a user in the template of a tokenizer.

    Attributes:
        end: the token that ends a user's turn, which may be the one that begins the assistant's;
            None where the template writes text there.
        end_text: that text, else empty.
    """

    tokenizer: PreTrainedTokenizerBase
    end: int | None
    end_text: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, options: MakeChatsOptions) -> UserTurns:
        """Those of a tokenizer that `data=sft` can read such conversations with.

        Raises:
            ValueError: it has no chat template, or one in which a user cannot be told from what
                stands around it, or that `data=sft` refuses.
        """
        where = f"checkpoint={options.checkpoint}"
        if tokenizer.chat_template is None:
            raise ValueError(
                f"{where}: its tokenizer has no chat template, so that there is no turn of a user "
                "to begin with; name a model that was trained on conversations, or a tokenizer "
                "with its template by tokenizer=FOLDER"
            )
        chat = shortest_chat(options)
        check_chat(tokenizer, chat, where)
        parts = _around(tokenizer, chat[:-2])
        if len(parts) != 2:
            raise ValueError(
                f"{where}: the chat template writes what a user says {len(parts) - 1} times; once "
                "is needed"
            )
        behind = parts[1].strip()
        if not behind:
            raise ValueError(
                f"{where}: the chat template writes nothing between what a user says and the "
                "answer, so that nobody can tell where a user's turn ends; name a tokenizer with "
                "another template by tokenizer=FOLDER"
            )
        ids = tokenizer(behind, add_special_tokens=False)["input_ids"]
        if ids[0] in marks_of(tokenizer):
            return cls(tokenizer, int(ids[0]), "")
        return cls(tokenizer, None, behind)

    def prompt(self, messages: Messages) -> list[int]:
        """Token ids of a conversation, up to where the next turn of the user begins."""
        before = _around(self.tokenizer, messages)[0]
        # The first word of the turn brings its own blank in most vocabularies.
        before = before.rstrip(" ")
        return list(self.tokenizer(before, add_special_tokens=False)["input_ids"])


def marks_of(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that no text of a conversation holds: the special ones and those that were added.

    Blanks and ends of lines that were added to a vocabulary (Gemma's, GPT-NeoX's) are text.
    """
    added = tokenizer.get_added_vocab().items()
    marks = {index for token, index in added if token.replace("\u2581", " ").strip()}
    return marks | set(tokenizer.all_special_ids)


def first_messages(options: MakeChatsOptions) -> Messages:
    """What stands in front of the user's first turn."""
    return [] if options.system is None else [{"role": "system", "content": options.system}]


def shortest_chat(options: MakeChatsOptions) -> Messages:
    """A conversation of as many turns as are asked for, of a letter each."""
    pair = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    return first_messages(options) + pair * options.turns


def check_chat(tokenizer: PreTrainedTokenizerBase, chat: Messages, where: str) -> int:
    """The tokens of a conversation as `data=sft` reads it.

    Raises:
        ValueError: it refuses the conversation.
    """
    return len(tokenize_conversation(tokenizer, {"messages": chat}, where, _SFT))


def _around(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[str]:
    """What the template writes before and behind a user's words, up to where the answer begins."""
    asked = [*messages, {"role": "user", "content": _MARK}]
    rendered = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    return str(rendered).split(_MARK)

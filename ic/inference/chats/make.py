"""Conversations that an aligned model writes by itself -> a file for `data=sft`."""

from __future__ import annotations

import time
from collections import Counter

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from ic.errors import RunFailedError
from ic.inference.chats.options import MakeChatsOptions
from ic.inference.chats.pace import Pace
from ic.inference.chats.record import ChatRecord, Messages
from ic.inference.chats.user_turns import UserTurns, check_chat, shortest_chat
from ic.inference.chats.writer import ChatWriter, normalised
from ic.inference.loading import Opened, open_source

# Seconds between two lines where there is no terminal.
_EVERY_S = 30.0


def make_chats(options: MakeChatsOptions) -> int:
    """Write `options.count` conversations, those included that are there already -> 0.

    Raises:
        ValueError: a source that cannot be used, before the weights are loaded, or an output of
            other settings.
        RunFailedError: fewer could be made.
    """
    record = ChatRecord(options)
    console = Console(soft_wrap=True, highlight=False)
    there = min(len(record.chats), options.count)
    if not record.is_complete:
        opened = open_source(options)
        turns = UserTurns.of(opened.tokenizer, options)
        _check_positions(options, opened)
        started = time.monotonic()
        _fill(record, options, opened, turns, console)
        made = len(record.chats) - there
        took_s = time.monotonic() - started
        console.print(f"{made} conversations in {took_s:,.0f} s", markup=False)
    if record.begun:
        why = f": {_counted(record.dropped)}" if record.dropped else ""
        console.print(
            f"{record.begun} begun, {sum(record.dropped.values())} dropped{why}", markup=False
        )
    if not record.is_complete:
        _give_up(record, options)
    record.write()
    kept = f", {there} were there" if there else ""
    console.print(f"{options.count} conversations{kept}: {options.output}", markup=False)
    return 0


def _fill(
    record: ChatRecord,
    options: MakeChatsOptions,
    opened: Opened,
    turns: UserTurns,
    console: Console,
) -> None:
    """Write batches until there are enough, or too many were begun."""
    loaded = opened.load()
    most = options.most_attempts * options.count
    # rich's own column of the time left forgets what was done half a minute ago: the last batch.
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        pace = Pace(record, options.count)
        done = progress.add_task(str(pace), total=options.count, completed=len(record.chats))
        at_hand = progress.add_task("", total=None)

        said_s = time.monotonic()

        def on_token(who: str, number: int, limit: int) -> None:
            nonlocal said_s
            told = f"tokens of the {who}s, {limit} at most"
            progress.update(done, description=str(pace))
            progress.update(at_hand, description=told, completed=number, total=limit)
            if not console.is_terminal and time.monotonic() - said_s >= _EVERY_S:
                said_s = time.monotonic()
                console.print(f"{pace}; {number} {told}", markup=False)

        writer = ChatWriter(loaded, turns, options, on_token)
        known = {normalised(_first_question(chat)) for chat in record.chats}
        while not record.is_complete and record.begun < most:
            chats, dropped = writer.batch(record.num_batches, options.batch_size, known)
            known.update(normalised(_first_question(chat)) for chat in chats)
            record.add(chats, options.batch_size, dropped)
            pace.batch_done()
            completed = min(len(record.chats), options.count)
            progress.update(done, description=str(pace), completed=completed)


def _first_question(chat: Messages) -> str:
    return next(message["content"] for message in chat if message["role"] == "user")


def _give_up(record: ChatRecord, options: MakeChatsOptions) -> None:
    """Raises:
    RunFailedError: always.
    """
    made = len(record.chats)
    rest = f", or take those with count={made}" if made else ""
    raise RunFailedError(
        f"only {made} of {options.count} conversations could be made of {record.begun} begun "
        f"(most_attempts={options.most_attempts} for each): {_counted(record.dropped)}; raise "
        f"most_attempts{rest}"
    )


def _counted(dropped: Counter[str]) -> str:
    return ", ".join(f"{number} {why}" for why, number in dropped.most_common())


def _check_positions(options: MakeChatsOptions, opened: Opened) -> None:
    """Raises:
    ValueError: a conversation may become longer than the model has positions.
    """
    around = check_chat(opened.tokenizer, shortest_chat(options), "a chat")
    asked = options.turns * (options.max_question_tokens + options.max_answer_tokens)
    if around + asked > opened.positions:
        raise ValueError(
            f"turns={options.turns} of max_question_tokens={options.max_question_tokens} and "
            f"max_answer_tokens={options.max_answer_tokens} come to {asked} tokens, "
            f"the template with the system message to {around}, but the model has "
            f"{opened.positions} positions; lower one of them"
        )

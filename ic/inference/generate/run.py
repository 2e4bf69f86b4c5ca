"""One prompt, a file of prompts or a conversation, with a model that is loaded for it."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from rich.console import Console

from ic.errors import RunFailedError
from ic.inference.engine.request import Request
from ic.inference.generate.answer_file import AnswerFile
from ic.inference.generate.answers import answer, open_answers
from ic.inference.generate.conversation import check_terminal, converse
from ic.inference.generate.options import GenerateOptions
from ic.inference.generate.prompts import Prompt, PromptMaker
from ic.inference.loading import Opened, open_source


def generate(options: GenerateOptions) -> int:
    """Answer what is asked -> 0.

    Raises:
        ValueError: a source or prompt that cannot be used, before the weights are loaded.
        RunFailedError: the model failed.
    """
    if options.is_conversation:
        check_terminal()
    opened = open_source(options)
    options.sampling(0).check_vocabulary(opened.vocab_size)
    maker = PromptMaker(options, opened.tokenizer)
    if options.is_jsonl:
        return _answer_file(options, opened, maker)
    if options.is_conversation:
        converse(options, maker, open_answers(opened.load(), options, None))
        return 0
    prompt = maker.single()
    lengths = _lengths([prompt], options, opened)
    request = Request("0", prompt.ids, options.sampling(0))
    for text in answer(open_answers(opened.load(), options, lengths), request, options):
        print(text, end="", flush=True)
    print(flush=True)
    return 0


def _answer_file(options: GenerateOptions, opened: Opened, maker: PromptMaker) -> int:
    assert options.prompt_file is not None
    prompts = maker.of_lines(options.prompt_file)
    lengths = _lengths(prompts, options, opened)
    file = AnswerFile(options, prompts, str(opened.source.path))
    console = Console()
    failed = 0
    if missing := lengths[file.num_kept :]:
        answers = open_answers(opened.load(), options, missing)
        for request in file.requests[file.num_kept :]:
            answers.check(request)
        failed = file.fill(answers, 2 * options.max_batch, console)
    kept = f", {file.num_kept} were there" if file.num_kept else ""
    said = f"{len(prompts)} answers{kept}: {file.path}"
    console.print(said, soft_wrap=True, highlight=False)
    if failed:
        raise RunFailedError(f"{failed} prompts could not be answered: see error in {file.path}")
    return 0


def _lengths(prompts: Sequence[Prompt], options: GenerateOptions, opened: Opened) -> list[int]:
    """Tokens of each prompt with its answer. Says so if one is longer than what was trained.

    Raises:
        ValueError: more than the model has positions.
    """
    lengths = [len(prompt.ids) + options.most_new_tokens for prompt in prompts]
    for prompt, length in zip(prompts, lengths, strict=True):
        if length > opened.positions:
            raise ValueError(
                f"{prompt.where} and max_new_tokens come to {length} tokens, but the model has "
                f"{opened.positions} positions; shorten one of them"
            )
    longest = max(prompts, key=lambda prompt: len(prompt.ids))
    trained = opened.trained_length
    if trained is not None and len(longest.ids) > trained:
        rank_zero_info(
            f"warning: {longest.where} has {len(longest.ids):,} tokens, and the model was trained "
            f"at up to {trained:,}: what stands beyond may be lost on it"
        )
    return lengths

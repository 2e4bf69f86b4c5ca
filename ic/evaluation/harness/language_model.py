"""Our models as lm-evaluation-harness sees a model: likelihoods of continuations, greedy answers.

Tokenisation and windows are those of the harness's own model `hf` (lm_eval 0.4.13,
`models/huggingface.py`), so that both give the same numbers. Unlike it, a prompt that does not fit
the model is refused, and never cut without a word to make room for the answer.

Legend: B prompts of a batch, T tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ic.errors import UsageError
from ic.evaluation.harness.answer_end import AnswerEnd
from ic.evaluation.harness.grid import TOO_LONG
from ic.evaluation.suite import Decoder

LOG = logging.getLogger(__name__)

# What a greedy answer does not depend on; of anything else only the value that changes nothing.
_GREEDY = {"do_sample", "temperature", "top_k", "top_p", "min_p"}
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1, "num_return_sequences": 1}

# A continuation that is scored: its texts, tokens of the context and its own.
Scored = tuple[tuple[str, str] | None, list[int], list[int]]


class DecoderLM(TemplateLM):
    """A model of the harness that reads through a decoder: in pieces, shared beginnings once.

    Attributes:
        truncated: prompts that were cut so far.

    Args:
        decoder: None while requests are looked at and none is answered.
        positions: longest prompt with its answer, in tokens.
        tokens_per_batch: prompts that are read together, in tokens,
        rows_per_batch: or a number of them.
        too_long: `refuse` prompts that do not fit, or `truncate` them on the left, which is said
            and counted.
        quiet: without progress bars, and without saying again what `sizes` has said.
    """

    backend = "causal"

    def __init__(
        self,
        decoder: Decoder | None,
        tokenizer: PreTrainedTokenizerBase,
        positions: int,
        *,
        tokens_per_batch: int = 65536,
        rows_per_batch: int | None = None,
        too_long: str = "refuse",
        quiet: bool = False,
    ) -> None:
        super().__init__()
        if tokenizer.eos_token_id is None:
            raise ValueError("the harness needs a tokenizer with an end token (eos_token)")
        if too_long not in TOO_LONG:
            raise UsageError.unknown("too_long", too_long, list(TOO_LONG))
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.max_length = positions
        self.max_gen_toks = 256
        self.tokens_per_batch = tokens_per_batch
        self.rows_per_batch = rows_per_batch
        self.too_long = too_long
        self.quiet = quiet
        self.truncated = 0

    @property
    def decoder_in_use(self) -> Decoder:
        assert self.decoder is not None, "requests are answered without a decoder"
        return self.decoder

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Raises:
        UsageError: the tokenizer has no chat template.
        """
        if not self.tokenizer.chat_template:
            raise UsageError(
                "apply_chat_template: the tokenizer has no chat template; leave it out, or give a "
                "tokenizer that has one"
            )
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokens; the tokenizer's own first token is left out where the text begins with it."""
        if add_special_tokens is None:
            first = str(self.tokenizer.decode([self.prefix_token_id]))
            add_special_tokens = not has_bos_prefix(string, first)
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether greedy decoding gives it."""
        pairs = [(request.args, *self._pair(*request.args)) for request in requests]
        return self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Sum of log-likelihoods of each continuation, and whether greedy decoding gives it.

        Continuations of one context are read one after the other, so that the context is read once.
        """
        # The last token of a continuation is predicted and not read.
        prompts = [(context, len(ours)) for _, context, ours in requests]
        rows = self._fitting(prompts, self.max_length + 1, say=not self.quiet)
        of_context: dict[tuple[int, ...], list[int]] = {}
        for index, row in enumerate(rows):
            of_context.setdefault(tuple(row), []).append(index)
        longest = {
            context: len(context) + max(len(requests[index][2]) for index in indices)
            for context, indices in of_context.items()
        }
        answers: dict[int, tuple[float, bool]] = {}
        with self._bar("scoring", len(requests), disable_tqdm) as bar:
            ordered = sorted(longest, key=lambda context: (-longest[context], context))
            for batch in self._batches(ordered, [longest[context] for context in ordered]):
                start = min(len(context) for context in batch)
                for turn in range(max(len(of_context[context]) for context in batch)):
                    # A context whose continuations are all scored stays, so that the cache serves.
                    chosen = [of_context[context][: turn + 1][-1] for context in batch]
                    read = [rows[index] + requests[index][2] for index in chosen]
                    nats_BS, likeliest_BS = self.decoder_in_use.targets(_padded(read), start)
                    for place, index in enumerate(chosen):
                        if index in answers:
                            continue
                        own = slice(len(rows[index]) - start, len(read[place]) - start)
                        likelihood = -float(nats_BS[place, own].double().sum())
                        answers[index] = (likelihood, bool(likeliest_BS[place, own].all()))
                        self._remember("loglikelihood", requests[index][0], answers[index])
                        bar.update()
        return [answers[index] for index in range(len(requests))]

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of each whole text; one that is longer than the model in windows."""
        windows: list[Scored] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for pair in pairs:
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(owner)
        sums = [0.0] * len(requests)
        found = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for owner, (likelihood, _) in zip(owners, found, strict=True):
            sums[owner] += likelihood
        for request, likelihood in zip(requests, sums, strict=True):
            self._remember("loglikelihood_rolling", request.args, likelihood)
        return sums

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers up to a stop string, the end token or the budget.

        Raises:
            UsageError: sampling, or something else than greedy decoding, is asked for.
        """
        wanted = [self._budget(request.args[1]) for request in requests]
        encoded = [
            (self.tok_encode(request.args[0]), tokens)
            for request, (tokens, _) in zip(requests, wanted, strict=True)
        ]
        rows = self._fitting(encoded, self.max_length, say=not self.quiet)
        alike: dict[tuple[int, int, tuple[str, ...]], list[int]] = {}
        for index, (row, budget) in enumerate(zip(rows, wanted, strict=True)):
            alike.setdefault((len(row), *budget), []).append(index)
        texts: dict[int, str] = {}
        with self._bar("answering", len(requests), disable_tqdm) as bar:
            for length, tokens, until in sorted(alike, reverse=True):
                indices = sorted(alike[length, tokens, until], key=lambda index: rows[index])
                for batch in self._batches(indices, [length + tokens] * len(indices)):
                    read = [rows[index] for index in batch]
                    for index, text in zip(batch, self._answers(read, tokens, until), strict=True):
                        texts[index] = text
                        self._remember("generate_until", requests[index].args, text)
                        bar.update()
        return [texts[index] for index in range(len(requests))]

    def _answers(self, rows: list[list[int]], tokens: int, until: Sequence[str]) -> list[str]:
        """Answers to prompts of equal length."""
        ends = [AnswerEnd(self.tokenizer, self.eot_token_id, until) for _ in rows]

        def ended(out_BT: Tensor) -> bool:
            states = [end.seen(row) for end, row in zip(ends, out_BT, strict=True)]
            return all(states)

        out_BT = self.decoder_in_use.answers(torch.tensor(rows), tokens, ended)
        ended(out_BT)  # the last token too
        return [end.text(row) for end, row in zip(ends, out_BT, strict=True)]

    def sizes(self, requests: Sequence[Instance]) -> list[int]:
        """Tokens of each request with its answer; nothing is computed.

        Raises:
            UsageError: some do not fit, or cannot be answered.
        """
        sizes = []
        by_kind: dict[str, list[tuple[list[int], int]]] = {
            "loglikelihood": [],
            "generate_until": [],
        }
        for request in requests:
            if request.request_type == "generate_until":
                prompt = (self.tok_encode(request.args[0]), self._budget(request.args[1])[0])
            elif request.request_type == "loglikelihood":
                context, ours = self._pair(*request.args)
                prompt = (context, len(ours))
            else:
                sizes.append(min(1 + len(self.tok_encode(request.args[0])), self.max_length))
                continue
            by_kind[request.request_type].append(prompt)
            sizes.append(len(prompt[0]) + prompt[1])
        self._fitting(by_kind["generate_until"], self.max_length, say=True)
        self._fitting(by_kind["loglikelihood"], self.max_length + 1, say=True)
        return sizes

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of a context and of its continuation; an empty context is the first token."""
        if context:
            first, second = self._encode_pair(context, continuation)
            return first, second
        ours = self.tok_encode(continuation, add_special_tokens=False)
        if ours and ours[0] == self.prefix_token_id:
            return ours[:1], ours[1:]
        return [self.prefix_token_id], ours

    def _budget(self, given: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
        """Tokens to generate at most, and stop strings."""
        settings: dict[str, Any] = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        tokens = settings.pop("max_gen_toks")
        until = handle_stop_sequences(settings.pop("until"), eos=None)
        if settings.get("do_sample") and settings.get("temperature") != 0:
            raise UsageError(
                "the task asks for samples (do_sample=true); answers here are greedy: set "
                "gen_kwargs={do_sample: false, temperature: 0}"
            )
        for name, value in settings.items():
            if name not in _GREEDY and value != _NEUTRAL.get(name):
                raise UsageError(
                    f"generation option {name}={value}: answers here are greedy, with until and "
                    "max_gen_toks alone; choose another task, or set it otherwise in gen_kwargs"
                )
        return tokens, tuple(text for text in until if text)

    def _fitting(
        self, prompts: Sequence[tuple[list[int], int]], most: int, *, say: bool
    ) -> list[list[int]]:
        """Prompts (tokens, tokens of the answer) that fit, cut on the left if that was asked for.

        Raises:
            UsageError: they do not fit and are not to be cut, or an answer leaves no room at all.
        """
        over = [len(ids) + answer for ids, answer in prompts if len(ids) + answer > most]
        if not over:
            return [ids for ids, _ in prompts]
        largest = max(answer for _, answer in prompts)
        what = (
            f"{len(over):,} of {len(prompts):,} prompts do not fit: with its answer the longest "
            f"has {max(over):,} tokens, and the model takes {most:,}"
        )
        if largest >= most:
            raise UsageError(f"{what}; an answer alone may take {largest:,} of them")
        if self.too_long == "refuse":
            raise UsageError(
                f"{what}; choose shorter ones, generate fewer tokens (gen_kwargs max_gen_toks), or "
                "let their beginnings be cut with too_long=truncate"
            )
        self.truncated += len(over)
        if say:
            LOG.warning("%s; their beginnings are cut off (too_long=truncate)", what)
        return [ids[max(0, len(ids) + answer - most) :] for ids, answer in prompts]

    def _batches(self, items: Sequence[Any], lengths: Sequence[int]) -> Iterator[Sequence[Any]]:
        """Items in their order, together as many as their longest allows."""
        start = 0
        while start < len(items):
            size = self.rows_per_batch or max(1, self.tokens_per_batch // max(1, lengths[start]))
            yield items[start : start + size]
            start += size

    def _bar(self, what: str, total: int, disabled: bool) -> Any:
        return tqdm(total=total, desc=what, disable=disabled or self.quiet)

    def _remember(self, kind: str, request: tuple[Any, ...] | None, answer: Any) -> None:
        """For the harness's cache of answers (`use_cache`)."""
        if request is not None:
            self.cache_hook.add_partial(kind, request, answer)


def _padded(rows: Sequence[list[int]]) -> Tensor:
    """Rows (B, T) of unequal length, filled on the right, where no token before it can see it."""
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows])

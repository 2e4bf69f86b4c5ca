"""The two models of a parity report: opened, refused if they cannot be compared, loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ic.checkpoint.source import Source, find_source
from ic.conversion.parity.instructions import (
    conversations,
    prompt_after,
    prompt_of,
    shipped_instructions,
)
from ic.conversion.parity.options import (
    INSTRUCTIONS,
    LOGITS,
    NIAH,
    PASSKEY,
    SPEED,
    TALKS,
    TURNS,
    ParityConfig,
)
from ic.errors import UsageError
from ic.files.atomic_write import write_json
from ic.files.publishable import published_path
from ic.files.results import read_json
from ic.files.run_folder import ParityFolder
from ic.inference.loading import Opened, open_source, source_positions
from ic.inference.options import InferenceOptions, LoadOptions
from ic.inference.transformers_model import is_ours
from ic.model.fingerprint import fingerprint
from ic.model.quantised_linear import QuantisedLinear

# Scripts, digits, code, spaces and what a byte-level vocabulary falls back on.
_SAMPLE = (
    "The quick brown fox, in 1984, jumped over 3.14159 lazy dogs.\n\n\tdef f(x):\n        return "
    'x**2  # naïve café, Straße, Ελλάδα, Москва, 東京, العربية, 🙂\n"Don\'t!" she said -- twice.'
)


@dataclass(frozen=True)
class Side:
    """One of the two models, loaded.

    Attributes:
        model: in evaluation mode, on its device.
        name: what the report calls it.
        source: where it was loaded from.
        weights: their identity.
        positions: tokens of the longest prompt with its answer.
        trained_length: longest context in tokens that it was trained at, if the source tells.
    """

    model: Any
    name: str
    source: str
    weights: str
    positions: int
    trained_length: int | None

    @property
    def vocabulary(self) -> int:
        """Columns of its logits."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def published_source(self) -> str:
        """What a report that may be published calls the place that it was loaded from."""
        return published_path(self.source)

    def facts(self) -> dict[str, Any]:
        """What the results file says of it."""
        config = self.model.config.get_text_config()
        names = (
            *("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads"),
            *("num_key_value_heads", "head_dim", "kv_lora_rank"),
            *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "vocab_size"),
        )
        return {
            "name": self.name,
            "source": self.published_source,
            "weights": self.weights,
            "positions": self.positions,
            "trained_length": self.trained_length,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "parameters": parameters_of(self.model),
            "shape": {n: v for n in names if (v := getattr(config, n, None)) is not None},
        }


@dataclass(frozen=True)
class Pair:
    """Both models with the tokenizer that they share.

    Attributes:
        parts: what is measured of them.
        notes: what the report has to say about them.
    """

    original: Side
    converted: Side
    tokenizer: PreTrainedTokenizerBase
    parts: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def sides(self) -> dict[str, Side]:
        return {"original": self.original, "converted": self.converted}

    @property
    def both_positions(self) -> int:
        """Tokens of the longest prompt that both can read."""
        return min(self.original.positions, self.converted.positions)

    @property
    def vocabulary(self) -> int:
        """Columns of logits that are compared: those that both have. What one has beyond them is
        padding, because both have every token of the tokenizer.
        """
        return min(self.original.vocabulary, self.converted.vocabulary)


@dataclass(frozen=True)
class OpenedPair:
    """What is known of both models before their weights are loaded.

    Attributes:
        parts: what is measured of them.
        notes: what the report has to say about them.
    """

    original: Opened
    converted: Opened
    parts: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The one of both."""
        return self.original.tokenizer

    @property
    def positions(self) -> dict[str, int]:
        """Tokens of the longest prompt with its answer."""
        return {"original": self.original.positions, "converted": self.converted.positions}

    def load(self, folder: ParityFolder) -> Pair:
        """Load both, claim the folder for them.

        Raises:
            ValueError: weights that cannot be loaded, or a folder of other models.
        """
        sides = [_load(each) for each in (self.original, self.converted)]
        pair = Pair(sides[0], sides[1], self.tokenizer, self.parts, self.notes)
        _claim(folder, pair)
        return pair


def open_pair(config: ParityConfig, folder: ParityFolder) -> OpenedPair:
    """Check all that can be known of two models and a folder before weights are loaded.

    Raises:
        ValueError: a source that cannot be loaded, tokenizers that differ, lengths beyond a model's
            positions, instructions without a chat template, a folder of other files.
    """
    _check_files(folder)
    sources = find_source(config.original), find_source(config.converted)
    # What a model is opened with, such as the tokenizer in a GGUF file, takes longer to read.
    _check_lengths(config, *(source_positions(source) for source in sources))
    ours = [is_ours(source) for source in sources]
    # Where neither is ours, opening them refuses any backend but torch.
    original, converted = (
        _open(config, source, backends=own or not any(ours), converted=converted)
        for source, own, converted in zip(sources, ours, (False, True), strict=True)
    )
    _check_tokenizers(original, converted)
    _check_lengths(config, original.positions, converted.positions)
    parts, notes = measured_parts(config, original.tokenizer)
    positions = min(original.positions, converted.positions)
    check_talks(config, parts, original.tokenizer, positions)
    return OpenedPair(original, converted, parts, notes)


def _open(config: ParityConfig, source: Source, *, backends: bool, converted: bool) -> Opened:
    on_gpu = torch.cuda.is_available() and config.accelerator != "cpu"
    given = {each.name: getattr(config, each.name) for each in fields(LoadOptions)}
    if not converted:
        given |= {"cache_dtype": "auto", "indexer": "auto"}
    if config.dtype == "auto" and not on_gpu:
        given["dtype"] = "float32"
    if not backends:
        given |= dict.fromkeys(("attention", "norm", "rope"), "torch")
    return open_source(InferenceOptions(checkpoint=str(source.path), **given))


def _load(opened: Opened) -> Side:
    loaded = opened.load()
    cache = getattr(loaded.model.config, "cache_dtype", "auto")
    return Side(
        loaded.model,
        loaded.name if cache == "auto" else f"{loaded.name}, {cache} cache",
        str(opened.source.path),
        fingerprint(loaded.model),
        opened.positions,
        opened.trained_length,
    )


def parameters_of(model: Any) -> int:
    """Numbers that a model has learnt, whatever bits they are kept in."""
    quantised = sum(
        layer.in_features * layer.out_features
        for layer in model.modules()
        if isinstance(layer, QuantisedLinear)
    )
    return quantised + sum(each.numel() for each in model.parameters())


def _check_tokenizers(original: Opened, converted: Opened) -> None:
    """Raises:
    ValueError: they differ, so that the two models would not read the same text.
    """
    where = f"original={original.source.path} and converted={converted.source.path}"
    vocabularies = [each.tokenizer.get_vocab() for each in (original, converted)]
    if vocabularies[0] != vocabularies[1]:
        unlike = set(vocabularies[0].items()) ^ set(vocabularies[1].items())
        first = min(unlike, key=lambda item: (item[1], item[0]))
        raise ValueError(
            f"{where} have other tokenizers: {len(vocabularies[0]):,} and "
            f"{len(vocabularies[1]):,} tokens, the first that differs is {first[0]!r} "
            f"({first[1]}); their logits are about other tokens and cannot be compared: give the "
            "model that was converted, or one tokenizer for both with tokenizer=FOLDER"
        )
    read = [list(each.tokenizer(_SAMPLE)["input_ids"]) for each in (original, converted)]
    if read[0] != read[1]:
        at = next(
            (i for i, (a, b) in enumerate(zip(*read, strict=False)) if a != b), min(map(len, read))
        )
        raise ValueError(
            f"{where} have the same vocabulary, but their tokenizers read a text in other ways: "
            f"token {at} of it is {read[0][at : at + 1]} and {read[1][at : at + 1]}; give one "
            "tokenizer for both with tokenizer=FOLDER"
        )


def _check_lengths(config: ParityConfig, original: int, converted: int) -> None:
    """Refuse lengths beyond the models' positions."""
    parts = config.measured
    asked: list[tuple[str, list[int], int]] = []  # with the tokens that come behind the length
    if LOGITS in parts:
        asked.append(("lengths", config.lengths, 0))
    if PASSKEY in parts or NIAH in parts:
        asked.append(("retrieval_lengths", config.retrieval_lengths, 0))
    if SPEED in parts:
        asked.append(("speed_tokens", config.speed_tokens, config.decode_tokens))
    for name, lengths, more in asked:
        behind = f" and {more} decode_tokens" if more else ""
        if max(lengths) + more > converted:
            raise ValueError(
                f"{name}={lengths}: the converted model has {converted:,} positions "
                f"(max_position_embeddings), too few for {max(lengths):,} tokens{behind}; choose "
                "shorter lengths"
            )
        if min(lengths) + more > original:
            raise ValueError(
                f"{name}={lengths}: the original has {original:,} positions "
                f"(max_position_embeddings), too few for {min(lengths):,} tokens{behind}; give at "
                "least one length that both have"
            )


def measured_parts(
    config: ParityConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The parts that are measured, and a note where one is left out.

    Raises:
        ValueError: one that was asked for and that a tokenizer has to have a chat template for.
    """
    parts = config.measured
    talks = [part for part in TALKS if part in parts]
    if not talks or tokenizer.chat_template:
        return parts, ()
    said = "the tokenizer has no chat template to ask instructions with"
    if config.parts:
        raise ValueError(
            f"parts={config.parts}: {said}; leave {' and '.join(talks)} out, or give a tokenizer "
            "with one (tokenizer=FOLDER)"
        )
    return tuple(part for part in parts if part not in TALKS), (f"Instructions: {said}.",)


def check_talks(
    config: ParityConfig, parts: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, positions: int
) -> None:
    """Refuse instructions and conversations that do not fit with their answers.

    Args:
        parts: of `measured_parts`.
        positions: that both models have.

    Raises:
        ValueError: the longest does not.
    """
    if INSTRUCTIONS in parts:
        _check_instructions(config, tokenizer, positions)
    if TURNS in parts:
        _check_turns(config, tokenizer, positions)


def _check_instructions(
    config: ParityConfig, tokenizer: PreTrainedTokenizerBase, positions: int
) -> None:
    asked = shipped_instructions()[: config.instructions]
    longest = max(len(prompt_of(tokenizer, each.instruction)) for each in asked)
    if longest + config.answer_tokens > positions:
        raise ValueError(
            f"answer_tokens={config.answer_tokens}: an instruction has up to {longest:,} tokens, "
            f"and the models have {positions:,} positions for it and its answer; choose fewer, or "
            "leave instructions out of parts="
        )


def _check_turns(config: ParityConfig, tokenizer: PreTrainedTokenizerBase, positions: int) -> None:
    longest = 0
    for asked in conversations(config):
        messages = [
            {"role": role, "content": content}
            for said in asked
            for role, content in (("user", said), ("assistant", ""))
        ]
        longest = max(longest, len(prompt_after(tokenizer, messages[:-1])))
    needed = longest + config.turns * config.answer_tokens
    if needed > positions:
        raise ValueError(
            f"turns={config.turns} with answer_tokens={config.answer_tokens}: a conversation has "
            f"up to {needed:,} tokens, and the models have {positions:,} positions for it; choose "
            "fewer, or leave turns out of parts="
        )


def _check_files(folder: ParityFolder) -> None:
    """Raises:
    UsageError: the folder is a file, or holds something else than a report.
    """
    if folder.path.is_file():
        raise UsageError(f"output={folder.path}: is a file; give a folder")
    if not folder.path.is_dir() or not any(folder.path.iterdir()):
        return
    if not _held(folder):
        raise UsageError(
            f"output={folder.path}: holds other files than a parity report's; choose an empty "
            "folder"
        )


def _claim(folder: ParityFolder, pair: Pair) -> None:
    """Raises:
    UsageError: the folder holds a report of other models.
    """
    models = {
        name: {"name": side.name, "source": side.published_source, "weights": side.weights}
        for name, side in pair.sides.items()
    }
    held = _held(folder)
    for name, model in models.items():
        known = held.get(name, model)
        if known["weights"] != model["weights"]:
            raise UsageError(
                f"output={folder.path}: holds the report of another {name} model ({known['name']}, "
                f"weights {known['weights']}, not {model['weights']}); choose another folder"
            )
    write_json(folder.models, models)


def _held(folder: ParityFolder) -> dict[str, Any]:
    try:
        return read_json(folder.models)
    except json.JSONDecodeError:
        return {}

"""What is known of a report before the model that it is of has been made."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from ic.conversion.parity.options import LOGITS, SPEED, SUITES, ParityConfig
from ic.conversion.parity.pair import check_talks, measured_parts
from ic.conversion.parity.retrieval import build_suites
from ic.conversion.parity.texts import draw_texts
from ic.datamodules.text_files import expand_folders, resolve_files
from ic.errors import UsageError


def check_report(
    parity: ParityConfig | None, positions: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Refuse a report that could not be written once the model is there.

    Args:
        parity: what is measured; None measures nothing.
        positions: of the original, which the model to be made will have too.
        tokenizer: of both.

    Raises:
        ValueError: texts that are not there or too short or few, lengths beyond the model's
            positions, or instructions that do not fit or that there is no chat template for.
    """
    if parity is None:
        return
    if parity.text:
        resolve_files(expand_folders(parity.text, "parity.text"), "parity.text")
    for name, needing, more in (
        ("lengths", {LOGITS}, 0),
        ("retrieval_lengths", set(SUITES), 0),
        ("speed_tokens", {SPEED}, parity.decode_tokens),
    ):
        if not needing & set(parity.measured):
            continue
        if (longest := max(getattr(parity, name)) + more) > positions:
            raise UsageError(
                f"parity.{name}={getattr(parity, name)}: the model has {positions:,} positions, "
                f"and {longest:,} tokens do not fit; choose shorter ones, or parity=null"
            )
    try:
        parts, _ = measured_parts(parity, tokenizer)
        check_talks(parity, parts, tokenizer, positions)
        if LOGITS in parts:
            draw_texts(parity, tokenizer)
        build_suites(parity, parts, tokenizer, {"original": positions})
    except ValueError as error:
        raise UsageError(
            f"the report, whose options begin with parity.: {error}; parity=null leaves it out"
        ) from error

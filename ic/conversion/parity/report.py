"""A parity report in words and tables: a table to be read in a minute, then the details."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ic.conversion.parity.figure import size_text
from ic.conversion.parity.texts import BUCKET, WHOLE
from ic.display.markdown import markdown
from ic.display.numbers import percent, short_number, tokens
from ic.evaluation.comparison.compare import Comparison
from ic.evaluation.comparison.words import HEADS, lines, notes, sentences
from ic.evaluation.perplexity.curve import perplexity_text

Row = dict[str, Any]
HEAD = ["", "original", "converted", "difference", "n"]


def headline(rows: Sequence[Row]) -> list[list[str]]:
    """What a reader wants to know first, a line each under `HEAD`."""
    said: list[list[str]] = []
    texts = [row for row in rows if row["what"] == "logits" and row["position"] == WHOLE]
    for row in texts:
        apart = "-" if row["ratio"] is None else _per_cent_more(row)
        own = row["perplexity_original"]
        said.append(
            [
                f"perplexity at {tokens(row['length_tokens'])}",
                "-" if own is None else perplexity_text(own),
                perplexity_text(row["perplexity_converted"]),
                apart,
                _documents(row["n"]),
            ]
        )
    if shared := [row for row in texts if row["kl"] is not None]:
        row = shared[-1]
        said.append(["KL per token, nats", "", "", _with_interval(row, "kl"), _documents(row["n"])])
        said.append(
            ["same likeliest token", "", "", percent(row["agreement"], 1), _documents(row["n"])]
        )
    for row in rows:
        if row["what"] == "weights":
            sizes = [size_text(row[f"bytes_{name}"]) for name in ("original", "converted")]
            said.append(["weights", *sizes, f"x {row['ratio']:.3g}", ""])
    for row in rows:
        if row["what"] == "cache" and row["by"] == "context":
            sizes = [size_text(row[f"bytes_{name}"]) for name in ("original", "converted")]
            name = f"cache of {tokens(row['context_tokens'])} tokens"
            said.append([name, *sizes, f"x {row['ratio']:.3g}", ""])
    for row in rows:
        if row["what"] == "comparison" and row["whole_suite"]:
            shares = [percent(row[name]) for name in ("first", "second")]
            points = 100 * row["difference"]
            word = {"A": "original better", "B": "converted better"}.get(
                row["better"], "no difference seen"
            )
            apart = f"{points:+.0f} points, {word}"
            said.append([f"{row['suite']}, found", *shares, apart, f"{row['n']} prompts"])
    for row in rows:
        if row["what"] == "instructions":
            first = percent(row["same_first_share"])
            asked = f"{row['n']} instructions"
            said.append(["answers, same first token", "", "", first, asked])
            said.append(
                ["answers, original's tokens kept", "", "", percent(row["agreement"], 1), asked]
            )
    turns = [row for row in rows if row["what"] == "turns"]
    for row in [turns[0], turns[-1]] if len(turns) > 1 else turns:
        kept, number = percent(row["agreement"], 1), f"{row['n']} conversations"
        said.append([f"turn {row['turn']}, original's tokens kept", "", "", kept, number])
    for row in rows:
        if row["what"] == "speed":
            for phase in ("prefill", "decode"):
                name = f"{phase}_tokens_per_s"
                rates = [_rate(row[f"{name}_{side}"]) for side in ("original", "converted")]
                ratio = row[f"{phase}_ratio"]
                apart = "-" if ratio is None else f"x {ratio:.3g}"
                title = f"{phase}, tokens/s at {tokens(row['cache_tokens'])}"
                said.append([title, *rates, apart, f"{row['n']} times"])
    return said


def document(results: dict[str, Any], comparison: Comparison | None, *, picture: bool) -> str:
    """The page, from what the results file holds."""
    models, rows = results["models"], results["rows"]
    names = {name: model["name"] for name, model in models.items()}
    page = [f"# Parity of {names['converted']} with {names['original']}", ""]
    shown = results["shown"]
    page += [*markdown(shown["heads"], shown["lines"], left=1, text=("n",)), ""]
    page += [*results["notes"], *([""] if results["notes"] else [])]
    if picture:
        page += ["![perplexity, KL and cache](parity.png)", ""]
    page += ["## What was measured", "", *_models(models), ""]
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items() if v is not None)
    page += [
        f"On {results['device']}, with {versions}; commit {results['commit']}, {results['date']}, "
        f"by `{results['command']}`. Both models read the same tokens. Intervals are of 95 %."
    ]
    page += [*_logits(rows), *_cache(rows), *_retrieval(comparison), *_instructions(rows)]
    page += [*_turns(rows), *_speed(rows)]
    return "\n".join(page) + "\n"


def _models(models: dict[str, Row]) -> list[str]:
    facts = ("name", "source", "weights", "positions", "trained_length", "dtype", "parameters")
    table = [[name, *(_fact(model[name]) for model in models.values())] for name in facts]
    shapes = [", ".join(f"{k} {v}" for k, v in model["shape"].items()) for model in models.values()]
    return markdown(["", *models], [*table, ["shape", *shapes]], left=3)


def _fact(value: Any) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"`{value}`"


def _logits(rows: Sequence[Row]) -> Iterator[str]:
    texts = [row for row in rows if row["what"] == "logits"]
    if not texts:
        return
    yield from (
        "",
        "## Logits and perplexity",
        "",
        "KL is KL(original || converted) in nats per token; median and 99th percentile are of all "
        "tokens, the means and their intervals of documents (Student). The ratio is that of the "
        "perplexities on the same documents, paired. The original reads no further than its "
        "positions.",
        "",
    )
    heads = ["tokens", "position", "original", "converted", "ratio", "KL", "median", "p99"]
    heads += ["same top token", "documents"]
    table = []
    for row in texts:
        own = row["perplexity_original"]
        span = f"{row['from_token']:,}-{row['to_token'] - 1:,}"
        table.append(
            [
                f"{row['length_tokens']:,}",
                span if row["position"] == BUCKET else "all",
                "-" if own is None else perplexity_text(own),
                perplexity_text(row["perplexity_converted"]),
                _with_interval(row, "ratio"),
                _with_interval(row, "kl"),
                _small(row["kl_median"]),
                _small(row["kl_p99"]),
                percent(row["agreement"], 1),
                str(row["n"]),
            ]
        )
    yield from markdown(heads, table, left=2)


def _cache(rows: Sequence[Row]) -> Iterator[str]:
    found = [row for row in rows if row["what"] == "cache"]
    if not found:
        return
    dtypes = dict.fromkeys(found[0][f"dtype_{name}"] for name in ("original", "converted"))
    yield from (
        "",
        "## Cache",
        "",
        f"Bytes of the tensors that a filled cache holds, in {' and '.join(dtypes)}; a context is "
        "made of one filled layer of each kind.",
        "",
    )
    heads = ["tokens", "by", "original", "converted", "a token, original", "a token, converted"]
    yield from markdown(
        [*heads, "ratio"],
        [
            [
                f"{row['context_tokens']:,}",
                row["by"],
                *(size_text(row[f"bytes_{name}"]) for name in ("original", "converted")),
                *(f"{row[f'bytes_per_token_{name}']:,.0f}" for name in ("original", "converted")),
                f"{row['ratio']:.4g}",
            ]
            for row in found
        ],
        left=2,
    )


def _retrieval(comparison: Comparison | None) -> Iterator[str]:
    if comparison is None:
        return
    yield from ("", "## Passkey and needles", "", "A is the original, B the converted model.", "")
    yield from (f"- {sentence}" for sentence in sentences(comparison))
    yield from ("", *markdown(HEADS, lines(comparison), left=1))
    for note in notes(comparison):
        yield from ("", note)
    yield from ("", "Every answer lies in the folders `original` and `converted`, by suite.")


def _instructions(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if row["what"] == "instructions":
            yield from (
                "",
                "## Instructions",
                "",
                f"{row['n']} instructions in the model's own chat template, answered greedily; "
                f"{row['n_tokens']:,} tokens of the original's answers were given to both. All "
                "answers side by side: [answers.md](answers.md).",
                "",
            )
            names = {
                "same_first_share": "answers that begin with the same token",
                "same_answer_share": "answers that are the same",
                "agreement": "tokens of the original's answer that the converted model would give",
                "kl": "KL on them, nats per token",
                "similarity": "words in common, in the same order (difflib's ratio)",
            }
            table = []
            for name, title in names.items():
                bare = name.removesuffix("_share")
                ends = [row[f"{bare}_{end}_95"] for end in ("low", "high")]
                show = _small if name == "kl" else percent
                span = "-" if ends[0] is None else " to ".join(show(end) for end in ends)
                table.append([title, show(row[name]), span])
            yield from markdown(["", "", "95 %"], table, left=1)


def _turns(rows: Sequence[Row]) -> Iterator[str]:
    found = [row for row in rows if row["what"] == "turns"]
    if not found:
        return
    yield from (
        "",
        "## Conversations",
        "",
        f"{found[0]['n']} conversations of {len(found)} turns. The original answers greedily; both "
        "models read its answers token by token, each over a cache that goes on from turn to turn. "
        "The loss is the converted model's minus the original's, in nats per token.",
        "",
    )
    heads = ["turn", "original's tokens kept", "KL", "loss", "tokens"]
    table = []
    for row in found:
        low, high = row["agreement_low_95"], row["agreement_high_95"]
        span = "" if low is None else f" [{percent(low, 1)}-{percent(high, 1)}]"
        loss = f"{row['difference']:+.3g}"
        if row["difference_low_95"] is not None:
            loss += f" [{row['difference_low_95']:+.3g} to {row['difference_high_95']:+.3g}]"
        kept = percent(row["agreement"], 1) + span
        table.append(
            [str(row["turn"]), kept, _with_interval(row, "kl"), loss, f"{row['n_tokens']:,}"]
        )
    yield from markdown(heads, table, left=1)


def _speed(rows: Sequence[Row]) -> Iterator[str]:
    found = [row for row in rows if row["what"] == "speed"]
    if not found:
        return
    one = found[0]
    yield from (
        "",
        "## Speed",
        "",
        f"Batch 1, {one['dtype']}, on {one['device']}; median of {one['n']} and their range in "
        "tokens per second, both models in turn in one process. Decoding is of "
        f"{one['decode_tokens']} tokens behind a cache of the length.",
        "",
    )
    table = []
    for row in found:
        for phase in ("prefill", "decode"):
            cells = [_range(row, f"{phase}_tokens_per_s_{n}") for n in ("original", "converted")]
            ratio = row[f"{phase}_ratio"]
            shown = "-" if ratio is None else f"{ratio:.3g}"
            table.append([f"{row['cache_tokens']:,}", phase, *cells, shown])
    yield from markdown(["cache", "", "original", "converted", "ratio"], table, left=2)


def _range(row: Row, name: str) -> str:
    if row[name] is None:
        return "-"
    return f"{_rate(row[name])} [{_rate(row[f'{name}_least'])}-{_rate(row[f'{name}_most'])}]"


def _rate(value: float | None) -> str:
    return "-" if value is None else short_number(value)


def _small(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _with_interval(row: Row, name: str) -> str:
    if row[name] is None:
        return "-"
    low, high = row[f"{name}_low_95"], row[f"{name}_high_95"]
    text = f"{row[name]:.4g}" if name == "ratio" else _small(row[name])
    return text if low is None else f"{text} [{low:.3g}-{high:.3g}]"


def _per_cent_more(row: Row) -> str:
    """`+2.3 % [+1.9 to +2.7]` of the ratio of the perplexities."""
    more, low, high = (
        None if row[name] is None else 100 * (row[name] - 1)
        for name in ("ratio", "ratio_low_95", "ratio_high_95")
    )
    assert more is not None
    span = "" if low is None or high is None else f" [{_signed(low, 2)} to {_signed(high, 2)}]"
    return f"{_signed(more, 3)} %{span}"


def _signed(value: float, digits: int) -> str:
    """Significant digits, without a power of ten where they do not reach the point."""
    return f"{value:+,.0f}" if abs(value) >= 10**digits else f"{value:+.{digits}g}"


def _documents(count: int) -> str:
    return f"{count} document{'' if count == 1 else 's'}"

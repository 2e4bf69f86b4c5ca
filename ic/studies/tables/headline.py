"""Eight figures that say what this project does, for a reader who has a minute."""

from __future__ import annotations

from typing import Any

from ic.display.markdown import markdown
from ic.display.numbers import gib, tokens
from ic.evaluation.statistics import Accuracy
from ic.studies.tables.published import load

# The longest prompts that were asked often enough for a narrow interval.
_SURE = 131072


def headline_table() -> str:
    """What was measured, the figure, and the results file that it stands in."""
    lines = [
        _needles(),
        _healed(),
        _retrieval(),
        _training(),
        _cache(),
        _decoding(),
        _serving(),
        _demo(),
    ]
    return "\n".join(markdown(["measured", "result", "file"], lines, left=3))


def _retrieval() -> list[str]:
    file = "infinitecontext_1b-passkey.json"
    rows = [row for row in load(file)["rows"] if row["depth"] != "control"]
    lengths = {row["length_tokens"] for row in rows}
    longest = max(lengths)
    sure = [f"of {n:,} tokens: {_answered(rows, n)}" for n in lengths & {_SURE} - {longest}]
    return [
        f"Keys that InfiniteContext-1B finds in prompts of {longest:,} tokens, "
        f"{longest // _trained_tokens()} times as long as its longest training text",
        "; ".join([_answered(rows, longest), *sure]),
        f"`{file}`",
    ]


def _trained_tokens() -> int:
    rows = load("infinitecontext_1b-fit.json")["rows"]
    return max(row["context_length_tokens"] for row in rows if row["what"] == "training")


def _training() -> list[str]:
    file = "infinitecontext_1b-fit.json"
    data = load(file)
    steps = sum(row["num_steps"] for row in data["rows"] if row["what"] == "training")
    parts = [f"on {data['device']}", f"{steps:,} steps"]
    if limit := data["config"]["trainer"]["max_time"]:
        _, hours, minutes, seconds = map(int, limit.split(":"))
        parts[0] = f"{60 * hours + minutes} min {seconds} s {parts[0]}"
    parts += [f"{gib(r['peak_bytes'])} per GPU" for r in data["rows"] if r["what"] == "memory"]
    return ["Its training, from random weights", ", ".join(parts), f"`{file}`"]


def _healed() -> list[str]:
    file = "smollm2_mla-h200-healed-rank128-books-parity.json"
    rows = load(file)["rows"]
    share = next(row["ratio"] for row in rows if row["what"] == "cache")
    found = []
    for row in rows:
        if row["what"] == "logits" and row["position"] == "all":
            low, high = (100 * (row[f"ratio_{end}_95"] - 1) for end in ("low", "high"))
            found.append(
                f"{row['perplexity_converted']:.1f} at {tokens(row['length_tokens'])} (original "
                f"{row['perplexity_original']:.1f}, {low:+.1f} to {high:+.1f} %)"
            )
    return [
        f"Perplexity of SmolLM2-135M as MLA with {share:g} of its cache, healed, before it reads "
        "on (another student), on books by other authors",
        f"{', '.join(found)}; paired 95 % intervals",
        f"`{file}`",
    ]


def _needles() -> list[str]:
    files = [f"smollm2_mla-h200-98k-niah-{part}.json" for part in ("4k-32k", "64k", "128k")]
    found = []
    for file in files:
        rows = load(file)["rows"]
        own = [row for row in rows if row["task"] == "own_words"]
        lengths = sorted({row["length_tokens"] for row in own})
        found += [f"{_pooled(own, length)} at {tokens(length)}" for length in lengths]
    return [
        "Facts that SmolLM2-135M as MLA finds in unseen books, in words, forms and kinds of keys "
        "that training never had, asked as they were stated",
        ", ".join(found),
        ", ".join(f"`{file}`" for file in files),
    ]


def _cache() -> list[str]:
    file = "cache-memory.json"
    kib = {row["cache"]: row["bytes_per_token"] / 1024 for row in load(file)["rows"]}
    gqa = next(name for name in kib if name.startswith("GQA"))
    heads = gqa.removeprefix("GQA, ").removesuffix(", bf16")
    return [
        "The bf16 cache of InfiniteContext-1B per token, beside other attention of the same shape",
        f"{kib['MLA, bf16']:.0f} KiB with MLA, {kib[gqa]:.0f} KiB with GQA ({heads}), "
        f"{kib['MHA, bf16']:.0f} KiB with MHA",
        f"`{file}`",
    ]


def _decoding() -> list[str]:
    file = "kernels-decode.json"
    data = load(file)
    found = [
        row
        for row in data["rows"]
        if row["kernel"] == "mla_decode" and row["case"] == "(1, 1M) 16 h 192+64 bf16"
    ]
    ours = next(row for row in found if row["by"] == "ours")
    others = [row for row in found if row["by"] != "ours" and row.get("median_us")]
    beside = ", ".join(f"{row['median_us']:.0f} µs with {row['by']}" for row in others)
    return [
        f"Attention of one layer over {tokens(ours['context'])} cached tokens while decoding, "
        f"{data['device']}",
        f"{ours['median_us']:.0f} µs, {ours['percent_of_copy']:.0f} % of the bandwidth of a copy; "
        f"{beside}",
        f"`{file}`",
    ]


def _serving() -> list[str]:
    file = "serving-mla_1b.json"
    data = load(file)
    found = {(row["batch"], row["context_tokens"]): row for row in data["rows"]}
    speeds = [
        f"{found[batch, context]['decode_tokens_per_s']:,.0f} at {tokens(context)}, batch {batch} "
        f"({100 * found[batch, context]['share_of_bound']:.0f} %)"
        for batch, context in ((1, 4096), (64, 4096), (16, 131072))
    ]
    long = found[1, 131072]
    return [
        "Tokens per second of the engine with the 1B's shape (and share of what a copy of weights "
        f"and cache would allow), {data['device']}",
        f"{', '.join(speeds)}; the first token of {tokens(long['context_tokens'])} after "
        f"{long['time_to_first_token_p50_s']:.1f} s",
        f"`{file}`",
    ]


def _demo() -> list[str]:
    file = "mla_tiny-fit.json"
    data = load(file)
    rows = [r for r in data["rows"] if r["what"] == "passkey" and r["depth"] != "control"]
    lengths = sorted({row["length_tokens"] for row in rows})
    answers = ", ".join(f"{_pooled(rows, n)} at {n:,}" for n in lengths)
    return [f"`make demo`: `mla_tiny` on {data['device']}", f"{answers} tokens", f"`{file}`"]


def _pooled(rows: list[dict[str, Any]], length: int) -> Accuracy:
    here = [row for row in rows if row["length_tokens"] == length]
    return Accuracy(sum(row["correct"] for row in here), sum(row["n"] for row in here))


def _answered(rows: list[dict[str, Any]], length: int) -> str:
    accuracy = _pooled(rows, length)
    low, high = accuracy.interval
    return f"{accuracy} exact answers (95 % interval {100 * low:.0f}-{100 * high:.0f} %)"

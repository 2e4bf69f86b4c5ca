"""The model card in words: sections of Markdown from what `ic.checkpoint.model_card` gathered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ic.checkpoint.card.figures import longest_measured
from ic.checkpoint.card.origin import code, length_text, origin, versions_text
from ic.display.markdown import markdown
from ic.display.numbers import short_number

_RETRIEVAL = {"passkey", "niah", "ruler", "mrcr", "graph", "retrieval"}
Facts = dict[str, Any]


def page(facts: Facts) -> str:
    """All but the front matter."""
    sections = (
        _head(facts),
        _shape(facts),
        origin(facts["stages"]),
        _figures(facts),
        _licence(facts["licence"]),
        _limits(facts),
        _loading(facts),
        _made(facts),
    )
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


def _head(facts: Facts) -> list[str]:
    shape, stages = facts["shape"], facts["stages"]
    if any(stage["kind"] == "conversion" for stage in stages):
        origin = "which had grouped keys and values before"
    elif stages and stages[0]["kind"] in ("source", "missing"):
        origin = f"made from {stages[0]['name']}"
    else:
        origin = "trained from random weights"
    return [
        f"# {facts['name']}",
        "",
        f"A language model with Multi-head Latent Attention (MLA), {origin}: "
        f"{short_number(shape['parameters'])} parameters, and "
        f"{shape['cache_bytes_per_token']:,} bytes of bf16 cache per token.",
    ]


def _shape(facts: Facts) -> list[str]:
    shape = facts["shape"]
    heads = shape["heads"]
    full = shape["layers"] * heads * (shape["qk_nope"] + shape["qk_rope"] + shape["v"]) * 2
    lines = [
        ["parameters", f"{shape['parameters']:,}"],
        ["layers, hidden size, MLP", _numbers(shape, "layers", "hidden", "mlp")],
        ["heads", str(heads)],
        [
            "per head: query and key without rotation, with rotation, value",
            _numbers(shape, "qk_nope", "qk_rope", "v"),
        ],
        ["rank of the latent", f"{shape['kv_rank']:,}"],
        ["rank of the queries", f"{shape['q_rank']:,}" if shape["q_rank"] else "full"],
        [
            "cache per token, bf16",
            f"{shape['cache_bytes_per_token']:,} bytes ({shape['kv_rank']} + {shape['qk_rope']} "
            f"numbers per layer; keys and values of all heads would take {full:,} bytes)",
        ],
        ["vocabulary", f"{shape['vocabulary']:,}"],
        ["positions", f"{shape['positions']:,}"],
        ["trained to", length_text(shape["trained_length"])],
        ["rotation", f"`{shape['rope']}`"],
        ["weights", f"{shape['dtype']}, {shape['bytes'] / 1e6:,.1f} MB"],
        [
            "computed beyond DeepSeek-V3",
            code(", ".join(shape["extensions"])) if shape["extensions"] else "nothing",
        ],
    ]
    return ["## What it is", "", *markdown(["", ""], _cells(lines), left=2)]


def _figures(facts: Facts) -> list[str]:
    lines = ["## Figures"]
    for suite in facts["suites"]:
        synthetic = f" Synthetic: {suite['synthetic']}." if suite["synthetic"] else ""
        precision = f", {suite['precision']}" if suite["precision"] else ""
        lines += [
            "",
            f"### {suite['suite']}: {suite['title']}",
            "",
            f"Measured {suite['date']} on {suite['device']}{precision}, commit {suite['commit']}, "
            f"by {code(suite['command'])}.{synthetic} {suite['answering'].rstrip('.')}.",
            "",
            *markdown(suite["heads"], _cells(suite["lines"]), left=1),
        ]
    if not facts["suites"]:
        lines += ["", "No evaluation of these weights was found beside them."]
    return lines


def _licence(licence: dict[str, Any]) -> list[str]:
    text = (
        "Unknown. Neither the source nor whoever wrote this folder says one: ask before you use "
        "or publish it."
        if licence["name"] is None
        else f"{licence['name']}, {licence['said_by']}."
    )
    return ["## Licence", "", text]


def _limits(facts: Facts) -> list[str]:
    shape, stages, suites = facts["shape"], facts["stages"], facts["suites"]
    trainings = [stage for stage in stages if stage["kind"] == "training"]
    longest = longest_measured(suites)
    limits = [
        f"It accepts {shape['positions']:,} positions. It was trained to "
        f"{length_text(shape['trained_length'])}, and the longest text that was measured has "
        f"{length_text(longest)}. Of what is longer nothing is known."
        if longest
        else f"It accepts {shape['positions']:,} positions, and was trained to "
        f"{length_text(shape['trained_length'])}. No length was measured."
    ]
    made = [stage for stage in stages if stage["kind"] != "quantisation"]
    if trainings == made and made and not any(stage["files"] for stage in trainings):
        limits.append(
            "All that it has read was generated by a program. It has learnt that task, and neither "
            "a language nor facts."
        )
    else:
        languages = sorted({name for s in stages for name in s.get("languages") or []})
        limits.append(
            f"Languages, by its source: {', '.join(languages)}."
            if languages
            else "The languages of its text are not recorded."
        )
    for stage in stages:
        if types := stage.get("quantised"):
            limits.append(
                f"The weights it began with were quantised ({', '.join(types)}): it can be no "
                "better than that copy of the original."
            )
    if any(map(_is_rounded, stages)):
        limits.append(
            "Its weights are rounded: figures of the weights that they were made from are not its."
        )
    if any(stage["kind"] == "missing" for stage in stages):
        limits.append("A stage before these was not found, so this history is not whole.")
    others = sorted({s["precision"] for s in suites if s["precision"]} - {shape["dtype"]})
    if others:
        limits.append(
            f"The figures were measured in {', '.join(others)}, and these weights are "
            f"{shape['dtype']}."
        )
    limits.append(f"Not measured: {', '.join(_unmeasured(facts))}.")
    return ["## Limits", "", *(f"- {limit}" for limit in limits)]


def _is_rounded(stage: Mapping[str, Any]) -> bool:
    """Whether weights became codes, and not the cache alone."""
    return stage["kind"] == "quantisation" and stage["scheme"] is not None


def _unmeasured(facts: Facts) -> list[str]:
    names = {suite["suite"] for suite in facts["suites"]}
    return [
        *([] if names & _RETRIEVAL else ["whether it finds what stands in a long text"]),
        *([] if names & {"perplexity", "parity"} else ["perplexity by position on text"]),
        *([] if "harness" in names else ["knowledge and reasoning"]),
        *([] if "judge" in names else ["whether it follows instructions"]),
        "bias, safety and truth of what it writes",
    ]


def _loading(facts: Facts) -> list[str]:
    shape, name = facts["shape"], facts["name"]
    if any(map(_is_rounded, facts["stages"])):
        return _loading_codes(facts)
    ours = "import ic.model  # knows the {}\n"
    if shape["extensions"]:
        first = ours.format("model: what it computes beyond DeepSeek-V3 needs this package")
    elif facts["own_tokenizer"]:
        first = ours.format("byte tokenizer; the model loads without it")
    else:
        first = ""
    chat = "chat=true " if facts["chat"] else ""
    return [
        "## How to load it",
        "",
        "```python",
        f"{first}from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        f'model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")',
        "```",
        "```",
        f'python -m ic generate checkpoint={name} {chat}prompt="..."',
        f"python -m ic evaluate checkpoint={name}",
        "```",
        *(
            []
            if first
            else ["", "The weights are in DeepSeek-V3's form: servers that know it load them."]
        ),
    ]


def _loading_codes(facts: Facts) -> list[str]:
    """Of quantised weights, which stay so where this package or a server loads them."""
    chat = "chat=true " if facts["chat"] else ""
    plain = (
        "The folder is in compressed-tensors' form of DeepSeek-V3: vLLM loads it, and transformers "
        "with the package compressed-tensors."
        if not facts["shape"]["extensions"]
        else "The folder is in compressed-tensors' form; a server needs this package's plugin for "
        "what the model computes beyond DeepSeek-V3."
    )
    return [
        "## How to load it",
        "",
        "```",
        f'python -m ic generate checkpoint={facts["name"]} {chat}prompt="..."',
        f"python -m ic evaluate checkpoint={facts['name']}",
        "```",
        "",
        plain,
    ]


def _made(facts: Facts) -> list[str]:
    made = facts["made"]
    return [
        "## How this page was made",
        "",
        f"InfiniteContext wrote it (commit {made['commit']}, {versions_text(made['versions'])}) "
        "from files that the measurements left; `model_card.json` holds what it found. Absolute "
        "paths are shortened to names. A page that was edited by hand is never replaced.",
    ]


def _numbers(shape: Facts, *names: str) -> str:
    return ", ".join(f"{shape[name]:,}" for name in names)


def _cells(lines: Sequence[Sequence[str]]) -> list[list[str]]:
    return [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]

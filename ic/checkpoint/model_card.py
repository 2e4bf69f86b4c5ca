"""The model card of a folder: `README.md`, from files that were measured and from nothing else.

`model_card.json` beside it holds the same facts for programs: what trains on from an export finds
there how its weights came about. Nothing in either tells where files lay, or the machine's name
(`ic.files.publishable`).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ic.checkpoint.card.figures import suites_of
from ic.checkpoint.card.files import CARD, CARD_FACTS, DIGEST, digest, is_edited
from ic.checkpoint.card.history import (
    CONVERSION,
    QUANTISATION,
    Stage,
    conversion_stage,
    quantisation_stage,
    saved,
    stages_of,
)
from ic.checkpoint.card.licence import hub_licence
from ic.checkpoint.card.page import page
from ic.checkpoint.folder import load_config
from ic.checkpoint.source import Source
from ic.checkpoint.weights import FolderWeights
from ic.files.atomic_write import replacing, write_json
from ic.files.publishable import publishable
from ic.files.results import describe_run, read_json
from ic.files.run_folder import ParityFolder
from ic.model.cost import cache_bytes_per_token, num_parameters

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def write_card(
    folder: Path,
    *,
    name: str | None = None,
    source: Source | None = None,
    licence: str | None = None,
) -> Path | None:
    """Write `README.md` and `model_card.json` into a folder of safetensors -> the page.

    Args:
        folder: with `config.json`, the tokenizer and the weights; a conversion's also with
            `conversion.json`.
        name: of the model; by default the folder's.
        source: what the weights were taken from, where that is another folder: its history, and
            unless this is a conversion what was measured of it, are told.
        licence: set by the user; None leaves it to the source.

    Returns:
        The page, or None where a README.md that a hand wrote or changed was left as it is.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    if is_edited(folder):
        return None
    facts = publishable(_facts(folder, name or folder.absolute().name, source, licence))
    text = f"---\n{_front_matter(facts).to_yaml()}\n---\n\n{page(facts)}"
    with replacing(folder / CARD) as partial:
        partial.write_text(text, encoding="utf-8")
    write_json(folder / CARD_FACTS, {**facts, DIGEST: digest(text.encode())})
    return folder / CARD


def refresh_card(parity: ParityFolder) -> None:
    """Tell a parity report in the card of the folder that it lies in, if that has a card."""
    folder = parity.path.absolute().parent
    if (
        ParityFolder.within(folder).path == parity.path.absolute()
        and (folder / CARD_FACTS).is_file()
    ):
        write_card(folder, name=saved(folder / CARD_FACTS).get("name"))


def _facts(folder: Path, name: str, source: Source | None, licence: str | None) -> dict[str, Any]:
    config = load_config(folder, quantised=True)
    sizes = FolderWeights(folder).sizes.values()
    stages = _stages(folder, source)
    settings = read_json(folder / "tokenizer_config.json")
    made = describe_run({})
    return {
        "name": name,
        "shape": {
            "parameters": num_parameters(config),
            "bytes": sum(tensor.nbytes for tensor in sizes),
            "dtype": ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in sizes})),
            "layers": config.num_hidden_layers,
            "hidden": config.hidden_size,
            "mlp": config.intermediate_size,
            "heads": config.num_attention_heads,
            "q_rank": config.q_lora_rank,
            "kv_rank": config.kv_lora_rank,
            "qk_nope": config.qk_nope_head_dim,
            "qk_rope": config.qk_rope_head_dim,
            "v": config.v_head_dim,
            "cache_bytes_per_token": cache_bytes_per_token(config),
            "vocabulary": config.vocab_size,
            "positions": config.max_position_embeddings,
            "trained_length": config.trained_length,
            "rope": json.dumps(config.rope_parameters),
            "extensions": config.extensions,
        },
        "chat": _converses(folder, stages),
        "own_tokenizer": settings.get("tokenizer_class") == "ByteTokenizer",
        "licence": _licence(licence, stages, saved(folder / CARD_FACTS).get("licence")),
        "stages": stages,
        "suites": suites_of(Source(folder) if source is None or _is_remade(folder) else source),
        "made": {key: made[key] for key in ("commit", "versions")},
    }


def _stages(folder: Path, source: Source | None) -> list[Stage]:
    """The stages that made a folder; a conversion and a quantisation come after those that made
    their source.
    """
    if source is not None and (folder / QUANTISATION).is_file():
        return [*stages_of(source), quantisation_stage(folder)]
    if source is not None and (folder / CONVERSION).is_file():
        return [*stages_of(source), conversion_stage(folder)]
    return stages_of(source or Source(folder))


def _is_remade(folder: Path) -> bool:
    """Whether a folder's weights are others than its source's, whose figures are not theirs."""
    return any((folder / name).is_file() for name in (CONVERSION, QUANTISATION))


def _converses(folder: Path, stages: list[Stage]) -> bool:
    """Whether there is a chat template that any stage can have taught."""
    settings = read_json(folder / "tokenizer_config.json")
    template = (folder / "chat_template.jinja").is_file() or "chat_template" in settings
    taught = any(
        stage["kind"] not in ("training", "quantisation")
        or stage.get("data") in ("sft", "preference")
        for stage in stages
    )
    return template and taught


def _licence(
    given: str | None, stages: list[Stage], before: dict[str, Any] | None
) -> dict[str, Any]:
    """The licence and who says so: the user, the card as it was, or what the stages began with."""
    if given is not None:
        return {"name": given.strip(), "said_by": "as whoever wrote this folder says"}
    if before is not None:
        return before
    for stage in stages:
        if stage.get("licence"):
            said_by = f"the licence of {stage.get('name') or stage.get('source')}"
            return {"name": stage["licence"], "said_by": said_by}
    return {"name": None, "said_by": None}


def _front_matter(facts: dict[str, Any]) -> ModelCardData:
    licence = hub_licence(facts["licence"]["name"])
    plain = not facts["shape"]["extensions"]
    bases = [
        stage["repository"]
        for stage in facts["stages"]
        if stage.get("repository") and _REPOSITORY.fullmatch(stage["repository"])
    ]
    languages = {name for stage in facts["stages"] for name in stage.get("languages") or []}
    results = [_result(metric) for suite in facts["suites"] for metric in suite["metrics"]]
    return ModelCardData(
        model_name=facts["name"],
        license=licence,
        license_name=facts["licence"]["name"] if licence == "other" else None,
        base_model=bases or None,
        language=sorted(languages) or None,
        library_name="transformers" if plain else "infinite-context",
        pipeline_tag="text-generation",
        tags=[
            "infinite-context",
            "mla",
            "multi-head-latent-attention",
            "long-context",
            *(["deepseek_v3"] if plain else []),
            *(["conversational"] if facts["chat"] else []),
        ],
        eval_results=results or None,
    )


def _result(metric: dict[str, Any]) -> EvalResult:
    length = metric["length_tokens"]
    task = f"{metric['task']}" if length is None else f"{metric['task']}, {length:,} tokens"
    return EvalResult(
        task_type="text-generation",
        dataset_type=metric["what"],
        dataset_name=f"{metric['what']}: {task} (n = {metric['n']})",
        dataset_config=task,
        metric_type=metric["metric"],
        metric_value=metric["value"],
    )

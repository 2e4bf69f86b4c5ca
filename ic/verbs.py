"""What each verb does, given its checked configuration."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
    track,
)
from rich.table import Table

from ic.ablation.run import run_ablation
from ic.atomic_write import replacing
from ic.build import (
    adapt_to_gpu,
    build_run,
    build_tokenizer,
    launch_ranks,
    load_for_inference,
    run_directory,
    write_config,
)
from ic.callbacks.checkpoint import (
    INTERRUPTED_EXIT_CODE,
    FolderCheckpoint,
    resolve_checkpoint,
    trained_length,
)
from ic.callbacks.improvement import BeforeAndAfter
from ic.callbacks.passkey import PasskeyEvaluation, run_grid
from ic.callbacks.requeue import SlurmRequeue
from ic.checkpoint.export import ExportConfig, export_checkpoint
from ic.config import EvaluateConfig, GenerateConfig, PlanConfig, RunConfig
from ic.datamodules.needle_pairs import MakePreferencesConfig, needle_pairs, write_pairs
from ic.doctor.examination import doctor
from ic.evaluation.heatmap import shown_name, summary_table, write_csv, write_png
from ic.ladder import run_ladder
from ic.model.cost import cache_bytes_per_token, num_parameters
from ic.parallel.context_parallel import ContextParallel
from ic.parallel.replica import sharing_ranks
from ic.results import passkey_rows, run_rows, write_results
from ic.resume import forget_checkpoints, is_of_run
from ic.scaling import run_scaling


def fit(config: RunConfig) -> int:
    """Train. Resumes with ckpt_path=last, or by itself after SLURM has requeued its job."""
    config = adapt_to_gpu(config)
    trainer, module, data, ckpt = build_run(config, training=True)
    run_dir = run_directory(config)
    if trainer.is_global_zero:
        if ckpt is None or not is_of_run(ckpt, run_dir):
            forget_checkpoints(run_dir)
        write_config(config, run_dir)
    model_config = module.model.config
    rank_zero_info(
        f"{config.name}: {num_parameters(model_config):,} parameters, "
        f"{cache_bytes_per_token(model_config):,} bytes of bf16 cache a token, run in {run_dir}"
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=True)
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()  # a sweep's next run in this process needs its own
    for callback in trainer.callbacks:
        if isinstance(callback, SlurmRequeue) and callback.interrupted:
            return callback.finish(trainer.is_global_zero)
    checkpoints = [c for c in trainer.callbacks if isinstance(c, FolderCheckpoint)]
    if any(c.interrupted for c in checkpoints):
        rank_zero_info(f"interrupted; continue with ckpt_path=last (run in {run_dir})")
        return INTERRUPTED_EXIT_CODE
    if trainer.is_global_zero:
        evaluations = [c for c in trainer.callbacks if isinstance(c, PasskeyEvaluation)]
        cells = evaluations[0].final_rows if evaluations else []
        changes = [
            row for c in trainer.callbacks if isinstance(c, BeforeAndAfter) for row in c.rows
        ]
        write_results(run_dir / "results.json", asdict(config), run_rows(run_dir, cells) + changes)
    if checkpoints:
        rank_zero_info(f"checkpoint: {run_dir / 'checkpoints' / 'last'}")
    return 0


def validate(config: RunConfig) -> int:
    """Loss and answer accuracy of a checkpoint on the validation set."""
    return _metrics(config, "validate")


def test(config: RunConfig) -> int:
    """Loss and answer accuracy of a checkpoint on the test set."""
    return _metrics(config, "test")


def predict(config: RunConfig) -> int:
    """Write a checkpoint's answers on the test set to `predictions.jsonl`."""
    trainer, module, data, _ = build_run(_with_weights(config), training=False)
    batches = trainer.predict(module, datamodule=data)
    path = run_directory(config) / "predictions.jsonl"
    rows = _rows_of_all_ranks(trainer, batches or [])
    if not trainer.is_global_zero:
        return 0
    with replacing(path) as partial:
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    Console().print(f"{len(rows)} predictions: {path}", soft_wrap=True, highlight=False)
    return 0


def _rows_of_all_ranks(trainer: Trainer, batches: list[Any]) -> list[dict[str, Any]]:
    """Rows of every rank's batches, in the order in which the ranks were dealt them."""
    dealt = [batches]
    if trainer.world_size > 1:
        place, _ = sharing_ranks(trainer)  # ranks that share a batch have the same rows
        dealt = [[]] * trainer.world_size
        torch.distributed.all_gather_object(dealt, batches if place == 0 else [])
    rounds = zip_longest(*dealt, fillvalue=[])
    return [row for one_each in rounds for batch in one_each for row in batch]


def evaluate(config: EvaluateConfig) -> int:
    """The passkey grid of a checkpoint folder: cells.jsonl, heatmap.csv, heatmap.png, a table."""
    sharing = config.context_parallel_size
    ranks = launch_ranks(
        config.accelerator, config.devices, config.num_nodes, exchange_tensors=sharing > 1
    )
    if sharing not in (1, ranks.world_size):
        raise ValueError(
            f"context_parallel_size={sharing} with {ranks.world_size} processes: choose 1 or "
            f"{ranks.world_size}, or change devices or num_nodes"
        )
    model, tokenizer = load_for_inference(config.checkpoint, config.accelerator, config.backends())
    if sharing > 1:
        model.model.context_parallel = ContextParallel()
    folder = Path(config.checkpoint)
    output = Path(config.output) if config.output else folder / "passkey"
    is_first = ranks.global_rank == 0
    rows = run_grid(
        model, tokenizer, config.evaluation, output / "cells.jsonl", quiet=not is_first,
        ranks=ranks if sharing == 1 else None, sharded=sharing > 1,
    )  # fmt: skip
    if not is_first:
        return 0
    write_csv(rows, output / "heatmap.csv")
    write_png(
        rows, output / "heatmap.png",
        title=f"{shown_name(folder)}: passkey retrieval on synthetic text",
        trained_length=config.trained_length or trained_length(folder),
    )  # fmt: skip
    write_results(output / "results.json", asdict(config), passkey_rows(rows))
    console = Console()
    console.print(summary_table(rows))
    console.print(f"heatmap: {output / 'heatmap.png'}", soft_wrap=True, highlight=False)
    return 0


def generate(config: GenerateConfig) -> int:
    """Continue a prompt; the text appears as it is generated."""
    from transformers import GenerationConfig, TextStreamer

    model: Any
    model, tokenizer = load_for_inference(config.checkpoint, config.accelerator, config.backends())
    prompt = sys.stdin.read() if config.prompt == "-" else config.prompt
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    if not ids.shape[1]:
        raise ValueError("prompt is empty: give at least one character")
    total = ids.shape[1] + config.max_new_tokens
    if total > model.config.max_position_embeddings:
        raise ValueError(
            f"prompt and max_new_tokens come to {total} tokens, but the model has "
            f"{model.config.max_position_embeddings} positions; shorten one of them"
        )
    torch.manual_seed(config.seed)
    greedy = config.temperature == 0
    chunk = config.prefill_chunk_tokens if ids.shape[1] > config.prefill_chunk_tokens else None
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        generation_config=GenerationConfig(
            max_new_tokens=config.max_new_tokens,
            do_sample=not greedy,
            temperature=None if greedy else config.temperature,
            top_p=None if greedy else config.top_p,
            prefill_chunk_size=chunk,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ),
    )
    return 0


def export(config: ExportConfig) -> int:
    """Write a checkpoint as Hugging Face safetensors."""
    columns = (TextColumn("export"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("export", total=None, visible=False)
        files = export_checkpoint(
            Path(config.checkpoint),
            Path(config.output),
            dtype=config.dtype,
            max_shard_size=config.max_shard_size,
            overwrite=config.overwrite,
            on_bytes=lambda done, total: progress.update(
                task, completed=done, total=total, visible=True
            ),
        )
    size = sum(file.stat().st_size for file in files)
    Console().print(
        f"{len(files)} safetensors file{'s' * (len(files) > 1)}, {size / 1e6:,.1f} MB: "
        f"{config.output}",
        soft_wrap=True, highlight=False,
    )  # fmt: skip
    return 0


def plan(config: PlanConfig) -> int:
    """Predict memory and speed; or measure what the predictions are compared with."""
    from ic.planning.cache_memory import measure_caches
    from ic.planning.compare import compare_with_scaling
    from ic.planning.measure import measure_cases
    from ic.planning.plan import Planner
    from ic.planning.report import print_plan

    if config.plan.measure:
        return measure_cases(config)
    if config.plan.cache:
        return measure_caches(config)
    if config.plan.compare:
        return compare_with_scaling(config)
    report = Planner(config).report()
    if config.json:
        print(json.dumps(report, indent=2))
    else:
        print_plan(report)
    return 0


def make_preferences(config: MakePreferencesConfig) -> int:
    """Write needle pairs for `data=preference`."""
    console = Console()
    rows = track(
        needle_pairs(config, build_tokenizer(config.tokenizer)), "pairs", config.num_pairs,
        console=console, disable=not console.is_terminal,
    )  # fmt: skip
    count = write_pairs(iter(rows), Path(config.output))
    console.print(f"{count} pairs: {config.output}", soft_wrap=True, highlight=False)
    return 0


def _with_weights(config: RunConfig) -> RunConfig:
    """A configuration whose model starts from the checkpoint that the verb was given."""
    if config.ckpt_path is None:
        raise ValueError("ckpt_path: say which checkpoint, for example ckpt_path=last")
    folder = resolve_checkpoint(run_directory(config), config.ckpt_path)
    config = adapt_to_gpu(config)
    return replace(config, ckpt_path=None, model=replace(config.model, init_from=str(folder)))


def _metrics(config: RunConfig, verb: str) -> int:
    trainer, module, data, _ = build_run(_with_weights(config), training=False)
    (metrics,) = getattr(trainer, verb)(module, datamodule=data, verbose=False)
    table = Table(title=f"{verb}, synthetic data" if config.data.name == "passkey" else verb)
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.6f}")
    Console().print(table)
    return 0


VERBS: dict[str, Any] = {
    "fit": fit,
    "validate": validate,
    "test": test,
    "predict": predict,
    "evaluate": evaluate,
    "generate": generate,
    "export": export,
    "plan": plan,
    "scaling": run_scaling,
    "ablation": run_ablation,
    "ladder": run_ladder,
    "doctor": doctor,
    "make-preferences": make_preferences,
}

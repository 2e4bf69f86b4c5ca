"""Peak memory and speed of preference training, ours beside TRL's trainer, on the same model.

Ours runs as it is and with `data.share_prompt=false`. All train every weight with AdamW on the same
needle pairs, one pair a step, in bfloat16 over float32 weights (float32 on a CPU), with gradient
checkpointing and a precomputed reference. Each side of each length runs in a process of its own, so
that neither meets what the other left; a side that runs out of memory gets a row that says so.
"""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer, seed_everything
from transformers import TrainerCallback

from ic.config.compose import compose_config
from ic.config.model import BaseModelConfig
from ic.config.run import RunConfig
from ic.datamodules.needle_pairs import needle_pairs, write_pairs
from ic.datamodules.needle_pairs_options import MakePreferencesOptions
from ic.datamodules.options import PreferenceDataOptions
from ic.datamodules.preference import PreferenceDataModule
from ic.files.results import write_results
from ic.model import MLAForCausalLM
from ic.model.byte_tokenizer import ByteTokenizer
from ic.studies.benchmark_preference_options import SIDES, TWICE, PreferenceBenchmarkOptions
from ic.training.options import OptimizerOptions, PreferenceOptions
from ic.training.preference import PreferenceModule

_OUT_OF_MEMORY = "out of memory"


class _Steps:
    """Wall time of each step; the first ones, in which kernels are chosen, are left out."""

    def __init__(self) -> None:
        self.times_s: list[float] = []
        self._began = 0.0

    def begin(self) -> None:
        _synchronize()
        self._began = time.perf_counter()

    def end(self) -> None:
        _synchronize()
        self.times_s.append(time.perf_counter() - self._began)


class _LightningSteps(_Steps, Callback):
    def on_train_batch_start(self, *args: Any) -> None:
        self.begin()

    def on_train_batch_end(self, *args: Any) -> None:
        self.end()


class _TransformersSteps(_Steps, TrainerCallback):
    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begin()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.end()


def benchmark_preference(options: PreferenceBenchmarkOptions) -> int:
    """Measure every length on every side; the results file is written anew after each.

    With `side`, measure that side of the one length in this process and print its row.
    """
    if options.side is not None:
        print(json.dumps(_measure(options)))
        return 0
    rows: list[dict[str, Any]] = []
    for length in options.lengths:
        for side in SIDES:
            rows.append(_in_own_process(replace(options, lengths=[length], side=side)))
            print(json.dumps(rows[-1]), flush=True)
            write_results(Path(options.output), asdict(options), rows, public=True)
    print(f"results: {options.output}")
    return 0


def _in_own_process(options: PreferenceBenchmarkOptions) -> dict[str, Any]:
    given = {**asdict(options), "lengths": f"[{options.lengths[0]}]"}
    command = [sys.executable, "-m", "ic", "benchmark", "preference"]
    command += [f"{key}={value}" for key, value in given.items()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    key = {"side": options.side, "length_tokens": options.lengths[0]}
    if done.returncode == 0:
        return {**key, **json.loads(done.stdout.splitlines()[-1])}
    if "OutOfMemoryError" in done.stderr:
        return {**key, "error": _OUT_OF_MEMORY}
    raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr[-4000:]}")


def _measure(options: PreferenceBenchmarkOptions) -> dict[str, Any]:
    """One side at one length, in this process."""
    (length,) = options.lengths
    composed, _ = compose_config("fit", RunConfig, [f"model={options.preset}"])
    model_config: BaseModelConfig = composed.model
    model_config.attention = options.attention
    model_config.gradient_checkpointing = True
    seed_everything(0, verbose=False)
    tokenizer = ByteTokenizer()
    model = model_config.build(tokenizer, options.vocab_size)
    total = options.steps + options.warmup
    pairs = MakePreferencesOptions(output="pairs.jsonl", lengths=[length], depths=[0.5], samples=2)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / pairs.output
        write_pairs(needle_pairs(pairs, tokenizer), file)
        if options.side == "trl":
            steps = _trl(model, tokenizer, file, length, total)
        else:
            steps = _ours(model, tokenizer, file, length, total, share_prompt=options.side != TWICE)
    timed = steps.times_s[options.warmup :]
    median = statistics.median(timed)
    on_gpu = torch.cuda.is_available()
    return {
        "n": len(timed),
        "step_median_s": round(median, 4),
        "step_min_s": round(min(timed), 4),
        "step_max_s": round(max(timed), 4),
        # Of both sequences, whether their prompt runs once or twice.
        "tokens_per_s": round(2 * length / median, 1),
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
    }


def _ours(
    model: MLAForCausalLM,
    tokenizer: ByteTokenizer,
    file: Path,
    length: int,
    total: int,
    *,
    share_prompt: bool,
) -> _Steps:
    steps = _LightningSteps()
    data = PreferenceDataModule(
        PreferenceDataOptions(
            train_files=[str(file)],
            context_length=length,
            tokens_per_batch=2 * length,
            share_prompt=share_prompt,
        ),
        tokenizer,
    )
    module = PreferenceModule(
        model, tokenizer, OptimizerOptions(name="adamw", lr=1e-6), PreferenceOptions()
    )
    trainer = Trainer(
        max_steps=total,
        accelerator="auto",
        devices=1,
        gradient_clip_val=1.0,
        logger=False,
        precision="bf16-mixed" if torch.cuda.is_available() else "32-true",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[steps],
        default_root_dir=file.parent,
    )
    trainer.fit(module, datamodule=data)
    return steps


def _trl(
    model: MLAForCausalLM, tokenizer: ByteTokenizer, file: Path, length: int, total: int
) -> _Steps:
    import trl
    from datasets import load_dataset

    steps = _TransformersSteps()
    on_gpu = torch.cuda.is_available()
    arguments = trl.DPOConfig(
        str(file.parent),
        max_steps=total,
        per_device_train_batch_size=1,
        max_length=None,
        precompute_ref_log_probs=True,
        gradient_checkpointing=True,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        max_grad_norm=1.0,
        learning_rate=1e-6,
        optim="adamw_torch",
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    dataset = load_dataset("json", data_files=str(file), split="train", cache_dir=str(file.parent))
    trainer = trl.DPOTrainer(
        model, None, arguments, train_dataset=dataset, processing_class=tokenizer, callbacks=[steps]
    )
    trainer.train()
    return steps


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()

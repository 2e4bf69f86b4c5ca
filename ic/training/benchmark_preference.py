"""Peak memory and speed of preference training, ours beside TRL's trainer, on the same model.

    python -m ic.training.benchmark_preference --lengths 32768 65536

Ours runs as it is and with `data.share_prompt=false`. All train every weight with AdamW on the same
needle pairs, one pair a step, in bfloat16 over float32 weights (float32 on a CPU), with gradient
checkpointing and a precomputed reference. Each side of each length runs in a process of its own, so
that neither meets what the other left; a side that runs out of memory gets a row that says so.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer, seed_everything
from transformers import TrainerCallback

from ic.build import build_model, vocabulary_size
from ic.cli import CONF
from ic.config import ModelConfig
from ic.datamodules.byte_tokenizer import ByteTokenizer
from ic.datamodules.needle_pairs import MakePreferencesConfig, needle_pairs, write_pairs
from ic.datamodules.preference import PreferenceDataConfig, PreferenceDataModule
from ic.model import MLAForCausalLM
from ic.overrides import compose_config
from ic.results import write_results
from ic.training.optimizers import OptimizerConfig
from ic.training.preference import PreferenceModule
from ic.training.preference_loss import PreferenceConfig

_TWICE = "ours, prompt twice"
SIDES = ("ours", _TWICE, "trl")
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


def main(argv: list[str] | None = None) -> int:
    """Measure every length on both sides and write the results file."""
    parser = argparse.ArgumentParser(prog="python -m ic.training.benchmark_preference")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 65536], metavar="TOKENS")
    parser.add_argument("--model", default="mla_1b", help="an option of the group model")
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=129280,
        help="rows of embedding and head, 129280 in DeepSeek-V3; the text is bytes all the same",
    )
    parser.add_argument("--attention", default="torch", help="torch or triton, for both sides")
    parser.add_argument("--steps", type=int, default=5, help="steps timed, after --warmup")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--output", default="docs/results/preference-memory.json")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.vocab_size < (least := vocabulary_size(ByteTokenizer())):
        parser.error(f"--vocab-size {args.vocab_size}: at least {least}")
    if args.side:
        print(json.dumps(_measure(args)))
        return 0
    rows = []
    for length in args.lengths:
        for side in SIDES:
            row = _run(args, length, side)
            rows.append(row)
            print(json.dumps(row), flush=True)
    config = {key: value for key, value in vars(args).items() if key != "side"}
    arguments = shlex.join(sys.argv[1:] if argv is None else argv)
    write_results(
        Path(args.output), config, rows,
        command=f"python -m ic.training.benchmark_preference {arguments}",
    )  # fmt: skip
    print(f"results: {args.output}")
    return 0


def _run(args: argparse.Namespace, length: int, side: str) -> dict[str, Any]:
    command = [
        sys.executable, "-m", "ic.training.benchmark_preference", "--side", side,
        "--lengths", str(length), "--model", args.model, "--attention", args.attention,
        "--steps", str(args.steps), "--warmup", str(args.warmup),
        "--vocab-size", str(args.vocab_size),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    key = {"side": side, "length_tokens": length}
    if done.returncode == 0:
        return {**key, **json.loads(done.stdout.splitlines()[-1])}
    if "OutOfMemoryError" in done.stderr:
        return {**key, "error": _OUT_OF_MEMORY}
    raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    """One side at one length, in this process."""
    (length,) = args.lengths
    composed, _ = compose_config(CONF, "fit", [f"model={args.model}"])
    model_config: ModelConfig = composed.model
    model_config.attention = args.attention
    model_config.gradient_checkpointing = True
    seed_everything(0, verbose=False)
    tokenizer = ByteTokenizer()
    model = build_model(model_config, tokenizer, args.vocab_size)
    total = args.steps + args.warmup
    pairs = MakePreferencesConfig(output="pairs.jsonl", lengths=[length], depths=[0.5], samples=2)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / pairs.output
        write_pairs(needle_pairs(pairs, tokenizer), file)
        if args.side == "trl":
            steps = _trl(model, tokenizer, file, length, total)
        else:
            steps = _ours(model, tokenizer, file, length, total, share_prompt=args.side != _TWICE)
    timed = steps.times_s[args.warmup :]
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
        PreferenceDataConfig(
            train_files=[str(file)],
            context_length=length,
            tokens_per_batch=2 * length,
            share_prompt=share_prompt,
        ),
        tokenizer,
    )
    module = PreferenceModule(
        model, tokenizer, OptimizerConfig(name="adamw", lr=1e-6), PreferenceConfig()
    )
    trainer = Trainer(
        max_steps=total, accelerator="auto", devices=1, gradient_clip_val=1.0, logger=False,
        precision="bf16-mixed" if torch.cuda.is_available() else "32-true",
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[steps], default_root_dir=file.parent,
    )  # fmt: skip
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
        str(file.parent), max_steps=total, per_device_train_batch_size=1, max_length=None,
        precompute_ref_log_probs=True, gradient_checkpointing=True, bf16=on_gpu, use_cpu=not on_gpu,
        max_grad_norm=1.0, learning_rate=1e-6, optim="adamw_torch", report_to="none",
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    dataset = load_dataset("json", data_files=str(file), split="train", cache_dir=str(file.parent))
    trainer = trl.DPOTrainer(
        model, None, arguments, train_dataset=dataset, processing_class=tokenizer, callbacks=[steps]
    )
    trainer.train()
    return steps


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())

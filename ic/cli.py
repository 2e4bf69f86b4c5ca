"""The command line: verb and flags -> Hydra overrides -> composed configuration -> checked
dataclasses.

Errors end here: bad input is one readable line on stderr and exit code 2.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from ic.overrides import UsageError, compose_config, describe_groups, split_flags

CONF = Path(__file__).parent / "conf"
USAGE_EXIT_CODE = 2
# A folder or file given by the user that is not there or may not be used.
_PATH_ERRORS = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR,
    errno.ENAMETOOLONG,
}  # fmt: skip

VERBS = {
    "fit": "train a model (pre-training, SFT, DPO); resumes with ckpt_path=last",
    "validate": "loss and answer accuracy of a checkpoint on validation data",
    "test": "loss and answer accuracy of a checkpoint on test data",
    "predict": "write a checkpoint's answers on test data to predictions.jsonl",
    "evaluate": "passkey heatmap of a checkpoint folder",
    "generate": "continue a prompt with a checkpoint folder",
    "export": "write a checkpoint as Hugging Face safetensors, without a GPU",
    "plan": "memory by part and tokens/s of a run on GPUs that are not here",
    "scaling": "time training under different strategies on the GPUs of this host",
    "ablation": "train variants over several seeds for equal time and compare their retrieval",
    "ladder": "train the stages mla_4k to mla_1m one after another; skips finished ones",
    "doctor": "check versions, GPUs, NCCL, file system and SLURM, and say what to fix",
    "make-preferences": "write needle pairs for preference training (data=preference)",
}

EXAMPLES = {
    "fit": "python -m ic fit experiment=mla_tiny trainer.max_steps=100",
    "validate": "python -m ic validate experiment=mla_tiny ckpt_path=last",
    "test": "python -m ic test experiment=mla_tiny ckpt_path=best",
    "predict": "python -m ic predict experiment=mla_tiny ckpt_path=last",
    "evaluate": "python -m ic evaluate checkpoint=runs/mla_tiny/default/checkpoints/last",
    "export": "python -m ic export checkpoint=runs/mla_tiny/default/checkpoints/last output=FOLDER",
    "generate": 'python -m ic generate checkpoint=PATH prompt="The pass key is"',
    "plan": "python -m ic plan experiment=mla_1m plan.gpu=h100 plan.num_gpus=4",
    "scaling": "python -m ic scaling scaling.output=docs/results/scaling.json",
    "ablation": "python -m ic ablation ablation.max_time_s=60 'ablation.only=[base,no curriculum]'",
    "ladder": "python -m ic ladder",
    "doctor": "python -m ic doctor --output_dir /scratch/runs --json",
    "make-preferences": "python -m ic make-preferences output=pairs.jsonl lengths=[4096,32768]",
}


def main(argv: list[str] | None = None) -> None:
    """Entry point; exits with 0, 2 for bad input, 130 after Ctrl-C, 1 for anything unforeseen."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(args)
    except (ValueError, OSError) as error:
        code = _complain(error)
    except KeyboardInterrupt:
        print("ic: interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def _complain(error: ValueError | OSError) -> int:
    """Print bad input, or a path that cannot be used, in one line; raise any other error."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError):
        if error.errno not in _PATH_ERRORS or not error.filename:
            raise error
        text = f"{error.filename}: {error.strerror}"
    if os.environ.get("IC_TRACEBACK"):
        raise error
    print(f"ic: {text}", file=sys.stderr)
    return USAGE_EXIT_CODE


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(_verb_list())
        return 0
    verb, rest = args[0], args[1:]
    if verb == "benchmark":
        return _benchmark(rest)
    if verb not in VERBS:
        raise UsageError.unknown("verb", verb, [*VERBS, "benchmark"])
    flags, overrides = split_flags(rest)
    if "help" in flags:
        print(_help(verb, overrides))
        return 0
    if "multirun" in flags:
        return _multirun(verb, overrides)
    config, text = compose_config(CONF, verb, overrides)
    if "print_config" in flags:
        print(text, end="")
        return 0
    return _execute(verb, config)


def _benchmark(args: list[str]) -> int:
    """The kernels' benchmark has no configuration, only arguments of its own (`--help`)."""
    try:
        from ic.kernels.benchmark_mla import main as benchmark
    except ModuleNotFoundError as error:
        raise UsageError(f"benchmark needs Triton, which is not installed here: {error}") from error
    return benchmark(args)


def _execute(verb: str, config: Any) -> int:
    _quieten()
    from ic import verbs

    return verbs.VERBS[verb](config)


def _multirun(verb: str, overrides: list[str]) -> int:
    """Hydra's own sweep over comma-separated values, through any launcher plugin."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import DictConfig

    from ic.overrides import to_dataclasses

    code = 0

    def job(cfg: DictConfig) -> None:
        nonlocal code
        # The folder must not depend on the order of the sweep: a requeued job looks for its own.
        named = HydraConfig.get().job.override_dirname
        if "run_id" in cfg and named:
            cfg.run_id = f"{cfg.run_id},{named}".replace("/", "-").replace(" ", "")
        try:
            code = max(code, _execute(verb, to_dataclasses(verb, cfg)))
        except (ValueError, OSError) as error:
            # Hydra would print a traceback and exit with 1.
            raise SystemExit(_complain(error)) from error

    # Refuse a wrong key with our message before Hydra starts: sweeps differ in values alone.
    compose_config(CONF, verb, [o for o in overrides if "," not in o and "hydra" not in o])
    sys.argv = [f"ic {verb}", "--multirun", *overrides, *_SWEEP_SETTINGS]
    hydra.main(version_base="1.3", config_path=str(CONF), config_name=verb)(job)()
    return code


_SWEEP_SETTINGS = [
    # Not `disabled`: that silences every logger that exists, Lightning's and ours too.
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
    "hydra.sweep.dir=runs/sweeps/${now:%Y-%m-%d_%H-%M-%S}",
    "hydra.job.config.override_dirname.exclude_keys=[experiment,run_id,name,output_dir]",
]


def _verb_list() -> str:
    shown = {**VERBS, "benchmark": "check and time the Triton kernels on a GPU (own --help)"}
    width = max(map(len, shown))
    lines = [f"  {verb:<{width}}  {text}" for verb, text in shown.items()]
    return "\n".join(
        [
            "usage: python -m ic VERB [overrides]",
            "",
            *lines,
            "",
            "`python -m ic VERB --help` shows a verb's configuration, `--print_config` the result.",
            "Overrides are Hydra's (trainer.max_steps=100) or flags (--trainer.max_steps 100).",
        ]
    )


def _help(verb: str, overrides: list[str]) -> str:
    _, text = compose_config(CONF, verb, overrides, check=False)
    groups = [f"  {group:<12} {', '.join(names)}" for group, names in describe_groups(CONF, verb)]
    return "\n".join(
        [
            f"usage: python -m ic {verb} [overrides]",
            "",
            f"{VERBS[verb]}",
            "",
            f"example: {EXAMPLES[verb]}",
            "",
            *(["groups (choose with group=name):", *groups, ""] if groups else []),
            "flags: --help, --print_config, --multirun (-m) with comma-separated values",
            "overrides: key=value, --key=value or --key value; key=null turns a part off",
            "",
            "configuration:",
            text.rstrip(),
        ]
    )


def _quieten() -> None:
    """Keep the libraries' advice off a terminal that shows progress."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for pattern in (
        ".*does not have many workers.*", ".*Checkpoint directory .* exists.*",
        ".*isinstance.*LeafSpec.*", ".*is not supported on TensorBoard.*", ".*srun.*",
        ".*weights_only.*", ".*mid-epoch.*", ".*logger.*already.*", ".*in eval mode at the start.*",
    ):  # fmt: skip
        warnings.filterwarnings("ignore", pattern)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    _plain_log()


class _NoAdvice(logging.Filter):
    """Drops what Lightning says on every run, whatever the run."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(
            ("💡 Tip", "TPU available", "GPU available", "`weights_only` was not set",
             "`Trainer(limit_val_batches")
        )  # fmt: skip


def _plain_log() -> None:
    """Lightning's messages as plain lines on today's stderr, each once."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_NoAdvice())
    for name in ("lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False


if __name__ == "__main__":
    main()

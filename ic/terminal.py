"""What the libraries print on a terminal that shows progress: their advice stays off it."""

from __future__ import annotations

import logging
import os
import sys
import warnings


def launched_rank() -> int:
    """This process's place among those that torchrun, srun or Lightning has started; 0 alone."""
    ranks = (os.environ.get(name) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))
    return int(next((rank for rank in ranks if rank), "0"))


def is_first_process() -> bool:
    """Whether this process speaks for all of them."""
    return launched_rank() == 0


def quieten() -> None:
    """Keep the libraries' advice off a terminal that shows progress."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # No verb opens a window. A notebook's backend, which its shells inherit, cannot be loaded here.
    os.environ["MPLBACKEND"] = "agg"
    for pattern in (
        ".*does not have many workers.*",
        ".*Checkpoint directory .* exists.*",
        ".*isinstance.*LeafSpec.*",
        ".*is not supported on TensorBoard.*",
        ".*srun.*",
        ".*weights_only.*",
        ".*mid-epoch.*",
        ".*logger.*already.*",
        ".*Total length of `list` across ranks is zero.*",  # the datamodules say it in their words
        ".*in eval mode at the start.*",
        ".*gradient_checkpointing_(en|dis)able.* is deprecated.*",
    ):
        warnings.filterwarnings("ignore", pattern)
    # transformers loads torchao wherever it is installed. It warns of kernels of its own that this
    # build of PyTorch cannot load, and PyTorch of how it names its constants.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    _plain_log()


class _NoAdvice(logging.Filter):
    """Drops what Lightning says on every run, whatever the run."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(
            (
                "\nDetected KeyboardInterrupt",  # the command line says what to do
                "💡 Tip",
                "TPU available",
                "GPU available",
                "`weights_only` was not set",
                "`Trainer(limit_val_batches",
            )
        )


def _plain_log() -> None:
    """Lightning's messages as plain lines on today's stderr, each once."""
    import lightning.pytorch  # noqa: F401  # adds handlers of its own, which these replace

    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_NoAdvice())
    for name in ("lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False

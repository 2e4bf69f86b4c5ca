"""What the model writes, while it learns to."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from ic.callbacks.memory_profiler import memory_phase
from ic.callbacks.options import SamplesOptions
from ic.callbacks.throughput import throughput_paused
from ic.files.json_lines import append_row, read_rows, write_rows
from ic.files.run_folder import RunFolder
from ic.inference.engine.request import Sampling
from ic.inference.engine.sampler import Sampler
from ic.model import MLAForCausalLM
from ic.parallel.sharded_strategy import ShardedStrategy
from ic.tracking.never_fails import NeverFails


class Samples(Callback):
    """Continues prompts after validations, prints the texts and logs them.

    Each is a line of `samples.jsonl` in the run's folder. The draws follow the seed alone, the same
    each time, so that texts differ through the model alone and the training's generators are left
    as they are. Where the model is sharded, all processes write the
    same text together; otherwise rank 0 writes it.

    Raises:
        ValueError: when training starts, if there is no validation to sample after.
    """

    def __init__(self, config: SamplesOptions) -> None:
        self.config = config
        self._num_validations = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not sum(trainer.num_val_batches):
            raise ValueError(
                "callbacks.samples writes after validations, and this run has none: give "
                "data.val_files or data.val_fraction, or set callbacks.samples=null"
            )
        if trainer.is_global_zero:
            # What a run wrote after the checkpoint that it goes on from, it writes again.
            file = RunFolder(trainer.default_root_dir).samples
            if rows := read_rows(file):
                write_rows(file, [row for row in rows if row["step"] <= trainer.global_step])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._num_validations += 1
        if self._num_validations % self.config.every_n_validations:
            return
        sharded = isinstance(trainer.strategy, ShardedStrategy)
        if not sharded and not trainer.is_global_zero:
            return
        for place, prompt in enumerate(self.config.prompts):
            text = self._write(trainer, pl_module, prompt)
            if trainer.is_global_zero:
                self._show(trainer, place, prompt, text)

    def state_dict(self) -> dict[str, Any]:
        return {"num_validations": self._num_validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._num_validations = state_dict["num_validations"]

    def _write(self, trainer: Trainer, pl_module: LightningModule, prompt: str) -> str:
        module: Any = pl_module
        tokenizer, strategy = module.tokenizer, trainer.strategy
        ids_T = torch.tensor(tokenizer(prompt)["input_ids"], device=pl_module.device)
        with (
            memory_phase(trainer, "samples"),
            throughput_paused(trainer),
            trainer.precision_plugin.forward_context(),
            strategy.gathered() if isinstance(strategy, ShardedStrategy) else nullcontext(),
        ):
            # The hook runs in evaluation mode still.
            sampling = Sampling(
                max_tokens=self.config.max_new_tokens,
                temperature=self.config.temperature,
                top_p=self.config.top_p,
                seed=self.config.seed,
            )
            tokens = continued(module.model, ids_T, sampling, tokenizer.eos_token_id)
        return str(tokenizer.decode(tokens))

    def _show(self, trainer: Trainer, place: int, prompt: str, text: str) -> None:
        step = trainer.global_step
        rank_zero_info(f"step {step}: {prompt!r} goes on: {text}")
        append_row(
            RunFolder(trainer.default_root_dir).samples,
            {"step": step, "prompt": prompt, "text": text},
        )
        for logger in trainer.loggers:
            if isinstance(logger, NeverFails):
                logger.log_written(f"samples/{place}", prompt + text, step)


@torch.no_grad()  # not inference mode: sharded parameters gathered in it could not be trained
def continued(
    model: MLAForCausalLM, ids_T: Tensor, sampling: Sampling, end: int | None
) -> list[int]:
    """Tokens that follow a prompt (T,), up to `end`, which is left out; none follow logits that are
    no numbers.

    The engine would not do: a model that is sharded is run by all processes in step.
    """
    cache = model.model.new_cache(len(ids_T) + sampling.max_tokens)
    sampler = Sampler(model.config.vocab_size, 1, ids_T.device)
    slot = sampler.add(sampling, ids_T.tolist())
    found: list[int] = []
    step_1T = ids_T[None]
    while len(found) < sampling.max_tokens:
        logits = model(step_1T, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        (draw,) = sampler.draw(logits[:, -1], [slot]).fetch()
        if draw.token_id is None or draw.token_id == end:
            break
        found.append(draw.token_id)
        step_1T = torch.full_like(ids_T[None, :1], draw.token_id)
    return found

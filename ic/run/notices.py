"""What a run says before its first step about a configuration that works, but may surprise."""

from __future__ import annotations

from torch import nn

from ic.config.run import RunConfig
from ic.run.resume import Start


def notices(config: RunConfig, start: Start) -> list[str]:
    """A line for each thing that the configuration asks for and the user may not mean."""
    lines = []
    model, trainer, optimizer = config.model, config.trainer, config.optimizer
    if model.adapter is not None and model.init_from is None and start.checkpoint is None:
        lines.append(
            "model/adapter=lora on random weights: what stays frozen was never trained. Give a "
            "trained model with model.init_from=, or leave the adapter out to train every weight"
        )
    if model.fp8 is not None and trainer.accelerator != "cpu" and not model.compile:
        lines.append(
            f"model.fp8={model.fp8} without model.compile=true: the casts to FP8 are launched one "
            "by one, which may take longer than the products save"
        )
    if 0 < trainer.max_steps < optimizer.warmup_steps:
        lines.append(
            f"optimizer.warmup_steps={optimizer.warmup_steps} is beyond "
            f"trainer.max_steps={trainer.max_steps}: the learning rate never reaches "
            f"optimizer.lr={optimizer.lr:g}; lower warmup_steps or take more steps"
        )
    return lines


def trained(model: nn.Module) -> str:
    """`12,288 of 666,700 trainable, ` where some parameters are frozen; nothing where none is."""
    whole = sum(parameter.numel() for parameter in model.parameters())
    free = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return "" if free == whole else f"trainable {free:,} of {whole:,} parameters, "

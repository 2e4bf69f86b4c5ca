"""The linear layer that multiplies in FP8 while it trains: torchao's, and a plain one otherwise."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.float8.float8_linear import Float8Linear


class TrainedInFP8(Float8Linear):
    """torchao's `Float8Linear` in training, and `nn.Linear` in evaluation.

    So a run validates and answers with what it saves: the weights themselves, whose products are
    those of every later use. Decoding, which reads matrices past their layers, finds a plain one.
    """

    is_linear_in_evaluation = True  # read by ic.model.plain_layers

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return F.linear(input, self.weight, self.bias)
        device = input.device.type
        if torch.is_autocast_enabled(device):  # torchao asks for CUDA's alone
            input = input.to(torch.get_autocast_dtype(device))
        return super().forward(input)


def convert(model: nn.Module, names: set[str], recipe: str, *, emulate: bool) -> None:
    """Make the linear layers of these whole names `TrainedInFP8`, in place.

    Args:
        recipe: torchao's name of it.
        emulate: multiply the rounded operands in float32, which any device can.
    """
    config = replace(
        Float8LinearConfig.from_recipe_name(recipe),
        emulate=emulate,
        pad_inner_dim=True,  # of the weight's gradient it is the number of tokens
    )
    convert_to_float8_training(model, module_filter_fn=lambda _, name: name in names, config=config)
    for name in names:
        model.get_submodule(name).__class__ = TrainedInFP8

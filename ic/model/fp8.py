"""FP8 matrix products in training: which linear layers multiply in FP8, by torchao's float8.

torchao (https://github.com/pytorch/ao, `torchao.float8`) casts the operands of a linear layer's
three products, those of the output and of both gradients, with scales made anew in every step.
Weights, gradients and the optimizer's state keep their types and names, so checkpoints and exports
do not know of it.

torchao comes with the extra `fp8` and is imported where it is needed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from importlib.util import find_spec

from torch import nn

from ic.model.indexer_options import INDEXER_WEIGHTS

FIRST_FP8 = (8, 9)
"""The compute capability from which on matrix units multiply FP8."""
MULTIPLE = 16
"""What the sizes of both operands of an FP8 product are multiples of."""
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True)
class Fp8Layers:
    """The linear layers of the decoder by what becomes of them, by their whole names.

    Attributes:
        converted: multiply in FP8.
        kept: stay because the configuration says so.
        misfits: stay because of their sizes.
    """

    converted: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        all_layers = len(self.converted) + len(self.kept) + len(self.misfits)
        return (
            f"{len(self.converted)} of {all_layers} linear layers multiply in FP8, "
            f"{len(self.kept)} are kept, {len(self.misfits)} have sizes that are no multiples of "
            f"{MULTIPLE}"
        )


def check_fp8(recipe: str, capability: tuple[int, int] | None) -> None:
    """Refuse FP8 products that this machine cannot compute; a CPU emulates them.

    Args:
        recipe: as the configuration has it.
        capability: compute capability of the GPU, None on a CPU.

    Raises:
        ValueError: torchao is not installed, or the GPU is too old.
    """
    if find_spec("torchao") is None:
        raise ValueError(
            f"model.fp8={recipe} needs torchao, which is not installed: pip install "
            "'infinite-context[fp8]', or set model.fp8=null"
        )
    if capability is not None and capability < FIRST_FP8:
        raise ValueError(
            f"model.fp8={recipe}: this GPU is of compute capability "
            f"{capability[0]}.{capability[1]}, and FP8 products begin with "
            f"{FIRST_FP8[0]}.{FIRST_FP8[1]}; set model.fp8=null"
        )


def choose_layers(model: nn.Module, keep_layers: list[int], keep: list[str]) -> Fp8Layers:
    """Which linear layers multiply in FP8; the same before and after they do.

    Args:
        model: with decoder layers in a list called `layers`. What lies outside them, such as the
            head, and an indexer are never chosen.
        keep_layers: indices of decoder layers that stay, negative ones from the end.
        keep: names of linear layers that stay in every decoder layer.

    Raises:
        ValueError: an index or a name that the model does not have, or nothing is left to convert.
    """
    linear = {
        name: (int(found[1]), module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and INDEXER_WEIGHTS not in name
        and (found := _LAYER.search(name))
    }
    count = 1 + max((index for index, _ in linear.values()), default=-1)
    if outside := [index for index in keep_layers if not -count <= index < count]:
        raise ValueError(
            f"model.fp8_keep_layers={keep_layers}: the model has no decoder layer {outside[0]}; "
            f"choose from {-count} to {count - 1}"
        )
    names = {name.rpartition(".")[2] for name in linear}
    if unknown := sorted(set(keep) - names):
        raise ValueError(
            f"model.fp8_keep={keep}: the decoder has no linear layer {', '.join(unknown)}; choose "
            f"from {', '.join(sorted(names))}"
        )
    chosen, kept_layers = Fp8Layers(), {index % count for index in keep_layers}
    for name, (index, module) in linear.items():
        if index in kept_layers or name.rpartition(".")[2] in keep:
            chosen.kept.append(name)
        elif module.in_features % MULTIPLE or module.out_features % MULTIPLE:
            chosen.misfits.append(name)
        else:
            chosen.converted.append(name)
    if not chosen.converted:
        raise ValueError(
            f"model.fp8: no layer would multiply in FP8 (model.fp8_keep_layers={keep_layers}, "
            f"fp8_keep={keep}: {chosen}); keep fewer, or set model.fp8=null"
        )
    return chosen


def use_fp8(
    model: nn.Module,
    recipe: str,
    capability: tuple[int, int] | None,
    keep_layers: list[int],
    keep: list[str],
) -> Fp8Layers:
    """Let linear layers of the model's decoder multiply in FP8 while they train, in place.

    Args:
        recipe, capability: as of `check_fp8`; a CPU multiplies the rounded operands in float32.
        keep_layers, keep: as of `choose_layers`.

    Returns:
        what became of each linear layer of the decoder.

    Raises:
        ValueError: as of `check_fp8` and `choose_layers`.
    """
    check_fp8(recipe, capability)
    chosen = choose_layers(model, keep_layers, keep)
    from ic.model.fp8_linear import convert

    convert(model, set(chosen.converted), recipe, emulate=capability is None)
    return chosen

"""Muon (https://kellerjordan.github.io/posts/muon/) with matrices of one shape in one stack.

`torch.optim.Muon` orthogonalises matrix by matrix, which launches about thirty small kernels for
each: 210 matrices of a model of 135M parameters keep a CPU busy for longer than the GPU. Here every
stack is orthogonalised by one chain of batched products, with the same numbers in each matrix. On a
CPU that does not multiply bfloat16 they are more exact, since that chain runs in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim._muon import _adjust_lr

STACK_NUMBERS = 2**26
"""Numbers of a stack at most, if it has two matrices: each takes some 14 bytes in bfloat16."""


class BatchedMuon(torch.optim.Muon):
    """`torch.optim.Muon` with the same settings, state and result, in fewer launches.

    Attributes:
        dtype: in which matrices are orthogonalised; None is `newton_schulz_dtype` of their device.
    """

    dtype: torch.dtype | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            matrices: list[Tensor] = []
            gradients: list[Tensor] = []
            momenta: list[Tensor] = []
            self._init_group(group, matrices, gradients, momenta)
            for some in self._stacks(matrices):
                whole = [matrices[i] for i in some]
                directions = _directions(
                    group,
                    self._own([gradients[i] for i in some]),
                    self._own([momenta[i] for i in some]),
                )
                orthogonal_LMN = self._orthogonalize(group, whole, directions)
                _take_off(group, whole[0].shape, self._own(whole), orthogonal_LMN)
        return loss

    def _stacks(self, matrices: list[Tensor]) -> Iterator[list[int]]:
        """The indices of the matrices that are worked on at once."""
        return stacks(matrices, STACK_NUMBERS)

    def _own(self, tensors: list[Tensor]) -> list[Tensor]:
        """The rows of each that are this process's."""
        return tensors

    def _orthogonalize(
        self, group: dict[str, Any], matrices: list[Tensor], directions: list[Tensor]
    ) -> Tensor:
        """This process's rows of the orthogonal form of each direction."""
        return orthogonalize(torch.stack(directions), group, self._dtype_of(matrices))

    def _dtype_of(self, matrices: list[Tensor]) -> torch.dtype:
        return self.dtype or newton_schulz_dtype(matrices[0].device)


def stacks(matrices: list[Tensor], most_numbers: int) -> Iterator[list[int]]:
    """Indices of matrices of one shape, type and device: in a stack of `most_numbers` or of one."""
    alike: dict[tuple[Any, ...], list[int]] = {}
    for index, matrix in enumerate(matrices):
        alike.setdefault((matrix.shape, matrix.dtype, matrix.device), []).append(index)
    for (shape, *_), indices in alike.items():
        length = max(1, most_numbers // max(1, shape.numel()))
        for start in range(0, len(indices), length):
            yield indices[start : start + length]


def newton_schulz_dtype(device: torch.device) -> torch.dtype:
    """bfloat16, as in `torch.optim.Muon`, but float32 on a CPU that does not multiply bfloat16.

    PyTorch does so through oneDNN, on a CPU with instructions for it (AVX512_BF16, Arm's BF16);
    elsewhere its products of bfloat16 take tens of times as long as those of float32.
    """
    if device.type != "cpu":
        return torch.bfloat16
    instructions = torch.cpu.get_capabilities()
    multiplies = instructions.get("avx512_bf16", False) or instructions.get("bf16", False)
    return torch.bfloat16 if multiplies and torch.backends.mkldnn.is_available() else torch.float32


def orthogonalize(matrices_LMN: Tensor, group: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """`torch.optim.Muon`'s Newton-Schulz iteration of each of L matrices, in `dtype`."""
    a, b, c = group["ns_coefficients"]
    tall = matrices_LMN.size(1) > matrices_LMN.size(2)
    x_LMN = matrices_LMN.to(dtype)
    if tall:
        x_LMN = x_LMN.mT
    norm_L11 = torch.linalg.vector_norm(x_LMN, dim=(1, 2), keepdim=True)
    x_LMN = x_LMN / norm_L11.clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram_LMM = torch.bmm(x_LMN, x_LMN.mT)
        gram_LMM = torch.baddbmm(gram_LMM, gram_LMM, gram_LMM, beta=b, alpha=c)
        x_LMN = torch.baddbmm(x_LMN, gram_LMM, x_LMN, beta=a)
    return x_LMN.mT if tall else x_LMN


def _directions(
    group: dict[str, Any], gradients: list[Tensor], momenta: list[Tensor]
) -> list[Tensor]:
    """What is to be orthogonalised; takes the gradients into the momenta."""
    torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
    if not group["nesterov"]:
        return momenta
    return list(torch._foreach_lerp(gradients, momenta, group["momentum"]))


def _take_off(
    group: dict[str, Any], shape: torch.Size, own: list[Tensor], updates_LMN: Tensor
) -> None:
    """Decay the rows and take their updates off, at the rate of whole matrices of `shape`."""
    rate = float(group["lr"])
    torch._foreach_mul_(own, 1 - rate * group["weight_decay"])
    # In the type and the order of the matrices: others would be added one by one. `to` alone leaves
    # the order of what has the type.
    updates_LMN = updates_LMN.to(own[0].dtype, memory_format=torch.contiguous_format).contiguous()
    adjusted = _adjust_lr(rate, group["adjust_lr_fn"], shape)
    torch._foreach_add_(own, updates_LMN.unbind(), alpha=-adjusted)

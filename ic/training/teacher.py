"""A frozen model whose next-token distributions another one learns.

It is held outside of the LightningModule's parameters: no checkpoint saves it, no optimizer sees
it, and neither DDP nor FSDP2 wraps it. Each rank has it whole.

Packed documents attend within themselves, as the student's do. A model of `transformers` gets an
attention function of ours for it, by `AttentionInterface`, so that no mask of tokens x tokens is
made.

Legend: B batch, T tokens, H query heads, G key and value heads, K head dimension, E hidden size, W
vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from ic.model import MLAForCausalLM
from ic.model.operators import AttentionOperators
from ic.model.plain_layers import plain_weight
from ic.model.sdpa import Segments
from ic.model.torch_operators import OPERATORS as ON_TORCH

_ATTENTION = "infinite_context_documents"
_PROBE_TOKENS = 8


@dataclass
class Documents:
    """The documents of a batch as an attention function reads them.

    Attributes:
        ids_BT: equal for the tokens of one document; None for one document per row.
        segments: the same as (row, start, end), if the operators read those.
        compiled: whether a compiler may follow the attention: it would make a graph for each way in
            which segments lie.
    """

    operators: AttentionOperators
    ids_BT: Tensor | None
    segments: Segments | None
    compiled: bool


class Teacher:
    """A frozen causal language model in evaluation mode.

    Args:
        model: an `MLAForCausalLM` or a causal model of `transformers`, on the CPU.
        name: what errors call it.
        offload: keep the weights in the host's memory between uses.
        compile: each of its layers by torch.compile.

    Raises:
        ValueError: a model whose attention is not plain causal attention, or whose logits are not
            its head's of its last hidden states.
    """

    def __init__(self, model: Any, name: str, *, offload: bool, compile: bool) -> None:
        self.model = model.requires_grad_(False).eval()
        self.name = name
        self._device = torch.device("cpu")
        self._held: list[tuple[Tensor, Tensor]] | None = [] if offload else None
        self._is_ours = isinstance(model, MLAForCausalLM)
        if not self._is_ours:
            model.set_attn_implementation(_ATTENTION)
        self._decoder = model.model if self._is_ours else model.get_decoder()
        text = model.config.get_text_config()
        per_head = text.hidden_size // text.num_attention_heads
        self._head_dim: int = getattr(text, "head_dim", None) or per_head
        self._head: Any = model.get_output_embeddings()
        self._probe()
        if compile:
            for layer in self._decoder.layers:
                layer.compile(dynamic=False)

    @property
    def weight(self) -> Tensor:
        """The head's weight (W, E)."""
        weight: Tensor = self._head.weight
        return weight

    @property
    def num_parameters(self) -> int:
        """Parameters, tied ones once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def to(self, device: torch.device) -> None:
        """Move it to where it will be used; with `offload` its parameters wait in the host's
        memory, pinned for a GPU.
        """
        self._device = device
        if self._held is None:
            self.model.to(device)
            return
        for module in self.model.modules():
            for key, buffer in module._buffers.items():
                module._buffers[key] = None if buffer is None else buffer.to(device)
        on_gpu = device.type == "cuda"
        self._held = []
        for parameter in self.model.parameters():
            held = parameter.data.pin_memory() if on_gpu else parameter.data
            parameter.data = held
            self._held.append((parameter, held))

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        """The weights are on the device inside."""
        for parameter, held in self._held or []:
            parameter.data = held.to(self._device, non_blocking=True)
        try:
            yield
        finally:
            for parameter, held in self._held or []:
                parameter.data = held

    @torch.no_grad()
    def hidden(
        self,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor | None,
        document_ids_BT: Tensor | None,
        operators: AttentionOperators = ON_TORCH,
    ) -> Tensor:
        """Hidden states (B, T, E) that the head turns into logits.

        Args:
            operators: attend, if they take heads of the teacher's size, which are a power of two
                from 16 on; else PyTorch's do. A teacher of ours has its own.
        """
        with torch.autocast(input_ids_BT.device.type, enabled=False):
            if self._is_ours:
                context = self._decoder.make_context(
                    *input_ids_BT.shape,
                    input_ids_BT.device,
                    position_ids=position_ids_BT,
                    document_ids=document_ids_BT,
                )
                outputs = self._decoder(input_ids_BT, context=context, use_cache=False)
            else:
                segments = None
                if self._head_dim < 16 or self._head_dim & (self._head_dim - 1):
                    operators = ON_TORCH
                if document_ids_BT is not None:
                    segments = operators.document_segments(document_ids_BT)
                outputs = self._decoder(
                    input_ids=input_ids_BT,
                    position_ids=position_ids_BT,
                    use_cache=False,
                    documents=Documents(operators, document_ids_BT, segments, segments is None),
                )
        hidden_BTE: Tensor = outputs.last_hidden_state
        return hidden_BTE

    def _probe(self) -> None:
        """A few tokens: are the logits the head's, and does the attention take documents?"""
        kind = self.model.config.model_type
        ids = torch.arange(_PROBE_TOKENS)[None] % self.model.config.get_text_config().vocab_size
        documents = (torch.arange(_PROBE_TOKENS)[None] >= _PROBE_TOKENS // 2).int()
        positions = torch.arange(_PROBE_TOKENS)[None] % (_PROBE_TOKENS // 2)
        try:
            with torch.no_grad():
                whole = self.model(input_ids=ids, use_cache=False).logits.float()
                packed = self.hidden(ids, positions, documents)
                alone = torch.cat([self.hidden(part, None, None) for part in ids.chunk(2, 1)], 1)
                hidden = self.hidden(ids, None, None)
        except TypeError as error:
            raise ValueError(
                f"{self.name}: a {kind} cannot teach, its attention is not one that transformers "
                f"lets us replace ({error})"
            ) from error
        if plain_weight(self._head) is None or not _near(whole, hidden @ self._head.weight.T):
            raise ValueError(
                f"{self.name}: a {kind} cannot teach, its logits are not its head's matrix times "
                "its last hidden states"
            )
        if not _near(alone, packed):
            raise ValueError(
                f"{self.name}: a {kind} cannot teach, its layers do not keep packed documents apart"
            )


def _near(a: Tensor, b: Tensor) -> bool:
    """Equal but for the rounding of bf16."""
    return bool((a.float() - b.float()).norm() <= 0.03 * a.float().norm())


def attend_within_documents(
    module: torch.nn.Module,
    query_BHTK: Tensor,
    key_BGTK: Tensor,
    value_BGTK: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    documents: Documents | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """An attention function of `transformers`: causal, within documents -> (B, T, H, K).

    Raises:
        ValueError: a window shorter than the tokens, or what else this attention does not compute.
    """
    tokens, width = query_BHTK.shape[2:]
    asked = [name for name in ("softcap", "s_aux", "sinks") if others.get(name) is not None]
    if sliding_window is not None and sliding_window < tokens:
        asked.append(f"a window of {sliding_window} tokens, shorter than the {tokens} of a row")
    if asked:
        raise ValueError(f"a teacher's attention with {', '.join(asked)} is not supported")
    groups = query_BHTK.shape[1] // key_BGTK.shape[1]
    attend = _attend if documents is None or documents.compiled else _attend_uncompiled
    out_BTHK = attend(
        query_BHTK.transpose(1, 2),
        key_BGTK.repeat_interleave(groups, 1).transpose(1, 2),
        value_BGTK.repeat_interleave(groups, 1).transpose(1, 2),
        width**-0.5 if scaling is None else scaling,
        documents,
    )
    return out_BTHK, None


def _attend(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, scale: float, documents: Documents | None
) -> Tensor:
    if documents is None:
        return ON_TORCH.expanded(q_BTHK, k_BTHK, v_BTHK, scale=scale)
    return documents.operators.expanded(
        q_BTHK,
        k_BTHK,
        v_BTHK,
        scale=scale,
        segments=documents.segments,
        document_ids_BT=documents.ids_BT,
    )


_attend_uncompiled = torch.compiler.disable(_attend)
AttentionInterface.register(_ATTENTION, attend_within_documents)

"""The MLA language model as Hugging Face classes, so that `generate`, TRL, PEFT and lm-eval work
with it.

Legend: B batch, T new tokens, S visible tokens, D hidden, W vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from ic.model.attention import MLAAttention
from ic.model.branches import Branches, check_branches
from ic.model.cache import PAGE_TOKENS, LatentCache
from ic.model.config import MLAConfig
from ic.model.context import AttentionContext
from ic.model.init import init_weights
from ic.model.loss import linear_cross_entropy, shift_labels
from ic.model.masks import document_segments, needs_no_mask, num_visible, padding_mask
from ic.model.mlp import MLAMLP
from ic.model.norm import MLARMSNorm
from ic.model.rope import DecoupledRotaryEmbedding
from ic.model.targets import TargetLogProbs, TargetSums, log_probs_of_targets, sum_targets

if TYPE_CHECKING:
    from ic.parallel.context_parallel import ContextParallel


class MLADecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and feed-forward with residual connections."""

    def __init__(self, config: MLAConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = MLAAttention(config, layer_idx)
        self.mlp = MLAMLP(config)
        norm = partial(
            MLARMSNorm, config.hidden_size, config.rms_norm_eps, backend=config.norm_backend
        )
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()

    def forward(
        self, hidden_BTD: Tensor, context: AttentionContext, cache: Cache | None = None
    ) -> Tensor:
        if cache is None:
            return self._without_cache(hidden_BTD, context)
        return self._block(hidden_BTD, context, cache)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """`torch.compile` the pass without a cache, with its arguments.

        Over a cache, whose length is another in each call, the layer stays as it is.
        """
        self._without_cache = torch.compile(self._without_cache, *args, **kwargs)  # type: ignore[method-assign]

    def _without_cache(self, hidden_BTD: Tensor, context: AttentionContext) -> Tensor:
        return self._block(hidden_BTD, context, None)

    def _block(self, hidden_BTD: Tensor, context: AttentionContext, cache: Cache | None) -> Tensor:
        attended_BTD = self.self_attn(self.input_layernorm(hidden_BTD), context, cache)
        normed_BTD, hidden_BTD = self.post_attention_layernorm(attended_BTD, residual=hidden_BTD)
        return hidden_BTD + self.mlp(normed_BTD)


class MLAPreTrainedModel(PreTrainedModel):
    config_class = MLAConfig
    config: MLAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MLADecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    # The attention backend is `config.attention_backend`; this only keeps transformers from
    # objecting to its default.
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        init_weights(module, self.config)


class MLAModel(MLAPreTrainedModel):
    """Embedding, decoder layers and final norm.

    Attributes:
        context_parallel: set by a strategy that spreads sequences over ranks (ic/parallel). Every
            rank then gives whole sequences, works on its part and returns its part's hidden states;
            a few tokens over a cache (at most `absorbed_max_queries`) are not spread.
    """

    def __init__(self, config: MLAConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            MLADecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = MLARMSNorm(config.hidden_size, config.rms_norm_eps, backend=config.norm_backend)
        self.rotary_emb = DecoupledRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.context_parallel: ContextParallel | None = None
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        document_ids: Tensor | None = None,
        branches: Branches | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, T, D) after the final norm; of this rank's tokens if they are split.

        Args:
            input_ids: (B, T) int64, or `inputs_embeds` (B, T, D).
            attention_mask: (B, S) of 0 and 1, padding marked 0.
            position_ids: (B, T) int64; rotation only, any values below `max_position_embeddings`.
            past_key_values: cache of earlier tokens; made here if `use_cache` and None.
            document_ids: (B, T), contiguous runs; a token attends only within its run.
            branches: of each row, where two continuations of one beginning lie
                (`ic.model.branches`).

        Raises:
            ValueError: inputs that exclude each other, or a length beyond the model's positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        given = input_ids if inputs_embeds is None else inputs_embeds
        assert given is not None
        batch, tokens = given.shape[:2]
        if past_key_values is None and use_cache:
            past_key_values = self.new_cache()
        parallel = self.context_parallel
        is_split = parallel is not None and (
            past_key_values is None or tokens > self.config.absorbed_max_queries
        )
        if parallel is not None and is_split:
            given = parallel.split(given)
        hidden_BTD = self.embed_tokens(given) if inputs_embeds is None else given
        if torch.is_autocast_enabled(hidden_BTD.device.type):
            # Otherwise the float32 embedding makes the whole residual stream float32.
            hidden_BTD = hidden_BTD.to(torch.get_autocast_dtype(hidden_BTD.device.type))
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        context = self._context(
            batch,
            tokens,
            hidden_BTD.device,
            attention_mask,
            position_ids,
            document_ids,
            branches,
            past,
            is_split,
        )
        all_hidden = [hidden_BTD] if output_hidden_states else None
        for layer in self.layers:
            hidden_BTD = layer(hidden_BTD, context, past_key_values)
            if all_hidden is not None:
                all_hidden.append(hidden_BTD)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_BTD),
            past_key_values=past_key_values,
            hidden_states=None if all_hidden is None else tuple(all_hidden),
        )

    def new_cache(self, capacity_tokens: int = 0) -> LatentCache:
        """A cache for sequences of up to `capacity_tokens`; it grows past that when it must."""
        if self.context_parallel is not None:
            return self.context_parallel.new_cache(self.config.num_hidden_layers, capacity_tokens)
        return LatentCache(self.config.num_hidden_layers, capacity_tokens)

    def _context(
        self,
        batch: int,
        tokens: int,
        device: torch.device,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        document_ids: Tensor | None,
        branches: Branches | None,
        past: int,
        is_split: bool,
    ) -> AttentionContext:
        config, parallel = self.config, self.context_parallel
        if branches is not None:
            if past or attention_mask is not None or document_ids is not None:
                raise ValueError("branches go without cache, attention_mask and document_ids")
            check_branches(branches, batch, tokens)
        elif past + tokens > config.max_position_embeddings:
            raise ValueError(
                f"{past + tokens} tokens: the model has {config.max_position_embeddings} positions "
                "(max_position_embeddings); shorten the input"
            )
        if document_ids is not None and (past or attention_mask is not None):
            raise ValueError("document_ids goes with neither a cache nor an attention_mask")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"attention_mask has {attention_mask.dim()} dimensions, not (B, S)")
        if attention_mask is not None and needs_no_mask(attention_mask, past, tokens):
            attention_mask = None
        if attention_mask is not None and parallel is not None:
            raise ValueError(
                "padding (attention_mask) does not go with strategy.context_parallel_size above 1; "
                "use sequences of equal length, or document_ids"
            )
        visible_BT = num_visible(attention_mask, document_ids, branches, past, tokens, device)
        if position_ids is None:
            # Padded rows and branches count their own tokens; documents share one line of
            # positions.
            position_ids = (
                torch.arange(past, past + tokens, device=device)[None]
                if attention_mask is None and branches is None
                else visible_BT - 1
            )
        if parallel is not None and is_split:
            position_ids, visible_BT = parallel.split(position_ids), parallel.split(visible_BT)
        cos_BTF, sin_BTF = self.rotary_emb(position_ids)
        on_triton = config.attention_backend == "triton"
        # The Triton kernel reads the ids themselves; segments cost a copy to the host.
        needs_segments = document_ids is not None and not on_triton
        lengths_B = None
        if on_triton:
            lengths_B = torch.full((batch,), past + tokens, dtype=torch.int32, device=device)
        return AttentionContext(
            cos_BTF,
            sin_BTF,
            visible_BT=visible_BT,
            mask_BTS=padding_mask(attention_mask, past, tokens),
            segments=document_segments(document_ids) if needs_segments else None,  # type: ignore[arg-type]
            document_ids_BT=document_ids,
            branches=branches,
            lengths_B=lengths_B,
            append_slots_M=self._append_slots(batch, tokens, device),
            parallel=parallel,
            is_split=is_split,
        )

    def _append_slots(self, batch: int, tokens: int, device: torch.device) -> Tensor | None:
        """Slots of the new tokens where every row has one page and they are its end; None if the
        append kernel is not chosen or does not take the shape.
        """
        config = self.config
        chosen = config.norm_backend == config.rope_backend == "triton"
        if not chosen or tokens > PAGE_TOKENS or config.kv_lora_rank % 16:
            return None
        slots = torch.arange(batch * PAGE_TOKENS, device=device)
        return slots.view(batch, PAGE_TOKENS)[:, -tokens:].reshape(-1).contiguous()


class MLAForCausalLM(MLAPreTrainedModel, GenerationMixin):
    """Language model head on `MLAModel`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MLAConfig) -> None:
        super().__init__(config)
        self.model = MLAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, W), and the mean loss if `labels` (B, T; unshifted, -100 ignored) are
        given.

        `logits_to_keep` limits the logits to the last tokens; `skip_logits` returns the loss alone,
        computed in chunks. Other arguments are `MLAModel.forward`'s.
        """
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and labels is None
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_BTD = outputs.last_hidden_state
        parallel = self.model.context_parallel
        if parallel is not None:
            if labels is not None:
                raise ValueError(
                    "MLAForCausalLM.forward takes no labels with context parallelism: each rank "
                    "holds a part of the sequence; use target_sums, which returns sums to add up"
                )
            given = input_ids if inputs_embeds is None else inputs_embeds
            assert given is not None
            if hidden_BTD.shape[1] < given.shape[1]:
                last = logits_to_keep if isinstance(logits_to_keep, int) else 0
                hidden_BTD = parallel.gather_last(hidden_BTD, last)
        loss = None
        if labels is not None:
            loss = linear_cross_entropy(
                hidden_BTD.flatten(0, 1), self.lm_head.weight, shift_labels(labels).flatten()
            )
        logits = None
        if not skip_logits:
            keep = (
                slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            )
            logits = self.lm_head(hidden_BTD[:, keep])
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def target_sums(
        self,
        input_ids: Tensor,
        labels: Tensor,
        answer_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        all_tokens: bool = True,
    ) -> TargetSums:
        """Cross-entropy summed, not averaged: for means over several batches or ranks.

        Args:
            input_ids, position_ids, document_ids: as in `MLAModel.forward`, whole sequences.
            labels: (B, T) aligned with `input_ids`, -100 where not a target.
            answer_mask: (B, T) bool, aligned with `labels`, or None.
            all_tokens: sum over all targets as well as over the marked ones.
        """
        outputs = self.model(
            input_ids=input_ids,
            position_ids=position_ids,
            document_ids=document_ids,
            use_cache=False,
        )
        return sum_targets(
            outputs.last_hidden_state,
            self.lm_head.weight,
            shift_labels(labels),
            None if answer_mask is None else F.pad(answer_mask[:, 1:], (0, 1)),
            parallel=self.model.context_parallel,
            all_tokens=all_tokens,
        )

    def target_log_probs(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        branches: Branches | None = None,
    ) -> TargetLogProbs:
        """Log-probabilities of the targets one by one, without logits of the other tokens;
        arguments as in `target_sums` and `MLAModel.forward`.
        """
        outputs = self.model(
            input_ids=input_ids, position_ids=position_ids, branches=branches, use_cache=False
        )
        return log_probs_of_targets(
            outputs.last_hidden_state, self.lm_head.weight, labels, self.model.context_parallel
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Give `generate` a `LatentCache` of the final size unless the caller chose a cache."""
        if (
            model_kwargs.get("past_key_values") is None
            and generation_config.use_cache
            and generation_config.cache_implementation is None
        ):
            model_kwargs["past_key_values"] = self.model.new_cache(generation_config.max_length)
        parent: Any = super()  # typed for a protocol that subclasses do not name
        return parent._prepare_cache_for_generation(
            generation_config, model_kwargs, *args, **kwargs
        )


AutoConfig.register(MLAConfig.model_type, MLAConfig)
AutoModel.register(MLAConfig, MLAModel)
AutoModelForCausalLM.register(MLAConfig, MLAForCausalLM)

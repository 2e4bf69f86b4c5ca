"""The MLA language model as Hugging Face classes, so that `generate`, TRL, PEFT and lm-eval work
with it.

Legend: B batch, T new tokens, S visible tokens, D hidden, W vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from ic.model.attention import MLAAttention
from ic.model.branches import Branches
from ic.model.build_context import ContextBuilder
from ic.model.cache import LatentCache
from ic.model.config import MLAConfig
from ic.model.context import AttentionContext
from ic.model.generation import LatentGenerationMixin
from ic.model.init import init_weights
from ic.model.loss import linear_cross_entropy, shift_labels
from ic.model.mlp import MLAMLP
from ic.model.norm import MLARMSNorm
from ic.model.operators import Operators, choose_operators
from ic.model.rope import DecoupledRotaryEmbedding
from ic.model.sharing import SequenceSharing
from ic.model.static_cache import StaticLatentCache
from ic.model.targets import TargetLogProbs, TargetSums, log_probs_of_targets, sum_targets


class MLADecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and feed-forward with residual connections."""

    def __init__(self, config: MLAConfig, layer_idx: int, operators: Operators) -> None:
        super().__init__()
        self.self_attn = MLAAttention(config, layer_idx, operators)
        self.mlp = MLAMLP(config, operators.feed_forward)
        norm = partial(
            MLARMSNorm, config.hidden_size, config.rms_norm_eps, operators=operators.norm
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

    Args:
        operators: in place of those that the configuration names.

    Attributes:
        context_parallel: set by a strategy that spreads sequences over ranks (ic/parallel). Every
            rank then gives whole sequences, works on its part and returns its part's hidden states;
            a few tokens over a cache (at most `absorbed_max_queries`) are not spread.
    """

    def __init__(self, config: MLAConfig, operators: Operators | None = None) -> None:
        super().__init__(config)
        self.operators = operators or choose_operators(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            MLADecoderLayer(config, i, self.operators) for i in range(config.num_hidden_layers)
        )
        self.norm = MLARMSNorm(
            config.hidden_size, config.rms_norm_eps, operators=self.operators.norm
        )
        self.rotary_emb = DecoupledRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.context_parallel: SequenceSharing | None = None
        self.post_init()

    @can_return_tuple
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
        context: AttentionContext | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, T, D) after the final norm; of this rank's tokens if they are split.

        Args:
            input_ids: (B, T) int64, or `inputs_embeds` (B, T, D).
            attention_mask: (B, S) of 0 and 1, padding marked 0; or a whole mask (B or 1, 1, T, S)
                of bool, or of 0 and the dtype's minimum.
            position_ids: (B, T) int64; rotation only, any values below `max_position_embeddings`.
            past_key_values: cache of earlier tokens: a `LatentCache`, a `StaticLatentCache` or any
                of transformers'; made here if `use_cache` and None.
            use_cache: by default as `config.use_cache` says, but not in training nor with
                documents or branches.
            output_hidden_states: return the input of every layer and the final norm's output; by
                default as `config.output_hidden_states` says.
            return_dict: False for a tuple; by default `config.return_dict`.
            document_ids: (B, T), contiguous runs; a token attends only within its run.
            branches: of each row, where two continuations of one beginning lie
                (`ic.model.branches`).
            context: a ready one (`make_context`), in place of the mask, positions, documents and
                branches.

        Raises:
            ValueError: inputs that exclude each other, or a length beyond the model's positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        given = input_ids if inputs_embeds is None else inputs_embeds
        assert given is not None
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        if not isinstance(output_hidden_states, bool):
            raise ValueError(
                f"output_hidden_states={output_hidden_states}: give True, for all layers, or False"
            )
        if use_cache is None:
            is_plain = document_ids is None and branches is None
            use_cache = self.config.use_cache and not self.training and is_plain
        if past_key_values is None and use_cache:
            past_key_values = self.new_cache()
        described = (attention_mask, position_ids, document_ids, branches)
        if context is None:
            context = self.make_context(
                given.shape[0],
                given.shape[1],
                given.device,
                past_key_values,
                attention_mask=attention_mask,
                position_ids=position_ids,
                document_ids=document_ids,
                branches=branches,
            )
        elif any(value is not None for value in described):
            raise ValueError(
                "context goes without attention_mask, position_ids, document_ids and branches: it "
                "was made from them"
            )
        if context.parallel is not None and context.is_split:
            given = context.parallel.split(given)
        made_for = tuple(context.cos_BTF.shape[:2])
        if made_for not in ((1, given.shape[1]), tuple(given.shape[:2])):
            raise ValueError(
                f"context was made for {made_for[1]} new tokens in {made_for[0]} rows, and the "
                f"input has {given.shape[1]} in {given.shape[0]}: make one for each pass"
            )
        hidden_BTD = self.embed_tokens(given) if inputs_embeds is None else given
        if torch.is_autocast_enabled(hidden_BTD.device.type):
            # Otherwise the float32 embedding makes the whole residual stream float32.
            hidden_BTD = hidden_BTD.to(torch.get_autocast_dtype(hidden_BTD.device.type))
        all_hidden: tuple[Tensor, ...] | None = (hidden_BTD,) if output_hidden_states else None
        # Decoding that exits early lowers the number in the configuration for a while.
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_BTD = layer(hidden_BTD, context, past_key_values)
            if all_hidden is not None:
                all_hidden += (hidden_BTD,)
        hidden_BTD = self.norm(hidden_BTD)
        if all_hidden is not None:
            all_hidden = (*all_hidden[:-1], hidden_BTD)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_BTD, past_key_values=past_key_values, hidden_states=all_hidden
        )

    def new_static_cache(self, capacity_tokens: int) -> StaticLatentCache:
        """A cache for sequences of up to `capacity_tokens`, in buffers that never move or grow."""
        return StaticLatentCache(self.config.num_hidden_layers, capacity_tokens)

    def new_cache(self, capacity_tokens: int = 0) -> LatentCache:
        """A cache for sequences of up to `capacity_tokens`; it grows past that when it must."""
        if self.context_parallel is not None:
            return self.context_parallel.new_cache(self.config.num_hidden_layers, capacity_tokens)
        return LatentCache(self.config.num_hidden_layers, capacity_tokens)

    def make_context(
        self,
        batch: int,
        tokens: int,
        device: torch.device,
        cache: Cache | None = None,
        **described: Any,
    ) -> AttentionContext:
        """What the layers share in a pass of `tokens` new tokens a row over `cache`; arguments as
        in `ContextBuilder.build`.
        """
        builder = ContextBuilder(
            self.config, self.operators, self.rotary_emb, self.context_parallel
        )
        return builder.build(batch, tokens, device, cache, **described)


class MLAForCausalLM(MLAPreTrainedModel, LatentGenerationMixin):
    """Language model head on `MLAModel`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MLAConfig, operators: Operators | None = None) -> None:
        super().__init__(config)
        self.model = MLAModel(config, operators)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
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
        if use_cache is None and labels is not None:
            use_cache = False
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
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
                hidden_BTD.flatten(0, 1),
                self.lm_head.weight,
                shift_labels(labels).flatten(),
                self.model.operators.loss.summed_linear_cross_entropy,
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
            return_dict=True,
        )
        return sum_targets(
            outputs.last_hidden_state,
            self.lm_head.weight,
            shift_labels(labels),
            None if answer_mask is None else F.pad(answer_mask[:, 1:], (0, 1)),
            parallel=self.model.context_parallel,
            summed=self.model.operators.loss.summed_linear_cross_entropy,
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
            input_ids=input_ids,
            position_ids=position_ids,
            branches=branches,
            use_cache=False,
            return_dict=True,
        )
        return log_probs_of_targets(
            outputs.last_hidden_state, self.lm_head.weight, labels, self.model.context_parallel
        )


AutoConfig.register(MLAConfig.model_type, MLAConfig)
AutoModel.register(MLAConfig, MLAModel)
AutoModelForCausalLM.register(MLAConfig, MLAForCausalLM)

"""The MLA language model as Hugging Face classes, so that `generate`, TRL, PEFT and lm-eval work
with it.

Legend: B batch, T new tokens, S visible tokens, D hidden, W vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from ic.model.branches import Branches
from ic.model.build_context import ContextBuilder
from ic.model.cache import LatentCache, LatentLayer
from ic.model.config import MLAConfig
from ic.model.context import AttentionContext
from ic.model.decoder_layer import MLADecoderLayer
from ic.model.documents import marked_documents
from ic.model.generation import LatentGenerationMixin
from ic.model.indexer_options import num_indexers
from ic.model.indexing import Indexing
from ic.model.init import init_weights
from ic.model.loss import shift_labels as shift
from ic.model.norm import MLARMSNorm
from ic.model.operators import Operators, choose_operators
from ic.model.quantised_latents import code_dtype
from ic.model.rope import DecoupledRotaryEmbedding
from ic.model.sharing import SequenceSharing
from ic.model.static_cache import StaticLatentCache, StaticLatentLayer
from ic.model.target_methods import TargetsMixin


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
        fused: set by `ic.inference.fused`: computes layers and final norm of the passes that it
            serves.
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
        self.fused: Any = None
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
        *,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        output_attentions: bool | None = None,
        output_router_logits: bool | None = None,
        is_causal: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, T, D) after the final norm; of this rank's tokens if they are split.

        Args:
            input_ids: (B, T) int64, or `inputs_embeds` (B, T, D).
            attention_mask: (B, S) of 0 and 1, padding marked 0; or a whole mask (B or 1, 1, T, S)
                of bool, or of 0 and the dtype's minimum.
            position_ids: (B, T) int64, any values below `max_position_embeddings`. They rotate;
                where they start anew in a row without padding and nothing else marks documents, a
                document begins. Over cached tokens they only rotate.
            past_key_values: cache of earlier tokens: a `LatentCache`, a `StaticLatentCache` or any
                of transformers'; made here if `use_cache` and None.
            use_cache: by default as `config.use_cache` says, but not in training nor with
                documents or branches, nor in `torch.export`.
            output_hidden_states: return the input of every layer and the final norm's output; by
                default as `config.output_hidden_states` says.
            return_dict: False for a tuple; by default `config.return_dict`.
            document_ids: (B, T), contiguous runs; a token attends only within its run.
            branches: of each row, where two continuations of one beginning lie
                (`ic.model.branches`).
            context: a ready one (`make_context`), in place of the mask, positions, documents and
                branches. Positions then only rotate.
            seq_idx, cu_seq_lens_q, cu_seq_lens_k: Hugging Face's names for documents
                (`ic.model.documents`). `max_length_q` and `max_length_k`, the longest one, follow
                from them.
            output_attentions: return each layer's weights (B, H, T, S), which attends eagerly for
                it; by default as `config.output_attentions` says.
            output_router_logits, is_causal: refused where they ask for more than causal attention
                without experts has.

        Raises:
            ValueError: inputs that exclude each other, or a length beyond the model's positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        given = input_ids if inputs_embeds is None else inputs_embeds
        assert given is not None
        if output_router_logits:
            raise ValueError("output_router_logits=True: the model has no experts; leave it out")
        if is_causal is False:
            raise ValueError("is_causal=False: the model attends causally; leave it out")
        if output_attentions is None:
            output_attentions = bool(self.config.output_attentions)
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        if not isinstance(output_hidden_states, bool):
            raise ValueError(
                f"output_hidden_states={output_hidden_states}: give True, for all layers, or False"
            )
        edges: Any = {"cu_seq_lens_q": cu_seq_lens_q, "cu_seq_lens_k": cu_seq_lens_k}
        named = {"seq_idx": seq_idx, **edges}
        described = (attention_mask, position_ids, document_ids, branches)
        if context is None and document_ids is None and branches is None:
            document_ids = marked_documents(
                *given.shape[:2],
                position_ids=position_ids,
                attention_mask=attention_mask,
                cache=past_key_values,
                **named,
            )
            if document_ids is not None:
                attention_mask = None  # it hid nothing
        elif any(value is not None for value in named.values()):
            raise ValueError(
                f"{', '.join(named)} name documents in Hugging Face's way: they go without "
                "document_ids, branches and context"
            )
        is_plain = document_ids is None and branches is None
        if use_cache and not is_plain:
            raise ValueError(
                "use_cache=True goes with neither packed texts nor branches: the next token would "
                "see all of a row; leave it out"
            )
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and is_plain
            use_cache = use_cache and not torch.compiler.is_exporting()
        if past_key_values is None and use_cache:
            if torch.compiler.is_exporting():
                raise ValueError(
                    "torch.export cannot return a LatentCache: give past_key_values=DynamicCache() "
                    "(docs/transformers.md), or use_cache=False"
                )
            past_key_values = self.new_cache()
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
        context.check_shape(*given.shape[:2])
        if context.indexing is None and self.config.indexer == "sparse":
            context = replace(context, indexing=self.new_indexing())
        if output_attentions:
            context = context.recording()
        hidden_BTD = self.embed_tokens(given) if inputs_embeds is None else given
        if torch.is_autocast_enabled(hidden_BTD.device.type):
            # Otherwise the float32 embedding makes the whole residual stream float32.
            hidden_BTD = hidden_BTD.to(torch.get_autocast_dtype(hidden_BTD.device.type))
        all_hidden: tuple[Tensor, ...] | None = (hidden_BTD,) if output_hidden_states else None
        is_plain = all_hidden is None and context.recorder is None
        if (
            is_plain
            and self.fused is not None
            and self.fused.serve(given.shape[1], past_key_values)
        ):
            hidden_BTD = self.fused(hidden_BTD, context, past_key_values)
        else:
            # Decoding that exits early lowers the number in the configuration for a while.
            for layer in self.layers[: self.config.num_hidden_layers]:
                hidden_BTD = layer(hidden_BTD, context, past_key_values)
                if all_hidden is not None:
                    all_hidden += (hidden_BTD,)
            hidden_BTD = self.norm(hidden_BTD)
        if all_hidden is not None:
            all_hidden = (*all_hidden[:-1], hidden_BTD)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_BTD,
            past_key_values=past_key_values,
            hidden_states=all_hidden,
            attentions=context.recorded,
        )

    def new_static_cache(self, capacity_tokens: int) -> StaticLatentCache:
        """A cache for sequences of up to `capacity_tokens`, in buffers that never move or grow."""
        layers, codes = self.config.num_hidden_layers, code_dtype(self.config.cache_dtype)
        cache = StaticLatentCache(layers, capacity_tokens, codes)
        cache.layers += self._index_layers(StaticLatentLayer, capacity_tokens)
        return cache

    def new_cache(self, capacity_tokens: int = 0) -> LatentCache:
        """A cache for sequences of up to `capacity_tokens`; it grows past that when it must.

        Raises:
            ValueError: a quantised cache that ranks would share.
        """
        layers, codes = self.config.num_hidden_layers, code_dtype(self.config.cache_dtype)
        if self.context_parallel is None:
            cache = LatentCache(layers, capacity_tokens, codes)
            cache.layers += self._index_layers(LatentLayer, capacity_tokens)
            return cache
        if codes is not None:
            raise ValueError(
                f"cache_dtype={self.config.cache_dtype}: a cache that ranks share is not "
                "quantised; leave it out, or set strategy.context_parallel_size=1"
            )
        return self.context_parallel.new_cache(layers, capacity_tokens)

    def _index_layers(self, layer: Any, capacity_tokens: int) -> list[Any]:
        """The layers of a cache, behind the latents, that keep a sparse model's index keys."""
        if self.config.indexer != "sparse":
            return []
        codes = code_dtype(self.config.index_cache_dtype)
        return [layer(capacity_tokens, codes) for _ in range(num_indexers(self.config))]

    def new_indexing(self, *, has_losses: bool = False) -> Indexing:
        """For one pass: what the indexers choose if the model is sparse, and their losses."""
        return Indexing(
            self.config,
            self.operators.sparse,
            is_sparse=self.config.indexer == "sparse",
            has_losses=has_losses,
        )

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


class MLAForCausalLM(TargetsMixin, MLAPreTrainedModel, LatentGenerationMixin):
    """Language model head on `MLAModel`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    # The Trainer then gives `num_items_in_batch`, and does not divide the loss itself.
    accepts_loss_kwargs = True

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
        num_items_in_batch: int | Tensor | None = None,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, W), and the loss if `labels` are given.

        Args:
            labels: (B, T) aligned with the inputs, -100 where a token is no target.
            logits_to_keep: limits the logits to the last tokens.
            skip_logits: return the loss alone, computed in chunks.
            num_items_in_batch: divides the summed loss, in place of the number of targets: those
                of all micro-batches and ranks that make up a step.
            shift_labels: (B, T), the target of each token, in place of `labels` shifted by one.
            **kwargs: `MLAModel.forward`'s, which refuses what it does not know.
        """
        has_targets = labels is not None or shift_labels is not None
        if num_items_in_batch is not None and not has_targets:
            raise ValueError("num_items_in_batch divides the loss: give labels with it")
        if use_cache is None and has_targets:
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
            if has_targets:
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
        if shift_labels is None and labels is not None:
            shift_labels = shift(labels)
        if shift_labels is not None:
            loss = self.head.mean_cross_entropy(
                hidden_BTD.flatten(0, 1), shift_labels.flatten(), num_items_in_batch
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
            attentions=outputs.attentions,
        )


AutoConfig.register(MLAConfig.model_type, MLAConfig)
AutoModel.register(MLAConfig, MLAModel)
AutoModelForCausalLM.register(MLAConfig, MLAForCausalLM)

"""What a model costs: parameters, floating-point operations, cache bytes. Pure functions of the
configuration.

A multiplication and an addition count as two operations. Norms, softmax and rotation are left out:
together they are below one per cent of the matrix products.
"""

from __future__ import annotations

from ic.model.config import MLAConfig
from ic.model.indexer_options import num_indexers


def num_parameters(config: MLAConfig) -> int:
    """All parameters, embeddings included, shared ones once."""
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    indexers = num_indexers(config) * _indexer_parameters(config)
    layers = config.num_hidden_layers * _layer_parameters(config)
    return layers + indexers + embeddings + config.hidden_size


def matrix_parameters(config: MLAConfig) -> int:
    """Parameters that every token is multiplied with: the layers' matrices and the head, not the
    embedding.
    """
    layer = _attention_matrices(config) + 3 * config.hidden_size * config.intermediate_size
    return config.num_hidden_layers * layer + config.vocab_size * config.hidden_size


def forward_flops_per_token(config: MLAConfig, context_length: int) -> float:
    """Forward pass in expanded form, mean over the tokens of a causal sequence of this length."""
    return 2 * matrix_parameters(config) + config.num_hidden_layers * _attention_flops(
        config, (context_length + 1) / 2
    )


def train_flops_per_token(config: MLAConfig, context_length: int) -> float:
    """Forward and backward pass, mean over a causal sequence; recomputation is not counted (this is
    MFU's numerator).
    """
    return 3 * forward_flops_per_token(config, context_length)


def decode_flops_per_token(config: MLAConfig, context_length: int) -> float:
    """One new token in absorbed form over a cache of this length (the new token included)."""
    heads, rank = config.num_attention_heads, config.kv_lora_rank
    # kv_b_proj is split into a product on the query and one on the output: the same count as
    # applying it to one token.
    per_layer = 2 * heads * (2 * rank + config.qk_rope_head_dim) * context_length
    return 2 * matrix_parameters(config) + config.num_hidden_layers * per_layer


def cache_bytes_per_token(config: MLAConfig, bytes_per_number: int = 2) -> int:
    """Bytes of latent cache a token, all layers; of a sparse model its index keys too."""
    keys = num_indexers(config) * config.index_head_dim if config.indexer == "sparse" else 0
    return (config.num_hidden_layers * config.latent_dim + keys) * bytes_per_number


def _attention_flops(config: MLAConfig, visible: float) -> float:
    return 2 * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * visible


def _attention_matrices(config: MLAConfig) -> int:
    hidden, heads = config.hidden_size, config.num_attention_heads
    q_out = heads * config.qk_head_dim
    if config.q_lora_rank is None:
        query = hidden * q_out
    else:
        query = config.q_lora_rank * (hidden + q_out)
    kv_out = heads * (config.qk_nope_head_dim + config.v_head_dim)
    return (
        query
        + hidden * config.latent_dim
        + config.kv_lora_rank * kv_out
        + heads * config.v_head_dim * hidden
    )


def _indexer_parameters(config: MLAConfig) -> int:
    heads, dim = config.index_n_heads, config.index_head_dim
    query = (config.q_lora_rank or config.hidden_size) * heads * dim
    return query + config.hidden_size * (dim + heads) + 2 * dim


def _layer_parameters(config: MLAConfig) -> int:
    norms = 2 * config.hidden_size + (config.q_lora_rank or 0) + 2 * (config.qk_norm_dim or 0)
    if config.latent_norm:
        norms += config.kv_lora_rank
    biases = config.num_attention_heads * config.qk_head_dim if config.query_bias else 0
    if config.attention_bias:
        biases += (config.q_lora_rank or 0) + config.latent_dim + config.hidden_size
    temperature = config.num_attention_heads if config.length_temperature == "ssmax" else 0
    matrices = _attention_matrices(config) + 3 * config.hidden_size * config.intermediate_size
    return matrices + norms + biases + temperature

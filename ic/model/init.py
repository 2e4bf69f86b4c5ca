"""Initialisation: one function, one table.

The table is the recipe's (measured, docs/recipe.md): residual branches start at zero, so that a
fresh network is the identity plus its embedding, and every other matrix keeps the scale of its
input.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import initialization as init

from ic.model.config import MLAConfig
from ic.model.length_temperature import LengthTemperature
from ic.model.norm import MLARMSNorm
from ic.model.qk_norm import BlockNorm

# Context at which a fresh `ssmax` head scales by exactly one.
SSMAX_NEUTRAL_TOKENS = 1024


@torch.no_grad()
def init_weights(module: nn.Module, config: MLAConfig) -> None:
    """Initialise one module; layers mark the matrices that end a residual branch.

    | tensor                                                        | distribution          |
    |---------------------------------------------------------------|-----------------------|
    | embed_tokens.weight                                           | normal, std 1         |
    | embed_tokens.weight, tied to lm_head                          | normal, std D^-0.5    |
    | lm_head.weight                                                | normal, std D^-0.5    |
    | score.weight                                                  | normal, std D^-0.5    |
    | q_proj, q_a_proj, q_b_proj, kv_a_proj_with_mqa, kv_b_proj     | normal, std fan_in^-0.5 |
    | gate_proj, up_proj                                            | normal, std fan_in^-0.5 |
    | wq_b, weights_proj                                            | normal, std fan_in^-0.5 |
    | wk                                                            | normal, std fan_in^-0.5 |
    | o_proj, down_proj                                             | zero                  |
    | every bias                                                    | zero                  |
    | every norm's weight                                           | one                   |
    | length_temperature.scale                                      | 1 / ln(1024)          |
    """
    if isinstance(module, nn.Embedding):
        init.normal_(
            module.weight, std=config.hidden_size**-0.5 if config.tie_word_embeddings else 1.0
        )
    elif isinstance(module, nn.Linear):
        if getattr(module, "is_residual_output", False):
            init.zeros_(module.weight)
        else:
            init.normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, MLARMSNorm | BlockNorm):
        init.ones_(module.weight)
    elif isinstance(module, nn.LayerNorm):
        init.ones_(module.weight)
        init.zeros_(module.bias)
    elif isinstance(module, LengthTemperature) and module.kind == "ssmax":
        neutral = torch.tensor(float(SSMAX_NEUTRAL_TOKENS))
        init.constant_(module.scale, float(1 / neutral.log()))

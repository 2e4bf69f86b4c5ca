"""Which parameters train where a model has an indexer."""

from __future__ import annotations

from torch import nn

from ic.model.indexer_options import INDEXER_WEIGHTS


def set_trained(model: nn.Module, indexer: str) -> None:
    """Freeze what does not train: the indexer, or all else with `alone` (`ObjectiveOptions`).

    The indexer has no gradient from any other loss, and a parameter without a gradient must not
    wait for one.
    """
    for name, parameter in model.named_parameters():
        is_index = INDEXER_WEIGHTS in name
        if is_index:
            parameter.requires_grad_(indexer != "none")
        elif indexer == "alone":
            parameter.requires_grad_(False)

"""Prices, and what `cost` is asked. Imports no PyTorch: help and refusals come at once."""

from __future__ import annotations

from dataclasses import dataclass, field

from ic.errors import check_choice
from ic.machine.gpus import GPUS

BY = ("answer", "prefill", "decode")


@dataclass
class OfferOptions:
    """What one can rent or own.

    Attributes:
        gpu: its type, by the name that `plan` knows it by: h100, h200, a100_80gb and so on.
        gpus: of one machine; a job takes as many machines as it needs.
        dollars_per_hour: of one machine.
        interruptions_per_hour: how often a spot machine is taken away, per hour on average; 0 for
            one that is not.
        source: where the price comes from, and when.
    """

    gpu: str | None = None
    gpus: int | None = None
    dollars_per_hour: float | None = None
    interruptions_per_hour: float | None = None
    source: str | None = None


@dataclass
class PriceOptions:
    """A table of prices, which is yours to edit: a file of `conf/cost`.

    Attributes:
        offers: by name.

    Raises:
        ValueError: an offer with a hole, of an unknown GPU, or with a value out of its range.
    """

    offers: dict[str, OfferOptions] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, offer in self.offers.items():
            where = f"cost.offers.{name}"
            for key, value in vars(offer).items():
                if value is None or value == "":
                    raise ValueError(f"{where}.{key} is missing: every offer needs its {key}")
            assert offer.gpu is not None
            assert offer.gpus is not None
            assert offer.dollars_per_hour is not None
            assert offer.interruptions_per_hour is not None
            check_choice(f"{where}.gpu", offer.gpu, tuple(GPUS))
            if offer.gpus < 1:
                raise ValueError(f"{where}.gpus={offer.gpus}: must be at least 1")
            if not 0 < offer.dollars_per_hour <= 1e6:
                raise ValueError(
                    f"{where}.dollars_per_hour={offer.dollars_per_hour}: must be above 0 and at "
                    "most 1,000,000"
                )
            if not 0 <= offer.interruptions_per_hour <= 60:
                raise ValueError(
                    f"{where}.interruptions_per_hour={offer.interruptions_per_hour}: must be from "
                    "0 to 60"
                )


@dataclass
class CostOptions:
    """The verb `cost`: dollars per million tokens and per training run, from measured throughput.

    Attributes:
        cost: the prices; choose a file of `conf/cost` with cost=NAME.
        results: results files, or folders of them, of `benchmark serving`, `fit` and `scaling`.
            What none of them has measured has no price here.
        model_name: only measurements of models with this in their name.
        context_tokens: the least context that is wanted.
        first_token_s: the longest time to the first token that will do, at the 95th percentile.
        per_token_s: the same of each further token.
        by: what the cheapest is chosen by: answer (tokens of answers, with the reading of their
            prompts), prefill or decode.
        tokens: of a training run, for its price.
        checkpoint_s: seconds that training stops for a checkpoint; with spot offers it is needed.
        restart_s: seconds from an interruption until a new machine works; with spot offers it is
            needed.
        checkpoint_every_s: seconds of training between two checkpoints; null takes the best.
        output: results file, with a picture beside it.

    Raises:
        ValueError: a value out of its range.
    """

    cost: PriceOptions = field(default_factory=PriceOptions)
    results: list[str] = field(default_factory=lambda: ["docs/results"])
    model_name: str | None = None
    context_tokens: int | None = None
    first_token_s: float | None = None
    per_token_s: float | None = None
    by: str = "answer"
    tokens: float | None = None
    checkpoint_s: float | None = None
    restart_s: float | None = None
    checkpoint_every_s: float | None = None
    output: str = "runs/cost.json"

    def __post_init__(self) -> None:
        check_choice("by", self.by, BY)
        if not self.cost.offers:
            raise ValueError("cost.offers is empty: give at least one offer")
        if not self.results:
            raise ValueError("results is empty: give files or folders of measurements")
        for name in (
            "context_tokens", "first_token_s", "per_token_s", "tokens", "checkpoint_s", "restart_s",
            "checkpoint_every_s",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value}: must be above 0")
        if not self.output.endswith(".json"):
            raise ValueError(f"output={self.output!r}: must end in .json")

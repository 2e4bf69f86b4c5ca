"""how often the tests of `ab` are wrong, and how soon they are right, in simulated experiments"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from ic.serving.ab.options import GuardrailOptions, check_level

LOADS_PYTORCH = False


@dataclass
class Config:
    """The verb `ab simulate`: experiments whose truth is known, looked at after every request.

    Attributes:
        experiments: how many of each kind.
        requests: of an experiment, both versions together.
        users: of an experiment, who send these requests.
        base: share of good outcomes of the control.
        spread: standard deviation of that share from user to user.
        differences: of the other version's share; 0 shows false claims, others the power.
        effect: as in `ab analyse`.
        level: of the test of a difference.
        failing: shares of failed requests that guardrails meet; at most the limit shows false
            rollbacks.
        outcomes: requests that a guardrail sees at most.
        guardrail: its options; of them the limit of errors and the level.
        seed: of everything random.
        output: results file.
    """

    experiments: int = 1000
    requests: int = 4000
    users: int = 1000
    base: float = 0.85
    spread: float = 0.1
    differences: list[float] = field(default_factory=lambda: [0.0, 0.05])
    effect: float = 0.05
    level: float = 0.05
    failing: list[float] = field(default_factory=lambda: [0.05, 0.1, 0.2, 0.5, 1.0])
    outcomes: int = 2000
    guardrail: GuardrailOptions = field(default_factory=GuardrailOptions)
    seed: int = 0
    output: str = "runs/ab_simulate.json"

    def __post_init__(self) -> None:
        for name in ("experiments", "requests", "users", "outcomes"):
            if not 1 <= getattr(self, name) <= 10**6:
                raise ValueError(f"{name}={getattr(self, name)}: must be from 1 to 1,000,000")
        if not 0 < self.base < 1 or not 0 <= self.spread <= 0.5:
            raise ValueError(
                f"base={self.base}, spread={self.spread}: must be between 0 and 1, and from 0 to "
                "0.5"
            )
        if not 0 < self.effect <= 1:
            raise ValueError(f"effect={self.effect}: must be above 0 and at most 1")
        for each in self.differences:
            if not 0 <= self.base + each <= 1:
                raise ValueError(
                    f"differences: {each} makes a share of {self.base + each:g} of base="
                    f"{self.base}; it must stay between 0 and 1"
                )
        for each in self.failing:
            if not 0 <= each <= 1:
                raise ValueError(f"failing: {each} must be from 0 to 1")
        check_level("level", self.level)
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: must be at least 0")
        if self.guardrail.max_error_share is None:
            raise ValueError("guardrail.max_error_share: the simulation needs a limit")
        if not self.output.endswith(".json"):
            raise ValueError(f"output={self.output!r}: must end in .json")


def run(config: Config) -> int:
    """Simulate; print two tables, write the rows."""
    from rich.console import Console

    from ic.display.numbers import percent
    from ic.display.table import print_table
    from ic.files.atomic_write import write_json
    from ic.files.results import commit
    from ic.serving.ab.simulate import Experiments, simulate_differences, simulate_guardrail

    of = Experiments(
        config.experiments, config.requests, config.users, config.base, config.spread, config.seed
    )
    limit = config.guardrail.max_error_share
    assert limit is not None
    # As the router shares it: a version beside the control has a test per limit.
    level = config.guardrail.level / (1 if config.guardrail.max_slow_share is None else 2)
    differences = [
        simulate_differences(of, each, effect=config.effect, alpha=config.level)
        for each in config.differences
    ]
    guards = [
        simulate_guardrail(
            config.experiments, config.outcomes, each, limit=limit, alpha=level, seed=config.seed
        )
        for each in config.failing
    ]
    console = Console()
    heads = [
        "true difference", "claimed", "after requests (median)", "ever wrong", "one-look test",
    ]  # fmt: skip
    print_table(
        heads,
        [
            [
                f"{100 * row['true_difference']:+g} points",
                percent(row["claimed"], 1),
                "-" if row["requests_p50"] is None else f"{row['requests_p50']:,.0f}",
                percent(row["missed"], 1),
                percent(row["claimed_by_one_look_test"], 1),
            ]
            for row in differences
        ],
        title=f"{config.experiments:,} experiments, a look after each of {config.requests:,} "
        f"requests, level {config.level:g}",
        console=console,
    )
    print_table(
        ["failing", "rolled back", "after outcomes (median)", "95 % of them after"],
        [
            [
                percent(row["failing"], 1),
                percent(row["rolled_back"], 1),
                *(
                    "-" if row[name] is None else f"{row[name]:,.0f}"
                    for name in ("outcomes_p50", "outcomes_p95")
                ),
            ]
            for row in guards
        ],
        title=f"guardrail at {percent(limit)}, level {level:g}, up to {config.outcomes:,} outcomes",
        console=console,
    )
    write_json(
        Path(config.output),
        {"commit": commit(), "config": asdict(config), "rows": [*differences, *guards]},
    )
    console.print(f"results: {config.output}", highlight=False, soft_wrap=True)
    return 0

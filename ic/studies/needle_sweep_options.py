"""How large a needle sweep is, and which of its runs to do."""

from __future__ import annotations

from dataclasses import dataclass, field

from ic.errors import UsageError, check_choice


@dataclass(frozen=True)
class NeedleScale:
    """The model of a sweep, its lengths in tokens, and how long it trains.

    Attributes:
        experiment: of the base model, which the sweep fine-tunes.
        start: overrides of the base model's `fit`.
        model: overrides of the model in every stage behind it,
        data: of the data,
        evaluation: and of the grid that each run answers.
        lengths: of the needle conversations,
        short: those of the set with short ones alone,
        long: with long ones alone,
        many_lengths: and with many distractors, which do not fit into the shortest.
        many: distractors of that set.
        val_lengths: of the validation's conversations.
        tokens: of each set, about as many of each length.
        sft_steps, sft_lr: optimizer steps and learning rate of supervised fine-tuning,
        dpo_steps, dpo_lr: and of preference training.
    """

    experiment: str
    start: tuple[str, ...]
    model: tuple[str, ...]
    data: tuple[str, ...]
    evaluation: tuple[str, ...]
    lengths: tuple[int, ...]
    short: tuple[int, ...]
    long: tuple[int, ...]
    many_lengths: tuple[int, ...]
    many: int
    val_lengths: tuple[int, ...]
    tokens: int
    sft_steps: int
    sft_lr: str
    dpo_steps: int
    dpo_lr: str


_CPU_MODEL = (
    "model=mla_tiny",
    "model.hidden_size=256",
    "model.intermediate_size=680",
    "model.num_hidden_layers=4",
    "model.kv_lora_rank=128",
    "model.qk_nope_head_dim=64",
    "model.qk_rope_head_dim=32",
    "model.v_head_dim=64",
)
SCALES = {
    "gpu": NeedleScale(
        experiment="mla_small",
        start=(),
        model=("model=mla_small",),
        data=("data.context_length=16384", "data.tokens_per_batch=32768"),
        evaluation=("evaluation.samples_by_length={131072:5}",),
        lengths=(512, 1024, 4096, 16384),
        short=(512, 1024),
        long=(16384,),
        many_lengths=(1536, 4096, 16384),
        many=32,
        val_lengths=(2048, 8192),
        tokens=3_600_000,
        sft_steps=400,
        sft_lr="5e-4",
        dpo_steps=100,
        dpo_lr="2e-5",
    ),
    "cpu": NeedleScale(
        experiment="mla_tiny",
        start=(
            *_CPU_MODEL,
            "optimizer.lr=3e-3",
            "optimizer.weight_decay=0.1",
            "optimizer.decay_fraction=0.25",
            "data.context_length=512",
            "callbacks.context_length.threshold=0.95",
            "trainer.max_steps=700",
        ),
        model=_CPU_MODEL,
        data=(
            "data.context_length=1024",
            "data.tokens_per_batch=4096",
            "trainer.accelerator=cpu",
            "trainer.precision=32-true",
            "data.num_workers=0",
        ),
        evaluation=(
            "evaluation.lengths=[512,1024,2048]",
            "evaluation.depths=[0,0.5,1]",
            "evaluation.samples=10",
            "evaluation.samples_by_length={}",
        ),
        lengths=(512, 1024),
        short=(512,),
        long=(1024,),
        many_lengths=(768, 1024),
        many=16,
        val_lengths=(512, 1024),
        tokens=600_000,
        sft_steps=120,
        sft_lr="3e-4",
        dpo_steps=25,
        dpo_lr="3e-5",
    ),
}


@dataclass
class NeedleSweepConfig:
    """The verb `needle_sweep`.

    Attributes:
        scale: `gpu`, mla_small to 16k tokens, or `cpu`, 3 M parameters to 1k.
        only: names of the sets to compare now, such as `short`; empty for all.
        overrides: of every `fit`.
        seeds: each set is trained on with each.
        jobs_per_gpu: runs at a time on each visible GPU,
        jobs: or where there is no GPU. Those that share a device lose nothing by it, since all take
            the same steps.
        run_timeout_s: a run that takes longer, evaluation included, is ended and reported.
        drop_others: begin anew where a results file holds rows of other settings or commits.
        output_dir: folder of the sets, the runs, and the results `sft.json` and `dpo.json`.
    """

    scale: str = "gpu"
    only: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    jobs_per_gpu: int = 1
    jobs: int = 1
    run_timeout_s: float = 1800.0
    drop_others: bool = False
    output_dir: str = "runs/needle_sweep"

    def __post_init__(self) -> None:
        check_choice("scale", self.scale, list(SCALES))
        for name in self.only:
            if name not in (known := [*self.sft_sets, *self.dpo_sets]):
                raise UsageError.unknown("set in only", name, list(dict.fromkeys(known)))

    @property
    def sizes(self) -> NeedleScale:
        return SCALES[self.scale]

    @property
    def sft_sets(self) -> list[str]:
        """Names of the sets that supervised fine-tuning compares."""
        many = f"{self.sizes.many}-distractors"
        return ["base", "no-distractors", many, "short", "long", "middle", "random-words"]

    @property
    def dpo_sets(self) -> list[str]:
        """Names of the sets that preference training compares."""
        return ["base", "distractor", "near-miss", "refusal"]

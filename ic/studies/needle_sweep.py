"""Which needle parameters help: a small model is fine-tuned on needle conversations (SFT), then on
pairs (DPO), that differ in one parameter, several seeds each, for equal steps, and asked for one of
nine keys.

Five stages: the sets of conversations, the base model, the comparison of SFT, the SFT model that
the pairs start from, and the comparison of DPO. What is done is kept: a sweep that was interrupted
goes on where it stopped.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from ic.config.compose import compose_config
from ic.config.run import RunConfig
from ic.datamodules.needle_pairs import needle_pairs, write_pairs
from ic.datamodules.needle_pairs_options import MakePreferencesOptions
from ic.datamodules.tokenizers import build_tokenizer
from ic.files.run_folder import RunFolder
from ic.studies.ablation.options import AblationConfig, AblationOptions, AblationVariant
from ic.studies.ablation.run import run_ablation
from ic.studies.ablation.variants import plan_runs
from ic.studies.needle_sweep_options import NeedleSweepConfig
from ic.studies.processes import fit_unless_finished


@dataclass(frozen=True)
class Model:
    """A model that the next stage starts from: its run, and the overrides of the run's `fit`."""

    run: RunFolder
    overrides: list[str]


@dataclass(frozen=True)
class SweepPlan:
    """The five stages.

    Attributes:
        sets: each file's pairs, by name.
        base, sft: the models.
        compare_sft, compare_dpo: the comparisons; None where nothing of one was asked for.
    """

    sets: dict[str, MakePreferencesOptions]
    base: Model
    compare_sft: AblationOptions | None
    sft: Model
    compare_dpo: AblationOptions | None


def run_needle_sweep(config: NeedleSweepConfig) -> int:
    """Do what is missing -> 0, or the exit code of what failed.

    Raises:
        ValueError: overrides that no `fit` takes, before anything is written.
    """
    plan = plan_sweep(config)
    for model in (plan.base, plan.sft):
        compose_config("fit", RunConfig, model.overrides)
    for comparison in (plan.compare_sft, plan.compare_dpo):
        if comparison is not None:
            plan_runs(comparison)
    for name, options in plan.sets.items():
        _write_set(name, options)
    for title, model, comparison in (
        ("the base model", plan.base, plan.compare_sft),
        ("the SFT model", plan.sft, plan.compare_dpo),
    ):
        if code := fit_unless_finished(title, model.run, model.overrides):
            return code
        if comparison is not None and (code := run_ablation(AblationConfig(comparison))):
            return code
        if plan.compare_dpo is None:  # nothing starts from the SFT model
            break
    return 0


def plan_sweep(config: NeedleSweepConfig) -> SweepPlan:
    """The stages, with the arguments of each `fit`."""
    sizes = config.sizes
    base = _model(config, "base", [f"experiment={sizes.experiment}", *sizes.start])
    shared = _shared(config, "sft_32k", base, sizes.sft_steps, sizes.sft_lr)
    sft = _model(config, "sft", shared)
    compare_sft = _comparison(config, "sft", shared, config.sft_sets)
    shared = _shared(config, "dpo_32k", sft, sizes.dpo_steps, sizes.dpo_lr)
    compare_dpo = _comparison(config, "dpo", shared, config.dpo_sets)
    wanted = {"base", "val", *(config.only or [*config.sft_sets, *config.dpo_sets])}
    sets = {name: options for name, options in _sets(config).items() if name in wanted}
    return SweepPlan(sets, base, compare_sft, sft, compare_dpo)


def _sets(config: NeedleSweepConfig) -> dict[str, MakePreferencesOptions]:
    """Needle conversations of about as many tokens of each length, all sets alike in tokens."""
    sizes = config.sizes

    def pairs(name: str, lengths: tuple[int, ...] = sizes.lengths, **changes: Any) -> None:
        given = {"tokens_per_length": sizes.tokens // len(lengths), **changes}
        output = str(Path(config.output_dir) / f"{name}.jsonl")
        sets[name] = MakePreferencesOptions(output, list(lengths), **given)

    sets: dict[str, MakePreferencesOptions] = {}
    pairs("base")
    pairs("no-distractors", num_distractors=0)
    pairs(f"{sizes.many}-distractors", sizes.many_lengths, num_distractors=sizes.many)
    pairs("short", sizes.short)
    pairs("long", sizes.long)
    pairs("middle", depths=[0.4, 0.5, 0.6])
    pairs("random-words", filler="random")
    for name in ("distractor", "near-miss", "refusal"):
        pairs(name, rejected={name.replace("-", "_"): 1.0})
    pairs("val", sizes.val_lengths, split="validation", tokens_per_length=None, samples=2)
    return sets


def _write_set(name: str, options: MakePreferencesOptions) -> None:
    output = Path(options.output)
    if output.is_file():
        rank_zero_info(f"the set {name}: in {output} already")
    else:
        count = write_pairs(needle_pairs(options, build_tokenizer(options.tokenizer)), output)
        rank_zero_info(f"the set {name}: {count} pairs, {output}")


def _model(config: NeedleSweepConfig, run_id: str, overrides: list[str]) -> Model:
    experiment = overrides[0].partition("=")[2]
    return Model(
        RunFolder(Path(config.output_dir) / experiment / run_id),
        [
            *overrides,
            f"output_dir={config.output_dir}",
            f"run_id={run_id}",
            "overwrite=true",
            "callbacks.passkey.at_end=false",
            *config.overrides,
        ],
    )


def _shared(
    config: NeedleSweepConfig, experiment: str, start: Model, steps: int, lr: str
) -> list[str]:
    """Overrides that every run behind a model has."""
    sizes, folder = config.sizes, config.output_dir
    return [
        f"experiment={experiment}",
        *sizes.model,
        f"model.init_from={start.run.last}",
        "model.gradient_checkpointing=false",
        *sizes.data,
        f"data.train_files=[{folder}/base.jsonl]",
        f"data.val_files=[{folder}/val.jsonl]",
        f"trainer.max_steps={steps}",
        f"optimizer.lr={lr}",
        "logger=none",
    ]


def _comparison(
    config: NeedleSweepConfig, name: str, shared: list[str], sets: list[str]
) -> AblationOptions | None:
    """A variant for each set: all of the time goes to training, weights are not kept."""
    only = [each for each in sets if each in config.only]
    if config.only and not only:
        return None
    folder = config.output_dir
    return AblationOptions(
        variants=[
            AblationVariant(each, [f"data.train_files=[{folder}/{each}.jsonl]"]) for each in sets
        ],
        only=only,
        seeds=config.seeds,
        common=[
            *shared,
            "trainer.limit_val_batches=0",
            "trainer.num_sanity_val_steps=0",
            "callbacks.checkpoint=null",
            "callbacks.memory=null",
            *config.sizes.evaluation,
            "evaluation.share_haystack=true",
            "evaluation.control_samples=0",
            *config.overrides,
        ],
        max_time_s=None,
        jobs_per_gpu=config.jobs_per_gpu,
        jobs=config.jobs,
        run_timeout_s=config.run_timeout_s,
        output_dir=f"{folder}/runs",
        output=f"{folder}/{name}.json",
        drop_others=config.drop_others,
    )

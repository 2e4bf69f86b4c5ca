"""Against TRL's own trainers on the same batch and weights, and inside them."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from ic.datamodules.options import PreferenceDataOptions, SFTDataOptions
from ic.datamodules.preference import PreferenceDataModule, tokenize_pair
from ic.datamodules.sft import collate_conversations, tokenize_conversation
from ic.model import MLAForCausalLM
from ic.model.byte_tokenizer import ByteTokenizer
from ic.training.language_modeling import LanguageModelingModule
from ic.training.objective import objective
from ic.training.options import LOSS_TYPES, ObjectiveOptions, OptimizerOptions, PreferenceOptions
from ic.training.preference import completion_sums
from ic.training.preference_loss import PairLogProbs, preference_losses, preference_metrics
from tests.conftest import randomize
from tests.deepseek import deepseek_twin
from tests.training.conftest import CONVERSATIONS, PAIRS

trl = pytest.importorskip("trl")
QUIET: dict[str, Any] = {
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "fp16": False,
    "disable_tqdm": True,
    "per_device_train_batch_size": 4,
    "gradient_checkpointing": False,
    "max_length": None,
    "save_strategy": "no",
    "logging_strategy": "no",
}
# The loss types alone, then what changes them.
CASES: list[dict[str, Any]] = [
    {"loss_type": [name], "label_smoothing": 0.1 if name in ("robust", "exo_pair") else 0.0}
    for name in LOSS_TYPES
] + [
    {"loss_type": ["sigmoid"], "ld_alpha": 0.3},
    {"loss_type": ["ipo"], "ld_alpha": 0.0, "beta": 0.5},
    {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.7, 1.3]},
    {
        "loss_type": ["apo_zero", "sigmoid_norm", "sft"],
        "loss_weights": [1.0, 0.5, 0.2],
        "ld_alpha": 0.6,
    },
]


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        scale = max(1.0, float(grad.abs().max()))
        torch.testing.assert_close(ours[name] / scale, grad / scale, rtol=0, atol=1e-5, msg=name)


@pytest.fixture
def dpo(byte_model: MLAForCausalLM, tmp_path: Path) -> Any:
    """TRL's trainer on `PAIRS`, its reference another random model."""
    reference = copy.deepcopy(byte_model)
    torch.manual_seed(1)
    randomize(reference)
    return trl.DPOTrainer(
        byte_model,
        reference,
        trl.DPOConfig(str(tmp_path), **QUIET),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=ByteTokenizer(),
    )


@pytest.fixture(params=[True, False], ids=["prompt shared", "prompt twice"])
def batch(request: pytest.FixtureRequest) -> dict[str, Any]:
    config = PreferenceDataOptions(
        context_length=128, tokens_per_batch=1024, share_prompt=request.param
    )
    data = PreferenceDataModule(config, ByteTokenizer())
    pairs = [tokenize_pair(ByteTokenizer(), p, f"row {i}", config) for i, p in enumerate(PAIRS)]
    return data.collate(pairs)


@pytest.mark.parametrize("batch", [False], indirect=True)
def test_batch_is_the_collators(dpo: Any, batch: dict[str, Any]) -> None:
    theirs = dpo.data_collator([dict(row) for row in dpo.train_dataset])
    assert batch["input_ids"].equal(theirs["input_ids"])
    assert (batch["labels"] != -100).equal(theirs["completion_mask"].bool())


def test_losses_gradients_and_metrics(
    dpo: Any, batch: dict[str, Any], byte_model: MLAForCausalLM
) -> None:
    inputs = dpo.data_collator([dict(row) for row in dpo.train_dataset])
    model, reference = byte_model.train(), dpo.ref_model
    with torch.no_grad():
        reference_2S = completion_sums(reference, batch)[:2]
    for case in CASES:
        config = PreferenceOptions(**case)
        dpo.loss_types, dpo.beta = config.loss_type, config.beta
        dpo.loss_weights = config.loss_weights or [1.0] * len(config.loss_type)
        dpo.label_smoothing, dpo.ld_alpha = config.label_smoothing, config.ld_alpha
        dpo._metrics["train"].clear()
        theirs = dpo.compute_loss(model, inputs)
        their_gradients = gradients(model, theirs)
        pairs = PairLogProbs.from_sums(completion_sums(model, batch), reference_2S, config.ld_alpha)
        ours = preference_losses(pairs, config).mean()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=f"{case}")
        assert_same_gradients(gradients(model, ours), their_gradients)
        for name, value in preference_metrics(pairs, config.beta).items():
            if name in dpo._metrics["train"]:
                assert float(value.mean()) == pytest.approx(
                    dpo._metrics["train"][name][0], rel=1e-5, abs=1e-5
                )
    assert {"rewards/margins", "logps/chosen"} <= set(dpo._metrics["train"])


def sft_module(model: MLAForCausalLM) -> LanguageModelingModule:
    return LanguageModelingModule(model, ByteTokenizer(), OptimizerOptions(), ObjectiveOptions())


@pytest.mark.parametrize("packed", [False, True])
def test_sft_loss_and_gradients(byte_model: MLAForCausalLM, tmp_path: Path, packed: bool) -> None:
    settings = {**QUIET, "per_device_train_batch_size": len(CONVERSATIONS)}
    trainer = trl.SFTTrainer(
        byte_model,
        trl.SFTConfig(str(tmp_path), assistant_only_loss=True, **settings),
        train_dataset=Dataset.from_list(CONVERSATIONS),
        processing_class=ByteTokenizer(),
    )
    model = byte_model.train()
    theirs = trainer.compute_loss(
        model, trainer.data_collator([dict(row) for row in trainer.train_dataset])
    )
    their_gradients = gradients(model, theirs)
    samples = [
        tokenize_conversation(ByteTokenizer(), record, f"row {i}", SFTDataOptions())
        for i, record in enumerate(CONVERSATIONS)
    ]
    rows = [samples[:3], samples[3:]] if packed else [[sample] for sample in samples]
    batch = collate_conversations(rows, 258)
    module = sft_module(model)
    sums = module._sums(batch)
    weight = module.objective.all_tokens_weight
    ours = objective(sums.answers, sums.all_tokens, sums.num_targets, weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(model, ours), their_gradients)


@pytest.mark.parametrize("form", ["padded", "packed", "padding-free"])
def test_packing_leaves_the_loss(byte_model: MLAForCausalLM, tmp_path: Path, form: str) -> None:
    """All texts in one step give one loss, however the rows hold them; and DeepSeek-V3's."""
    options = {
        "padded": {},
        "packed": {"packing": True, "max_length": 128, "eval_packing": False},
        "padding-free": {"padding_free": True},
    }[form]
    settings = {**QUIET, "per_device_train_batch_size": len(CONVERSATIONS), **options}
    losses = []
    for model in (byte_model, deepseek_twin(byte_model)):
        trainer = trl.SFTTrainer(
            model,
            trl.SFTConfig(str(tmp_path), **settings),
            train_dataset=Dataset.from_list(CONVERSATIONS),
            processing_class=ByteTokenizer(),
        )
        batch = trainer.data_collator([dict(row) for row in trainer.train_dataset])
        losses.append(float(trainer.compute_loss(trainer.model, batch).detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    samples = [
        ByteTokenizer().apply_chat_template(row["messages"], return_tensors="pt", return_dict=False)
        for row in CONVERSATIONS
    ]
    sums = [byte_model.target_sums(ids, ids) for ids in samples]
    total = sum(float(s.all_tokens.detach()) for s in sums if s.all_tokens is not None)
    assert losses[0] == pytest.approx(total / sum(int(s.num_targets[1]) for s in sums), rel=1e-5)


def test_trains_in_their_sft_trainer(byte_model: MLAForCausalLM, tmp_path: Path) -> None:
    settings = {**QUIET, "per_device_train_batch_size": 2, "max_steps": 2, "learning_rate": 1e-3}
    trainer = trl.SFTTrainer(
        byte_model,
        trl.SFTConfig(str(tmp_path), assistant_only_loss=True, **settings),
        train_dataset=Dataset.from_list(CONVERSATIONS),
        processing_class=ByteTokenizer(),
    )
    batch = trainer.data_collator([dict(row) for row in trainer.train_dataset])
    before = float(trainer.compute_loss(trainer.model, batch).detach())
    trainer.train()
    assert float(trainer.compute_loss(trainer.model, batch).detach()) < before - 0.05


def test_trains_in_their_dpo_trainer(byte_model: MLAForCausalLM, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    settings = {**QUIET, "per_device_train_batch_size": 4, "max_steps": 20, "learning_rate": 1e-2}
    trainer = trl.DPOTrainer(
        byte_model,
        None,
        trl.DPOConfig(str(tmp_path), **settings),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=ByteTokenizer(),
        peft_config=peft.LoraConfig(target_modules=["q_b_proj", "o_proj"]),
    )
    result = trainer.train()
    # It starts at log 2, where policy and reference agree.
    assert result.training_loss < math.log(2)

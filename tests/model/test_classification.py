"""Scores of sequences beside DeepseekV3ForSequenceClassification with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    DeepseekV3Config,
    DeepseekV3ForSequenceClassification,
)

from ic.model import MLAForCausalLM, MLAForSequenceClassification
from tests.conftest import SMALL, randomize


@pytest.mark.parametrize("labels", [torch.tensor([0.3, -1.0]), torch.tensor([2, 0])], ids=str)
def test_scores_losses_and_gradients_are_deepseeks(labels: torch.Tensor, tmp_path: Path) -> None:
    """A reward and one of three classes, of rows with padding at either end."""
    num_labels = 1 if labels.is_floating_point() else 3
    config = DeepseekV3Config(**SMALL, num_key_value_heads=4, first_k_dense_replace=3)
    config.num_labels = num_labels
    torch.manual_seed(0)
    theirs = DeepseekV3ForSequenceClassification(config).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    ours = MLAForSequenceClassification.from_pretrained(tmp_path).eval()
    ids = torch.randint(3, 97, (2, 24))
    ids[0, :5] = ids[1, 20:] = 0
    mask = (ids != 0).long()
    results = [model(ids, attention_mask=mask, labels=labels) for model in (ours, theirs)]
    assert results[0].logits.shape == (2, num_labels)
    torch.testing.assert_close(results[0].logits, results[1].logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(results[0].loss, results[1].loss, atol=1e-5, rtol=0)
    for result in results:
        result.loss.backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_language_models_checkpoint_gives_the_body(
    make_model: Callable[..., MLAForCausalLM], tmp_path: Path
) -> None:
    writer = make_model()
    writer.save_pretrained(tmp_path / "writer")
    reward = AutoModelForSequenceClassification.from_pretrained(tmp_path / "writer", num_labels=1)
    assert type(reward) is MLAForSequenceClassification
    ids = torch.randint(3, 97, (1, 9))
    hidden = writer.model(ids).last_hidden_state
    assert reward.model(ids).last_hidden_state.equal(hidden)
    expected = hidden[:, -1] @ reward.score.weight.T
    torch.testing.assert_close(reward(ids).logits, expected, atol=1e-6, rtol=0)
    assert reward.score.weight.abs().max() > 0
    reward.save_pretrained(tmp_path / "reward")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    torch.testing.assert_close(again(ids).logits, reward(ids).logits, atol=1e-6, rtol=0)

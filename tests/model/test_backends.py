"""What each GPU runs: values of the decision, and how it reaches the configuration."""

from __future__ import annotations

import pytest
import torch

from ic.config.data import PasskeyDataConfig
from ic.config.model import ModelConfig
from ic.config.run import RunConfig
from ic.config.trainer import TrainerConfig
from ic.conversion.parity.options import ParityConfig
from ic.inference.options import InferenceOptions, LoadOptions
from ic.model import MLAConfig, MLAForCausalLM
from ic.model.backends import Backends, gpu_capability, resolve_backends
from ic.run.build import adapt_to_gpu
from ic.verbs.generate import Config as GenerateConfig

TRITON = Backends("triton", "triton", "triton", "bf16-mixed")


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0)])
def test_from_sm_80_on_what_was_asked_for(capability: tuple[int, int]) -> None:
    assert resolve_backends(TRITON, capability) == (TRITON, None)


@pytest.mark.parametrize(
    ("requested", "precision", "notice"),
    [
        (
            TRITON,
            "16-mixed",
            "this GPU is sm_75, below sm_80: attention=torch in place of triton, norm=torch in place of triton, "
            "rope=torch in place of triton, 16-mixed in place of bf16-mixed",
        ),
        (
            Backends(norm="triton", precision="bfloat16"),
            "float16",
            "this GPU is sm_75, below sm_80: norm=torch in place of triton, float16 in place of bfloat16",
        ),
        (
            Backends(precision="bf16-true"),
            "16-mixed",
            "this GPU is sm_75, below sm_80: 16-mixed in place of bf16-true",
        ),
        (Backends(precision="32-true"), "32-true", None),
        (Backends(precision="16-mixed"), "16-mixed", None),
        (Backends(precision="float16"), "float16", None),
    ],
)
def test_before_sm_80_torch_in_float16(
    requested: Backends, precision: str, notice: str | None
) -> None:
    assert resolve_backends(requested, (7, 5)) == (Backends(precision=precision), notice)


def test_without_a_gpu() -> None:
    on_torch = Backends(precision="bf16-mixed")
    assert resolve_backends(on_torch, None) == (on_torch, None)
    for name in ("attention", "norm", "rope"):
        with pytest.raises(ValueError, match=f"^{name}=triton: PyTorch sees no CUDA GPU"):
            resolve_backends(Backends(**{name: "triton"}), None)


def test_a_run_is_adapted_to_the_oldest_gpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    chips = [(8, 0), (7, 5)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(chips))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: chips[i])
    config = RunConfig(
        model=ModelConfig(attention="triton", rope="triton"),
        data=PasskeyDataConfig(),
        trainer=TrainerConfig(precision="bf16-mixed"),
    )
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        adapted = adapt_to_gpu(config)
    model = adapted.model
    assert (model.attention, model.norm, model.rope) == ("torch", "torch", "torch")
    assert adapted.trainer.precision == "16-mixed"
    (line,) = [r.getMessage() for r in caplog.records]
    assert line.startswith("this GPU is sm_75, below sm_80: attention=torch")
    assert "\n" not in line
    chips.pop()
    assert adapt_to_gpu(config) == config
    assert gpu_capability("cpu") is None


def test_switches_reach_the_model_configuration() -> None:
    config = ModelConfig(attention="triton", norm="triton").mla_config(vocab_size=320)
    assert (config.attention_backend, config.norm_backend, config.rope_backend) == (
        "triton",
        "triton",
        "torch",
    )
    config.set_backends(Backends(rope="triton"))
    assert (config.attention_backend, config.norm_backend, config.rope_backend) == (
        "torch",
        "torch",
        "triton",
    )
    for make in (LoadOptions, InferenceOptions, GenerateConfig):
        assert make(norm="triton", dtype="float16").backends() == Backends(
            norm="triton", precision="float16"
        )


@pytest.mark.parametrize("name", ["attention", "norm", "rope"])
@pytest.mark.parametrize("make", [ModelConfig, InferenceOptions, GenerateConfig, ParityConfig])
def test_a_misspelt_backend_names_the_nearest(make: type, name: str) -> None:
    message = f"{name}='tritn': did you mean triton\\? choose one of torch, triton"
    with pytest.raises(ValueError, match=message):
        make(**{name: "tritn"})
    with pytest.raises(ValueError, match=f"{name}_backend='tritn': did you mean triton"):
        MLAConfig(**{f"{name}_backend": "tritn"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_backend": "triton", "qk_rope_head_dim": 24},
            "qk_rope_head_dim=24: the Triton rotation takes powers of two from 16 on; use rope=",
        ),
        (
            {"attention_backend": "triton", "v_head_dim": 24},
            "v_head_dim=24: the Triton attention takes powers of two from 16 on; use attention=",
        ),
        (
            {"attention_backend": "triton", "qk_nope_head_dim": 40},
            r"qk_nope_head_dim \+ qk_rope_head_dim=56: the Triton attention takes a power of two or",
        ),
        (
            {"attention_backend": "triton", "kv_lora_rank": 44, "qk_rope_head_dim": 32},
            "kv_lora_rank=44 and qk_rope_head_dim=32: the Triton decode takes ranks and rotary",
        ),
    ],
)
def test_dimensions_that_the_kernels_do_not_take(changes: dict[str, object], message: str) -> None:
    sizes = {"qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "kv_lora_rank": 64, "v_head_dim": 32}
    small = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    on_torch = {name: value for name, value in changes.items() if not name.endswith("_backend")}
    MLAForCausalLM(MLAConfig(**small, **sizes | on_torch))
    with pytest.raises(ValueError, match=message):
        MLAForCausalLM(MLAConfig(**small, **sizes | changes))

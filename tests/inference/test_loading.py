"""Every kind of source gives the model, the tokenizer and what is known of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ic.checkpoint.errors import CheckpointError
from ic.checkpoint.export import export_checkpoint
from ic.checkpoint.folder import FolderCheckpointIO, load_config, load_model
from ic.checkpoint.source import find_source
from ic.config.run import ModelConfig
from ic.inference.loading import load_source
from ic.inference.options import InferenceOptions
from ic.model import MLAForCausalLM
from ic.model.byte_tokenizer import ByteTokenizer
from ic.model.fingerprint import fingerprint
from tests.checkpoint.gguf_files import byte_level_bpe, deepseek
from tests.conftest import SMALL

IDS = torch.arange(3, 33)[None]


def cpu(checkpoint: Path, **options: Any) -> InferenceOptions:
    return InferenceOptions(checkpoint=str(checkpoint), accelerator="cpu", **options)


@pytest.fixture
def run(make_model: Callable[..., MLAForCausalLM], tmp_path: Path) -> Path:
    """A run whose checkpoint at step 7 trained at 2,048 tokens."""
    model = make_model(vocab_size=320)
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    io = FolderCheckpointIO(model.config, ByteTokenizer())
    folder = tmp_path / "runs/debug/default"
    io.save_checkpoint({"state_dict": state, "context_length": 2048}, folder / "checkpoints/step=7")
    (folder / "checkpoints/last").symlink_to("step=7")
    return folder


@torch.no_grad()
def test_a_run_and_its_export(
    run: Path, make_model: Callable[..., MLAForCausalLM], tmp_path: Path
) -> None:
    export_checkpoint(find_source(run), tmp_path / "export")
    for given, name in ((run, "debug, step 7"), (tmp_path / "export", "export")):
        loaded = load_source(cpu(given))
        assert loaded.model(IDS).logits.equal(make_model(vocab_size=320)(IDS).logits)
        assert isinstance(loaded.tokenizer, ByteTokenizer)
        assert loaded.name == name
        assert loaded.trained_length == 2048
        assert loaded.folder == find_source(given).path
    assert json.loads((tmp_path / "export/config.json").read_text())["trained_length"] == 2048


@torch.no_grad()
def test_a_quantised_cache(run: Path) -> None:
    """As asked for, or as the source was saved with; the answers of each are kept apart."""
    plain, quantised = load_source(cpu(run)).model, load_source(cpu(run, cache_dtype="int8")).model
    for model, dtype in ((plain, torch.float32), (quantised, torch.int8)):
        cache = model(IDS, use_cache=True).past_key_values
        assert cache.layers[0].latents().dtype == dtype
    assert fingerprint(quantised) == f"{fingerprint(plain)}-int8"
    folder = run / "checkpoints/step=7"
    config = load_config(folder)
    config.set_cache_dtype("fp8")
    config.save_pretrained(folder)
    (folder / "checksums.sha256").unlink()
    assert load_source(cpu(run)).model.config.cache_dtype == "fp8"
    assert load_source(cpu(run, cache_dtype="int8")).model.config.cache_dtype == "int8"
    with pytest.raises(ValueError, match="cache_dtype='fp4': did you mean fp8"):
        cpu(run, cache_dtype="fp4")


@torch.no_grad()
@pytest.mark.parametrize("shard", ["1GB", "100KB"])
def test_a_hugging_face_folder(tmp_path: Path, shard: str) -> None:
    reference = deepseek()
    reference.save_pretrained(tmp_path, max_shard_size=shard)
    byte_level_bpe().save(str(tmp_path / "tokenizer.json"))
    assert (tmp_path / "model.safetensors").exists() == (shard == "1GB")
    loaded = load_source(cpu(tmp_path))
    torch.testing.assert_close(loaded.model(IDS).logits, reference(IDS).logits, atol=1e-5, rtol=0)
    assert loaded.tokenizer("the 12")["input_ids"] == byte_level_bpe().encode("the 12").ids
    assert loaded.trained_length is None
    half = load_source(cpu(tmp_path, dtype="bfloat16")).model
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    # The index says which files are meant: others may hold the same weights again.
    if shard == "100KB":
        shutil.copy(next(tmp_path.glob("*.safetensors")), tmp_path / "consolidated.safetensors")
    export_checkpoint(find_source(tmp_path), tmp_path / "export")
    config = json.loads((tmp_path / "export/config.json").read_text())
    assert (config["model_type"], config["architectures"]) == (
        "deepseek_v3",
        ["DeepseekV3ForCausalLM"],
    )
    exported = load_source(cpu(tmp_path / "export"))
    assert exported.model(IDS).logits.equal(loaded.model(IDS).logits)
    assert exported.tokenizer("the 12")["input_ids"] == byte_level_bpe().encode("the 12").ids


@torch.no_grad()
def test_rope_as_the_hub_writes_it(tmp_path: Path) -> None:
    """DeepSeek's own config.json: `rope_theta` beside `rope_scaling` with its `type`."""
    yarn = {"factor": 8, "original_max_position_embeddings": 512, "beta_fast": 32, "beta_slow": 1}
    yarn |= {"mscale": 1.0, "mscale_all_dim": 0.7}
    rope = {"rope_type": "yarn", "rope_theta": 5000.0, **yarn}
    reference = deepseek(rope_parameters=rope)
    reference.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"rope_theta": 5000.0, "rope_scaling": {"type": "yarn", **yarn}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_source(cpu(tmp_path, tokenizer="bytes"))
    torch.testing.assert_close(loaded.model(IDS).logits, reference(IDS).logits, atol=1e-5, rtol=0)


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda f: edit(f, model_type="starling"),
            "of type 'starling'; infinite_context, and deepseek_v",
        ),
        (
            lambda f: edit(f, first_k_dense_replace=1),
            "config.json cannot be loaded: first_k_dense_",
        ),
        (lambda f: (f / "tokenizer.json").unlink(), "holds no tokenizer .* tokenizer=bytes or tok"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "the tokenizer in .* cannot be loaded"),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            "but pytorch_model.b",
        ),
        (lambda f: edit(f, num_hidden_layers=1, first_k_dense_replace=1), "model has no place for"),
        (
            lambda f: edit(f, num_hidden_layers=3, first_k_dense_replace=3),
            "lacks 12 tensors, the f",
        ),
    ],
    ids=["type", "experts", "no_tokenizer", "bad_tokenizer", "pickled", "more", "fewer"],
)
def test_unusable_folders(tmp_path: Path, break_it: Callable[[Path], Any], message: str) -> None:
    deepseek().save_pretrained(tmp_path)
    byte_level_bpe().save(str(tmp_path / "tokenizer.json"))
    load_source(cpu(tmp_path))
    break_it(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        load_source(cpu(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_code_of_a_folder_is_not_run(tmp_path: Path) -> None:
    deepseek().save_pretrained(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\nclass E: pass\n")
    edit(tmp_path, auto_map={"AutoConfig": "evil.E", "AutoModelForCausalLM": "evil.E"})
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "E", "auto_map": {"AutoTokenizer": ["evil.E", None]}})
    )
    with pytest.raises(ValueError, match="the tokenizer in .* cannot be loaded"):
        load_source(cpu(tmp_path))
    load_source(cpu(tmp_path, tokenizer="bytes"))
    export_checkpoint(find_source(tmp_path), tmp_path / "export", tokenizer=ByteTokenizer())
    assert not (tmp_path / "owned").exists()
    assert not (tmp_path / "export/evil.py").exists()
    assert "auto_map" not in (tmp_path / "export/config.json").read_text()


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    deepseek(vocab_size=200).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokenizer has 263 tokens, but the vocabulary of .* 200:"):
        load_source(cpu(tmp_path, tokenizer="bytes"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is none")
def test_a_backend_that_this_machine_lacks(tmp_path: Path) -> None:
    deepseek().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="^rope=triton: PyTorch sees no CUDA GPU"):
        load_source(cpu(tmp_path, tokenizer="bytes", rope="triton"))


def test_options(tmp_path: Path) -> None:
    for wrong, message in (
        ({"dtype": "bf16"}, "dtype='bf16': did you mean bfloat16"),
        ({"accelerator": "gpus"}, "accelerator='gpus': did you mean gpu"),
        ({"norm": "tritan"}, "norm='tritan': did you mean triton"),
    ):
        with pytest.raises(ValueError, match=message):
            InferenceOptions(**wrong)
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        load_source(cpu(tmp_path / "nowhere"))


def test_a_next_stage_keeps_the_length(run: Path) -> None:
    """A run that begins from weights trained at 2,048 tokens was trained at them too."""
    config = load_config(run / "checkpoints/last")
    sizes = {name: getattr(config, name) for name in SMALL if not name.endswith("token_id")}
    vocabulary = sizes.pop("vocab_size")
    weights = load_model(run / "checkpoints/last").state_dict()
    for given in (run / "checkpoints/last", run):  # a run's folder is its `last`
        options = ModelConfig(**sizes, length_temperature="none", init_from=str(given))
        model = options.build(ByteTokenizer(), vocabulary)
        assert model.config.trained_length == 2048
        for name, value in model.state_dict().items():
            assert torch.equal(value, weights[name].float()), name
    (run / "model.gguf").touch()
    with pytest.raises(ValueError, match="model.gguf is a GGUF file: write its weights into"):
        ModelConfig(init_from=str(run / "model.gguf")).build(ByteTokenizer(), vocabulary)

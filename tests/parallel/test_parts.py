"""The parts of sharded training on two gloo processes, each against its one-process form."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from ic.model import MLAConfig, MLAForCausalLM
from ic.model.adapter import adapter_disabled, add_adapter
from ic.model.options import AdapterOptions
from ic.parallel.context_parallel import ContextParallel
from ic.parallel.fsdp2 import FSDP2Strategy, shard_model
from ic.parallel.mesh import build_mesh
from ic.training.muon import BatchedMuon
from ic.training.optimizers import build_optimizer
from ic.training.options import OptimizerOptions
from ic.training.sharded_muon import ShardedMuon
from tests.conftest import SMALL, randomize
from tests.gqa import FAMILIES, exact_twin
from tests.parallel.training_run import join


def on_two(body: Callable[[], None]) -> Callable[..., None]:
    """A function for `spawn` that runs `body` in an initialised group."""

    @functools.wraps(body)
    def run(rank: int, num_processes: int, port: int) -> None:
        join(rank, num_processes, port)
        dist.init_process_group("gloo")
        body()

    return run


@on_two
def sharded_muon_equals_muon() -> None:
    mesh = init_device_mesh("cpu", (2,))
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(0)
        compare_muon(mesh, dtype)
    copied = nn.Parameter(distribute_tensor(torch.randn(7, 12), mesh, [Replicate()]))
    copied.grad = torch.ones_like(copied)
    with pytest.raises(ValueError, match=r"shape \(7, 12\) is not sharded by rows"):
        ShardedMuon([copied]).step()


def compare_muon(mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """To the last bit in bfloat16; a product of float32 may depend on the length of its stack."""
    # Stacks of odd numbers of matrices and of rows, and fewer rows or matrices than ranks.
    shapes = [(7, 12), (12, 5), (1, 6), (8, 8), (3, 3), (7, 12), (12, 5), (7, 12)]
    whole = [torch.randn(shape) for shape in shapes]
    alone = [nn.Parameter(matrix.clone()) for matrix in whole]
    sharded = [nn.Parameter(distribute_tensor(matrix, mesh, [Shard(0)])) for matrix in whole]
    settings = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = [BatchedMuon(alone, **settings), ShardedMuon(sharded, **settings)]
    for optimizer in optimizers:
        optimizer.dtype = dtype
    for _ in range(3):
        for one, many in zip(alone, sharded, strict=True):
            one.grad = torch.randn_like(one)
            many.grad = distribute_tensor(one.grad, mesh, [Shard(0)])
        for optimizer in optimizers:
            optimizer.step()
    for one, many in zip(alone, sharded, strict=True):
        error = (many.full_tensor() - one).norm() / one.norm()
        assert error == 0 if dtype == torch.bfloat16 else error < 1e-6
        momentum = optimizers[1].state[many]["momentum_buffer"]
        assert momentum.full_tensor().equal(optimizers[0].state[one]["momentum_buffer"])


@on_two
def latents_come_back_in_order() -> None:
    parallel = ContextParallel(dist.group.WORLD)
    whole_BSC = torch.arange(2 * 12 * 3).view(2, 12, 3).double()
    own_BTC = parallel.split(whole_BSC)
    first = [[0, 1, 2, 9, 10, 11], [3, 4, 5, 6, 7, 8]][parallel.rank]
    assert own_BTC.equal(whole_BSC[:, first])
    own_BTC.requires_grad_()
    gathered_BSC = parallel.gather(own_BTC)
    assert gathered_BSC.equal(whole_BSC)
    weights_BSC = torch.randn(2, 2, 12, 3, generator=torch.Generator().manual_seed(1)).double()
    (gathered_BSC * weights_BSC[parallel.rank]).sum().backward()
    assert own_BTC.grad is not None
    assert own_BTC.grad.equal(weights_BSC.sum(0)[:, first])
    for count in (1, 3, 5, 0):
        assert parallel.gather_last(own_BTC, count).equal(whole_BSC[:, -count:])
    with pytest.raises(ValueError, match=r"of 10 tokens .* 4 chunks .* multiple of 4, such as 8"):
        parallel.split(whole_BSC[:, :10])


def sharded_model() -> tuple[MLAForCausalLM, Tensor]:
    torch.manual_seed(0)
    model = MLAForCausalLM(MLAConfig(**SMALL))  # type: ignore[arg-type]
    randomize(model)
    shard_model(model, build_mesh("cpu", 2, 1).shard, None)
    return model, torch.randint(
        97, (1, 8), generator=torch.Generator().manual_seed(dist.get_rank())
    )


@on_two
def rotations_are_not_rounded() -> None:
    model = MLAForCausalLM(MLAConfig(**SMALL))  # type: ignore[arg-type]
    shard_model(model, build_mesh("cpu", 2, 1).shard, torch.bfloat16)
    seen: list[Tensor] = []
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args: seen.append(args[1].cos_BTF)
    )
    ids = torch.arange(8)[None]
    with torch.autocast("cpu", torch.bfloat16):
        model.target_sums(ids, ids, position_ids=ids + 4000)
    assert seen[0].equal(model.model.rotary_emb(ids + 4000)[0])


@on_two
def accumulation_reduces_once() -> None:
    model, ids = sharded_model()
    strategy = FSDP2Strategy()
    strategy._model = model  # type: ignore[assignment]

    def backward() -> int:
        with CommDebugMode() as counted:
            sums = model.target_sums(ids, ids)
            assert sums.all_tokens is not None
            sums.all_tokens.backward()
        return sum(n for op, n in counted.get_comm_counts().items() if "reduce_scatter" in str(op))

    num_groups = SMALL["num_hidden_layers"] + 1  # type: ignore[operator]
    assert backward() == num_groups
    once = [p.grad.full_tensor() for p in model.parameters()]  # type: ignore[union-attr]
    model.zero_grad()
    with strategy.block_backward_sync():
        assert backward() == 0
    assert backward() == num_groups
    for parameter, gradient in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad.full_tensor(), 2 * gradient)  # type: ignore[union-attr]


@on_two
def an_adapter_off_at_first_trains() -> None:
    gradients = []
    for reference_first in (False, True):
        torch.manual_seed(0)
        model = MLAForCausalLM(MLAConfig(**SMALL))  # type: ignore[arg-type]
        add_adapter(model, AdapterOptions(r=3, target_modules=["q_b_proj", "kv_b_proj"]))
        randomize(model)
        shard_model(model, build_mesh("cpu", 2, 1).shard, torch.bfloat16)
        ids = torch.arange(8)[None]
        if reference_first:
            with torch.no_grad(), adapter_disabled(model):
                model.target_log_probs(ids, ids)
        model.target_log_probs(ids, ids).log_probs.sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0]
    for name, gradient in gradients[0].items():
        assert gradient.dtype == torch.float32
        assert gradient.full_tensor().equal(gradients[1][name].full_tensor())  # type: ignore[attr-defined, union-attr]


@on_two
def states_are_dtensors() -> None:
    model, ids = sharded_model()
    optimizer = build_optimizer(model, OptimizerOptions())
    model.target_sums(ids, ids).all_tokens.backward()  # type: ignore[union-attr]
    optimizer.step()
    # Copied as a checkpoint on disk is: the optimizers would share tensors otherwise.
    weights, state = copy.deepcopy(get_state_dict(model, optimizer))
    assert all(isinstance(tensor, DTensor) for tensor in weights.values())
    momentum = state["state"]["model.layers.0.self_attn.o_proj.weight"]["momentum_buffer"]
    assert isinstance(momentum, DTensor)
    assert state["state"]["lm_head.weight"]["exp_avg"].shape == (97, 64)
    fresh, _ = sharded_model()
    other = build_optimizer(fresh, OptimizerOptions())
    set_state_dict(fresh, other, model_state_dict=weights, optim_state_dict=state)
    for model_, optimizer_ in ((model, optimizer), (fresh, other)):
        model_.zero_grad()
        model_.target_sums(ids, ids).all_tokens.backward()  # type: ignore[union-attr]
        optimizer_.step()
    for one, two in zip(model.parameters(), fresh.parameters(), strict=True):
        assert one.full_tensor().equal(two.full_tensor())  # type: ignore[attr-defined]


@on_two
def a_mesh_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match=r"size=3 does not divide the 2 processes.*one of 1, 2,"):
        build_mesh("cpu", 2, 3)


@on_two
def a_prefill_after_decoding() -> None:
    cache = ContextParallel(dist.group.WORLD).new_cache(num_layers=1, capacity_tokens=8)
    (layer,) = cache.layers
    layer.append_split(torch.zeros(1, 1, 4, 3), torch.zeros(1, 1, 4, 2), num_tokens=8)
    layer.append_replicated(torch.ones(1, 1, 1, 3), torch.ones(1, 1, 1, 2))
    assert cache.get_seq_length() == 9
    assert layer.latents().shape[1] == 4 + (dist.get_rank() == 0)
    with pytest.raises(ValueError, match="a prefill of 8 tokens after decoding"):
        layer.append_split(torch.zeros(1, 1, 4, 3), torch.zeros(1, 1, 4, 2), num_tokens=8)
    with pytest.raises(ValueError, match=r"cannot be cropped to 2 tokens.*ended: 0, 8$"):
        layer.keep(2)


@on_two
def a_cache_is_cropped_where_a_piece_ended() -> None:
    cache = ContextParallel(dist.group.WORLD).new_cache(num_layers=1, capacity_tokens=8)
    (layer,) = cache.layers
    pieces = [torch.full((1, 1, 2, 3), float(i)) for i in range(3)]
    for piece in pieces:
        layer.append_split(piece, piece[..., :2], num_tokens=4)
    layer.append_replicated(torch.ones(1, 1, 1, 3), torch.ones(1, 1, 1, 2))
    assert [cache.croppable_length(n) for n in (13, 12, 11, 4, 3)] == [12, 12, 8, 4, 0]
    cache.keep(8)
    assert cache.get_seq_length() == 8
    layer.append_split(pieces[0], pieces[0][..., :2], num_tokens=4)
    assert layer.latents()[0, :, 0].tolist() == [0, 0, 1, 1, 0, 0]
    assert cache.croppable_length(20) == 12
    cache.crop(0)
    assert cache.get_seq_length() == 12
    cache.crop(-4)
    assert cache.get_seq_length() == 8
    with pytest.raises(ValueError, match="cannot be cropped to 7 tokens"):
        cache.crop(-1)
    cache.reset()
    assert cache.get_seq_length() == 0


@on_two
def attention_that_was_another_is_shared() -> None:
    """Norms of keys and none of latents, in training, prefill and decoding."""
    alone = exact_twin(FAMILIES["qwen3"].model(), interleave=False)
    shared = copy.deepcopy(alone)
    shared.model.context_parallel = parallel = ContextParallel(dist.group.WORLD)
    ids = torch.arange(3, 67).view(2, 32)
    losses = [model.target_sums(ids, ids).all_tokens for model in (alone, shared)]
    for loss in losses:
        loss.backward()  # type: ignore[union-attr]
    summed = parallel.sum(losses[1].detach()[None])[0]  # type: ignore[union-attr, index]
    torch.testing.assert_close(summed, losses[0].detach())  # type: ignore[union-attr]
    for (name, one), two in zip(alone.named_parameters(), shared.parameters(), strict=True):
        gradient = parallel.sum(two.grad)
        assert (gradient - one.grad).norm() < 1e-5 * one.grad.norm(), name  # type: ignore[operator, union-attr]
    caches = [model.model.new_cache() for model in (alone, shared)]
    with torch.no_grad():
        for piece in (ids[:, :20], ids[:, 20:24], ids[:, 24:25]):
            logits = [
                model(piece, past_key_values=cache, logits_to_keep=1).logits
                for model, cache in zip((alone, shared), caches, strict=True)
            ]
            torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=0)


PARTS = [
    attention_that_was_another_is_shared,
    sharded_muon_equals_muon,
    latents_come_back_in_order,
    rotations_are_not_rounded,
    accumulation_reduces_once,
    an_adapter_off_at_first_trains,
    states_are_dtensors,
    a_mesh_that_does_not_divide,
    a_prefill_after_decoding,
    a_cache_is_cropped_where_a_piece_ended,
]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_on_two_processes(part: Callable[..., None], spawn: Callable[..., None]) -> None:
    spawn(part, 2)

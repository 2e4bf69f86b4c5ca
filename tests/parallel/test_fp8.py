"""FP8 products under FSDP2 on two gloo processes compute what one process does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor

from ic.model import MLAConfig, MLAForCausalLM
from ic.model.fp8 import use_fp8
from ic.parallel.fsdp2 import shard_model
from ic.parallel.mesh import build_mesh
from tests.conftest import SMALL, randomize
from tests.parallel.training_run import join

pytest.importorskip("torchao", reason="pip install '.[fp8]'")


def losses(rank: int, num_processes: int, port: int) -> None:
    """Each rank's rows of two steps against both rows in one process, and the weights after."""
    join(rank, num_processes, port)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    models = [MLAForCausalLM(MLAConfig(**SMALL)) for _ in range(2)]  # type: ignore[arg-type]
    for model in models:
        torch.manual_seed(0)
        randomize(model)
        use_fp8(model.train(), "rowwise", None, [0], [])
    alone, sharded = models
    shard_model(sharded, build_mesh("cpu", num_processes, 1).shard, None)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    for step in range(2):
        ids = torch.randint(97, (2, 16), generator=torch.Generator().manual_seed(step))
        # In one process row by row, so that the scales of the gradients are of the same tokens.
        whole = 0.0
        for row in ids.split(1):
            loss = alone.target_sums(row, row).all_tokens / ids.numel()
            loss.backward()
            whole += float(loss)
        own = ids[rank : rank + 1]
        loss = sharded.target_sums(own, own).all_tokens / own.numel()
        loss.backward()
        both = loss.detach()
        dist.all_reduce(both)
        assert float(both) / num_processes == pytest.approx(whole, rel=1e-5)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    weight = sharded.model.layers[1].mlp.up_proj.weight
    assert isinstance(weight, DTensor)
    assert weight.dtype == torch.float32
    state = get_model_state_dict(sharded)
    assert state.keys() == alone.state_dict().keys()
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(state[name].full_tensor(), tensor, rtol=1e-4, atol=1e-5)


def test_two_ranks_are_one_process(spawn: Callable[..., None]) -> None:
    spawn(losses, 2)

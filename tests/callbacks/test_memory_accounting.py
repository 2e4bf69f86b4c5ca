"""What tensors hold, counted once each, and what the process holds."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from ic.callbacks.memory_accounting import ProcessMeter, host_peak_rss_bytes, storage_bytes

CPU = torch.device("cpu")


def test_storages_count_once_and_views_count_whole():
    base = torch.zeros(100)
    assert storage_bytes([base, base[:10], base.view(10, 10), None], CPU) == 400
    assert storage_bytes([torch.zeros(3), torch.zeros(5, dtype=torch.int64)], CPU) == 12 + 40
    assert storage_bytes([torch.zeros(3, device="meta")], CPU) == 0


def test_dtensor_counts_its_local_shard():
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (4,))
        sharded = distribute_tensor(torch.zeros(8, 6), mesh, [Shard(0)])
        assert sharded.shape == (8, 6)
        assert storage_bytes([sharded], CPU) == 2 * 6 * 4
    finally:
        dist.destroy_process_group()


def test_process_meter_sees_memory_that_is_gone_again():
    meter = ProcessMeter()
    if not meter.can_reset:
        pytest.skip("this kernel does not let a process reset its peak counter")
    meter.reset()
    start = meter.current()
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    del block
    assert meter.peak() - start > 60 * 2**20
    meter.reset()
    assert meter.peak() - start < 30 * 2**20


def test_process_meter_leaves_the_counter_alone_when_told_to():
    """Then a peak of before the phase is not the phase's; one above all before is."""
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    del block
    meter = ProcessMeter(reset_peak=False)
    assert not meter.can_reset
    before = host_peak_rss_bytes()
    meter.reset()
    assert host_peak_rss_bytes() == before > meter.current() + 30 * 2**20
    assert meter.peak() < meter.current() + 30 * 2**20
    block = torch.ones(before - meter.current() + 32 * 2**20, dtype=torch.uint8)
    del block
    assert meter.peak() > before + 20 * 2**20

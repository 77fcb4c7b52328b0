"""Records of pages, and the tiers that keep them."""

import gc
import os
import stat

import pytest
import torch
from layer_caches import HEADS, NUM_GROUPS, SHAPE, WIDTH, new_context

from pikv_megatron import PiKVConfig, PiKVInferenceContext
from pikv_megatron.cache.step.step_rows import StepRow
from pikv_megatron.cache.tiers.disk_tier import DiskTier, Loss
from pikv_megatron.cache.tiers.host_tier import HostTier
from pikv_megatron.cache.tiers.page_records import from_records, record_bytes, to_records
from pikv_megatron.cache.tiers.read_ahead import ReadAhead
from pikv_megatron.codec.registry import CodecOptions

CPU = torch.device("cpu")
BYTES = 64


def drawn_records(count: int) -> torch.Tensor:
    return torch.randint(256, (count, BYTES), dtype=torch.uint8)


def written_tier(tmp_path, count: int = 5):
    tier, records = DiskTier(BYTES, tmp_path, CPU), drawn_records(count)
    tier.reserve(count + 1)
    tier.hold_space()
    rows = tier.rows.allocate(torch.ones(count, dtype=torch.bool))
    assert not tier.write(rows, records).any()
    return tier, rows, records


@pytest.mark.parametrize("codec", [
    {}, {"format": "int2"}, {"format": "int3"}, {"format": "float8"},
    {"format": {"name": "mixed", "keys": "int4", "values": "int2"}},
    {"transform": {"name": "svd", "rank": 3}}, {"transform": "pyramidkv"},
])
def test_a_page_comes_back_as_it_was(codec):
    pages = CodecOptions(**codec).build(SHAPE.kv, 8, 1).allocate(6)
    for field in pages.tensors:
        field.view(torch.uint8).random_()
    before, places = [t.clone() for t in pages.tensors], torch.tensor([4, 0, 3])
    records = to_records(pages, places)
    assert records.shape == (3, record_bytes(pages)) and records.shape[1] % 8 == 0
    for field in pages.tensors:
        field.view(torch.uint8).zero_()
    from_records(records, pages, torch.tensor([1, 5, 2]))
    for field, old in zip(pages.tensors, before):
        if field.dim() == 1:
            field, old = field.view(1, -1, 1), old.view(1, -1, 1)
        field, old = field.view(torch.uint8), old.view(torch.uint8)
        assert torch.equal(field[:, [1, 5, 2]], old[:, places])
        assert not field[:, [0, 3, 4]].any()


def test_host_rows_are_used_again_and_given_back():
    tier, records = HostTier(BYTES, CPU), drawn_records(4)
    tier.reserve(4)
    rows = tier.rows.allocate(torch.ones(4, dtype=torch.bool))
    tier.write(rows, records)
    tier.rows.release(rows[:2])
    number = tier.compact()
    assert tier.rows.num_pages == 2
    assert torch.equal(tier.read(number[rows[2:]]), records[2:])
    tier.reserve(3)
    assert torch.equal(tier.read(number[rows[2:]]), records[2:])


def test_the_file_is_private_and_has_no_name(tmp_path):
    tier, rows, records = written_tier(tmp_path)
    found = os.fstat(tier._file)
    assert stat.S_IMODE(found.st_mode) == 0o600 and found.st_nlink == 0
    assert found.st_size == tier.num_bytes and not list(tmp_path.iterdir())
    read, loss = tier.read(rows.flip(0))
    assert torch.equal(read, records.flip(0)) and not loss.any()


def test_the_file_is_closed_with_its_tier(tmp_path):
    tier, *_ = written_tier(tmp_path)
    file = tier._file
    del tier
    gc.collect()
    with pytest.raises(OSError):
        os.fstat(file)


def test_what_was_cut_off_is_known(tmp_path):
    tier, rows, records = written_tier(tmp_path)
    os.ftruncate(tier._file, 3 * BYTES + 8)
    read, loss = tier.read(rows)
    assert loss.tolist() == [0, 0, 0, Loss.CUT, Loss.CUT] and torch.equal(read[:3], records[:3])
    # Writing behind the cut fills the gap with zeros.
    assert not tier.write(rows[4:], records[4:]).any()
    assert tier.read(rows)[1].tolist() == [0, 0, 0, Loss.CHANGED, 0]


def test_what_was_changed_is_known(tmp_path):
    tier, rows, _ = written_tier(tmp_path)
    os.pwrite(tier._file, b"x", 2 * BYTES + 5)
    os.pwrite(tier._file, b"y", 2 * BYTES + 6)
    assert tier.read(rows)[1].tolist() == [0, 0, Loss.CHANGED, 0, 0]


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    tier, rows, records = written_tier(tmp_path)
    monkeypatch.setattr(os, "pwritev", lambda *_: os.close(-1) or 0)
    assert tier.write(rows, records).tolist() == [Loss.FAILED] * 5

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwritev", full)
    assert tier.write(rows[:2], records[:2]).tolist() == [Loss.FULL] * 2


def test_what_is_read_ahead_is_there_when_it_is_asked_for(tmp_path):
    tier, rows, records = written_tier(tmp_path)
    ahead = ReadAhead(tier)
    ahead.begin(rows[[3, 1]])
    read, loss, num_ahead = ahead.read(rows[[1, 2, 3]])
    assert torch.equal(read, records[1:4]) and not loss.any() and num_ahead == 2
    ahead.begin(rows[[3, 4]])
    read, _, num_ahead = ahead.read(rows)
    assert torch.equal(read, records) and num_ahead == 2
    ahead.drop()
    assert ahead.read(rows)[2] == 0


def test_a_row_that_is_lost_ahead_is_found_lost_when_it_is_asked_for(tmp_path):
    tier, rows, records = written_tier(tmp_path)
    os.ftruncate(tier._file, 3 * BYTES)
    ahead = ReadAhead(tier)
    ahead.begin(rows[2:4])
    read, loss, num_ahead = ahead.read(rows[1:4])
    assert torch.equal(read[:2], records[1:3]) and loss.tolist() == [0, 0, Loss.CUT]
    assert num_ahead == 1


def test_a_driver_that_tells_nobody_of_losses_is_stopped(tmp_path):
    retention = {"name": "flexgen", "host": 0, "directory": tmp_path}
    context = new_context(
        PiKVConfig(page_size=4, window=4, num_sinks=2, flush_interval=2, retention=retention), 1, 80
    )
    layer, sequence = context.layers[1], context.start(0)

    def step(count: int) -> None:
        context.begin_step([[StepRow(sequence, count)]], CPU)
        kv = torch.randn(count, NUM_GROUPS, WIDTH)
        layer.attend(torch.randn(count, HEADS, WIDTH), kv, kv, context.plan)
        layer.settle(context.plan, None)
        context.finish_step()

    step(60)
    step(1)
    os.ftruncate(layer.store.pool.lower.disk._file, 0)
    with pytest.raises(ValueError, match="its file has become shorter"):
        step(1)
    context.reset()
    context.check_integrity()
    assert not layer.store.losses


def test_memory_limit_counts_the_device_alone(tmp_path):
    def reserved(**fields) -> PiKVInferenceContext:
        context = new_context(PiKVConfig(page_size=4, window=4, **fields), 1, 4000)
        context.reserve([(context.start(0), 4000)])
        return context

    tiers = {"name": "flexgen", "host": 0.5, "directory": tmp_path}
    context = reserved(retention=tiers)
    on_device, (in_host, in_file) = context.allocated_bytes(), context.tiers.num_bytes
    assert min(in_host, in_file) > on_device
    reserved(retention=tiers, memory_limit=on_device)
    with pytest.raises(ValueError, match="memory_limit"):
        reserved(memory_limit=on_device)

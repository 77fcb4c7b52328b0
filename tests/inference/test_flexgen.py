"""Pages over device, host memory and a file: a sequence reads what it would without tiers."""

import errno
import os
from collections.abc import Callable

import pytest
import torch
from layer_caches import SHAPE, new_context
from parity_models import VOCAB, build, draw_weights
from ranks import run_ranks

from pikv_megatron import PiKVConfig, PiKVForCausalLM, process_groups
from pikv_megatron.inference.outputs import CacheReport, GenerationOutput
from pikv_megatron.types import Recalled

SIZES = dict(shard_after=0, page_size=4, window=6, num_sinks=2, flush_interval=3, token_shards=4)
PROMPTS = [[(7 * i) % VOCAB for i in range(90)], [5, 9, 2], [(3 * i) % VOCAB for i in range(61)]]
NUM_NEW = 16
CACHES = {
    # Fewer pages are chosen than lie on the device, and more.
    "few": {"selector": {"name": "budget", "share": 0.2}, "codec": {"format": "int4"}},
    "many": {"selector": "mass", "prefill_chunk_size": 16},
    "by shards": {"router": "cache_aware"},
    "a sample": {"selector": {"name": "sampled", "epsilon": 0.4}},
}
TIERS = {"name": "flexgen", "host": 0.3}


def model_of(pg, **fields) -> PiKVForCausalLM:
    config = PiKVConfig(**SIZES | fields)
    model = build(pg, config)
    draw_weights(model, pg.ep.rank())
    return PiKVForCausalLM(model, config, vocab_size=VOCAB)


def pools_of(lm: PiKVForCausalLM) -> list:
    return [layer.store.pool for layer in lm.engine.context.sharded_layers]


def compare(pg, fields: dict, directory) -> CacheReport:
    """What tiers cost; they must not change a token."""
    plain = model_of(pg, **fields).generate(PROMPTS, max_new_tokens=NUM_NEW)
    tiered = model_of(pg, **fields, retention=TIERS | {"directory": directory})
    found = tiered.generate(PROMPTS, max_new_tokens=NUM_NEW, keep_cache=True)
    assert found.token_ids == plain.token_ids
    for pool in pools_of(tiered):
        pool.check_integrity()
        num_pages, lower = pool.free.num_pages, pool.lower
        assert pool.kv.keys.shape[1] == -(-num_pages // 4) + 1
        assert (lower.host_row >= 0).any() and (lower.disk_row >= 0).any()
    report = tiered.cache_report()
    assert report.host_bytes > 0 and report.recalled.seconds > 0
    assert report.file_bytes == sum(pool.lower.disk.num_bytes for pool in pools_of(tiered))
    sizes = [(pool.sizes, pool.lower.disk.num_bytes) for pool in pools_of(tiered)]
    assert tiered.generate(PROMPTS, max_new_tokens=NUM_NEW) == found
    assert sizes == [(pool.sizes, pool.lower.disk.num_bytes) for pool in pools_of(tiered)]
    tiered.engine.reset()
    for pool in pools_of(tiered):
        assert pool.place[:-1].max() < 0 and (pool.lower.host_row < 0).all()
        assert pool.lower.disk.rows.num_free == pool.lower.disk.rows.num_pages
        pool.check_integrity()
    return report


def run_damaged(pg, damage: Callable, directory) -> tuple[GenerationOutput, GenerationOutput]:
    """What is generated with tiers, the last rank's files damaged after some steps, and without."""
    lm = model_of(pg, retention=TIERS | {"host": 0, "directory": directory})

    def on_step(step) -> None:
        if step.step == 8 and pg.ep.rank() == pg.ep.size() - 1:
            victim = lm.engine.running[min(lm.engine.running)].cached.slot
            for layer in lm.engine.context.sharded_layers:
                damage(layer.store, victim)

    found = lm.generate(PROMPTS, max_new_tokens=NUM_NEW, callback=on_step)
    for pool in pools_of(lm):
        pool.check_integrity()
    return found, lm.generate(PROMPTS, max_new_tokens=NUM_NEW)


def change_pages(store, victim: int) -> None:
    """Other bytes where the file has pages of one sequence."""
    rows = store.pool.lower.disk_row[store.table.pages_of(victim)]
    disk = store.pool.lower.disk
    for row in rows[rows >= 0].tolist():
        os.pwrite(disk._file, b"?", row * disk.num_bytes // disk.rows.num_pages + 3)


def cut_file(store, victim: int) -> None:
    os.ftruncate(store.pool.lower.disk._file, 0)


def no_space(*_) -> None:
    raise OSError(errno.ENOSPC, "no space left")


def refused(pg, directory) -> str:
    """What is said where the first rank has no space."""
    hold = os.posix_fallocate
    os.posix_fallocate = hold if pg.ep.rank() else no_space
    try:
        model_of(pg, retention=TIERS | {"directory": directory}).generate(PROMPTS, 2)
    except ValueError as error:
        return str(error)
    finally:
        os.posix_fallocate = hold


def run_tiers(num_ranks: int, directory) -> tuple:
    with process_groups(expert_parallel_size=num_ranks, timeout_seconds=60) as pg:
        recalled = {name: compare(pg, CACHES[name], directory).recalled for name in CACHES}
        outputs = [run_damaged(pg, damage, directory) for damage in (change_pages, cut_file)]
        return recalled, outputs, refused(pg, directory)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_tiers_change_nothing_that_is_generated(num_ranks, tmp_path):
    by_rank = run_ranks(run_tiers, num_ranks, num_ranks, tmp_path)
    assert not list(tmp_path.iterdir())
    recalled, outputs, said = zip(*by_rank)
    total = {name: sum((each[name] for each in recalled), Recalled()) for name in CACHES}
    assert all(found.from_host and found.from_file for found in total.values())
    assert all((found.ahead > 0) == ("selector" in CACHES[name]) for name, found in total.items())
    assert all(found == outputs[0] for found in outputs)
    assert all("retention.directory" in each for each in said)
    changed, cut = outputs[0]
    found, whole = changed
    assert found.finish_reasons == ["error", "length", "length"]
    assert f"on rank {num_ranks - 1}" in found.errors[0] and "other bytes" in found.errors[0]
    assert found.errors[1:] == [None, None] and found.token_ids[1:] == whole.token_ids[1:]
    assert found.token_ids[0] == whole.token_ids[0][:9]
    found, whole = cut
    assert found.finish_reasons[:2] == ["error", "length"]
    assert "has become shorter" in found.errors[0]
    assert found.token_ids[1] == whole.token_ids[1]
    assert whole.finish_reasons == ["length"] * 3


@pytest.mark.parametrize("fields, said", [
    ({"sketch": "keys", "selector": "mass"}, "sketch keys reads the keys of all pages"),
    ({"codec": {"format": "aged"}}, "packs older pages anew"),
    ({"codec": {"transform": {"name": "pyramidkv", "young": 1}}}, "merges older pages"),
    ({"cuda_graphs": True}, "brings pages to the device"),
])
def test_what_does_not_go_with_tiers_is_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        PiKVConfig(retention="flexgen", **fields).resolve([SHAPE])


def test_megatrons_engine_takes_no_pages_in_files():
    context = new_context(PiKVConfig(retention=TIERS), 1, 80)
    with pytest.raises(ValueError, match="retention.host"):
        context.step(1, torch.zeros(1, 1, 8))

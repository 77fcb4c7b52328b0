"""Pages over device, host memory and a file: a sequence reads what it would without tiers."""

import pytest
from parity_models import VOCAB, build, draw_weights
from ranks import run_ranks

from pikv_megatron import PiKVConfig, PiKVForCausalLM, process_groups

SIZES = dict(shard_after=0, page_size=4, window=6, num_sinks=2, flush_interval=3, token_shards=4)
PROMPTS = [[(7 * i) % VOCAB for i in range(90)], [5, 9, 2], [(3 * i) % VOCAB for i in range(61)]]
NUM_NEW = 24
CACHES = {
    # Fewer pages are chosen than lie on the device, more, and all.
    "few": {"selector": {"name": "budget", "share": 0.2}, "codec": {"format": "int4"}},
    "many": {"selector": "mass", "prefill_chunk_size": 16},
    "all": {},
    "by shards": {"router": "cache_aware"},
    "a sample": {"selector": {"name": "sampled", "epsilon": 0.4}},
}
TIERS = {"name": "flexgen", "device": 0.25, "host": 0.3}


def model_of(pg, **fields) -> PiKVForCausalLM:
    config = PiKVConfig(**SIZES | fields)
    model = build(pg, config)
    draw_weights(model, pg.ep.rank())
    return PiKVForCausalLM(model, config, vocab_size=VOCAB)


def pools_of(lm: PiKVForCausalLM) -> list:
    return [layer.store.pool for layer in lm.engine.context.sharded_layers]


def compare(pg, fields: dict, directory) -> None:
    plain = model_of(pg, **fields).generate(PROMPTS, max_new_tokens=NUM_NEW)
    tiered = model_of(pg, **fields, retention=TIERS | {"directory": directory})
    found = tiered.generate(PROMPTS, max_new_tokens=NUM_NEW, keep_cache=True)
    assert found.token_ids == plain.token_ids
    for pool in pools_of(tiered):
        pool.check_integrity()
        num_pages, lower = pool.free.num_pages, pool.lower
        assert pool.kv.keys.shape[1] == -(-num_pages // 4) + 1
        assert (lower.host_row >= 0).any() and (lower.disk_row >= 0).any()
    sizes = [(pool.sizes, pool.lower.disk.num_bytes) for pool in pools_of(tiered)]
    assert tiered.generate(PROMPTS, max_new_tokens=NUM_NEW) == found
    assert sizes == [(pool.sizes, pool.lower.disk.num_bytes) for pool in pools_of(tiered)]
    tiered.engine.reset()
    for pool in pools_of(tiered):
        assert pool.place[:-1].max() < 0 and (pool.lower.host_row < 0).all()
        assert pool.lower.disk.rows.num_free == pool.lower.disk.rows.num_pages
        pool.check_integrity()


def run_tiers(num_ranks: int, directory) -> None:
    with process_groups(expert_parallel_size=num_ranks, timeout_seconds=60) as pg:
        for fields in CACHES.values():
            compare(pg, fields, directory)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_tiers_change_nothing_that_is_generated(num_ranks, tmp_path):
    run_ranks(run_tiers, num_ranks, num_ranks, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fields, said", [
    ({"sketch": "keys", "selector": "mass"}, "sketch keys reads the keys of all pages"),
    ({"codec": {"format": "aged"}}, "packs older pages anew"),
    ({"codec": {"transform": {"name": "pyramidkv", "young": 1}}}, "merges older pages"),
    ({"cuda_graphs": True}, "brings pages to the device"),
    ({"budget": "share"}, "retention is flexgen"),
])
def test_what_does_not_go_with_tiers_is_refused(fields, said):
    from layer_caches import SHAPE

    with pytest.raises(ValueError, match=said):
        PiKVConfig(retention="flexgen", **fields).resolve([SHAPE])

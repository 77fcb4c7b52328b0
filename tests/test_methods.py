"""Every method acts on the running cache: through `generate` at every size of the expert-parallel
group, and through Megatron's own engine."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from parity_models import VOCAB, build, draw_weights
from ranks import run_ranks

from pikv_megatron import PiKVConfig, PiKVForCausalLM, process_groups
from pikv_megatron.calibrated import save_calibrated
from pikv_megatron.calibration.run import calibrate
from pikv_megatron.methods import FAMILIES
from pikv_megatron.options import members

SMALL = dict(shard_after=0, page_size=4, window=6, num_sinks=2, flush_interval=3, token_shards=4)
PROMPTS = [[(7 * i) % VOCAB for i in range(90)], [5, 9, 2], [(3 * i) % VOCAB for i in range(61)]]
NUM_NEW = 12
BYTES = 28_000


# Stands for a file that a run writes: some methods are fitted to the model.
CALIBRATION = "a calibration of the model"


def named(key: str, name: str) -> dict:
    """The bare name of a method, under its key; what it needs besides."""
    if key.startswith("codec."):
        # Numbers of 3 bits are packed by 8 tokens.
        sizes = {"page_size": 8} if name == "int3" else {}
        return {"codec": {key.removeprefix("codec."): name}} | sizes
    if members(FAMILIES[key])[name].needs_calibration:
        return {key: name, "calibration": CALIBRATION}
    return {key: name} | ({"retention": "streaming"} if key == "budget" else {})


METHODS = {
    f"{key} {name}": named(key, name)
    for key, kind in FAMILIES.items() for name, options in members(kind).items()
    if options.extra is None  # tests/retention/test_kvpress.py has the other
} | {
    # Attention of random weights is diffuse, and by their defaults these would read nearly all.
    "budget bytes": {
        "retention": "streaming", "budget": {"name": "bytes", "bytes": BYTES},
    },
    "budget across shards": {
        "retention": "h2o", "budget": {"name": "share", "across_shards": True},
    },
    "budget across layers": {
        "retention": "h2o", "budget": {"name": "share", "across_layers": 2},
    },
    "selector certified": {"selector": {"name": "certified", "tolerance": 0.4}},
    "selector sampled": {"selector": {"name": "sampled", "epsilon": 0.4}},
    "router of the MoE": {
        "router": {"name": "top_k", "source": "moe"}, "token_shards": 1, "expert_shards": 4,
    },
    "router of the layer before": {
        "router": {"name": "eplb", "source": "previous"}, "token_shards": 1, "expert_shards": 4,
    },
    "router of a calibrated gate": {
        "router": {"name": "top_k", "source": "gate"}, "token_shards": 1, "expert_shards": 4,
        "calibration": CALIBRATION,
    },
    "selector budget over tiers": {
        "selector": "budget", "retention": {"name": "flexgen", "host": 0.3},
    },
    "mass with a tail": {"selector": {"name": "mass", "tail": "mean"}},
    "keys first": {
        "sketch": "keys", "selector": {"name": "mass", "tail": "mean"}, "codec": {"format": "int4"},
    },
    "keys of aged pages": {
        "sketch": "keys", "selector": "mass",
        "codec": {"format": {"name": "aged", "young": 1, "new": "int8", "old": "int4"}},
    },
    "pinned": {"retention": "streaming", "pinned": 24},
    # Shards have five pages here.
    "retention token_eviction": {
        "retention": {"name": "token_eviction", "pages": 2, "young": 0}, "calibration": CALIBRATION,
    },
    "pooled old pages": {
        "codec": {"transform": {"name": "pyramidkv", "level": 0, "young": 1}, "format": "int8"},
        "selector": "mass",
    },
    "keys before RoPE": {"codec": {"keys": "before_rope"}},
    "bases of experts": {
        "codec": {"transform": {"name": "svd", "per_expert": True}},
        "token_shards": 1, "expert_shards": 4,
    },
    "calibrated bases of experts": {
        "codec": {"transform": {"name": "svd", "per_expert": True}},
        "token_shards": 1, "expert_shards": 4, "calibration": CALIBRATION,
    },
    "everything": {
        "router": "top_k", "selector": {"name": "budget", "share": 0.5, "tail": "mean"},
        "retention": "h2o",
        "codec": {"transform": "mixed", "rotation": "hadamard", "format": "mixed"},
    },
}
LOSSLESS = [
    f"{key} {name}" for key, name in (
        ("router", "all"), ("selector", "all"), ("retention", "all"), ("retention", "flexgen"),
        ("sketch", "none"), ("codec.transform", "identity"), ("codec.format", "plain"),
    )
] + ["keys before RoPE"]
# Pages are few here, and the paper's K is 16 a shard.
KEEPS_SOME = "budget bytes", "retention token_eviction"
KEEPS_MOST = "retention all", "retention flexgen", "budget pages", *KEEPS_SOME
# An owner learns a basis from the pages that it has, and tokens travel to it in fewer bits where
# their pages are packed.
EVERYWHERE_ALIKE = "codec.transform identity", "codec.transform pyramidkv", "codec.format plain"
BY_RANK = [
    name for name in METHODS
    # Every rank has bytes of its own, and shards.
    if name in ("everything", "pooled old pages", "budget bytes", "budget across shards")
    or name.startswith("codec.") and name not in EVERYWHERE_ALIKE
]


def write_calibration(path: Path) -> None:
    """What there is to know of the model, which is alike on any number of ranks."""
    with process_groups(expert_parallel_size=1, timeout_seconds=60) as pg:
        model = build(pg, PiKVConfig())
        draw_weights(model, 0)
        generator = torch.Generator().manual_seed(2)
        ids = torch.randint(VOCAB, (4, 120), generator=generator)
        save_calibrated(path, {"model": "tiny"}, calibrate(model, ids, VOCAB, {}, per_expert=True))


def config_of(fields: dict, calibration: Path, sizes: dict) -> PiKVConfig:
    own = {"calibration": calibration} if "calibration" in fields else {}
    return PiKVConfig(**sizes | fields | own)


def run_method(pg, fields: dict, calibration: Path) -> dict:
    config = config_of(fields, calibration, SMALL)
    model = build(pg, config)
    draw_weights(model, pg.ep.rank())
    lm = PiKVForCausalLM(model, config, vocab_size=VOCAB)
    first = lm.generate(PROMPTS, max_new_tokens=NUM_NEW, keep_cache=True)
    stores = [layer.store for layer in lm.engine.context.layers.values()]
    read = []
    for store in stores:
        store.on_read = lambda reads, sealed, opened: read.append(int((sealed.lens > 0).sum()))
    lm.generate([[1]] * 3, max_new_tokens=NUM_NEW, resume=True, keep_cache=True)
    figures = {
        "kept": sum(int(store.table.count.sum()) for store in stores),
        "sealed": sum(int(store.ledger.num_pages.sum()) for store in stores),
        "read": sum(read),
        "pool": sum(t.nbytes for store in stores for t in store.parts()["pages"]),
    }
    again = lm.generate(PROMPTS, max_new_tokens=NUM_NEW)
    if "flexgen" in str(fields):
        # Pages are read in as many rounds as the device has room for, and the next turn made more.
        again = replace(again, logprobs=first.logprobs)
    assert again == first, "the same prompts gave other tokens"
    lm.engine.context.check_integrity()
    return figures | {"tokens": first.token_ids}


def run_methods(num_ranks: int, calibration: Path) -> dict:
    with process_groups(expert_parallel_size=num_ranks, timeout_seconds=60) as pg:
        return {name: run_method(pg, fields, calibration) for name, fields in METHODS.items()}


@pytest.fixture(scope="module")
def calibration(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("methods") / "calibration.safetensors"
    run_ranks(write_calibration, 1, path)
    return path


@pytest.fixture(scope="module")
def found_alone(calibration) -> list[dict]:
    return run_ranks(run_methods, 1, 1, calibration, timeout=280)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_every_method_acts_through_generate(num_ranks, found_alone, calibration):
    by_rank = found_alone
    if num_ranks > 1:
        by_rank = run_ranks(run_methods, num_ranks, num_ranks, calibration, timeout=280)
    all_pages = sum(found["router all"]["read"] for found in by_rank)
    for name in METHODS:
        every = [found[name] for found in by_rank]
        total = {key: sum(found[key] for found in every) for key in every[0] if key != "tokens"}
        assert all(found["tokens"] == every[0]["tokens"] for found in every), name
        assert all(len(tokens) == NUM_NEW for tokens in every[0]["tokens"]), name
        if name not in BY_RANK:
            assert every[0]["tokens"] == found_alone[0][name]["tokens"], name
        if name in LOSSLESS:
            assert every[0]["tokens"] == by_rank[0]["router all"]["tokens"]
            assert total["kept"] == total["sealed"] > 0 and total["read"] == all_pages
        if name == "selector budget over tiers":
            assert every[0]["tokens"] == by_rank[0]["selector budget"]["tokens"]
        if name == "pooled old pages":
            assert 0 < total["kept"] < 0.9 * total["sealed"]
        if name.startswith(("retention", "budget")) or name == "everything":
            if name not in KEEPS_MOST:
                assert 0 < total["kept"] < 0.4 * total["sealed"], name
        if name in KEEPS_SOME:
            assert 0 < total["kept"] < total["sealed"], name
        lossy = "router", "selector", "keys", "everything"
        if name.startswith(lossy) and name not in LOSSLESS:
            assert 0 < total["read"] < 0.9 * all_pages, name
    pools = {name: sum(found[name]["pool"] for found in by_rank) for name in METHODS}
    assert pools["selector budget over tiers"] < 0.4 * pools["selector budget"]
    assert pools["budget across layers"] <= pools["retention h2o"]
    assert pools["codec.format int8"] < 0.5 * pools["router all"]
    assert pools["codec.format int4"] < pools["codec.format int8"]
    assert pools["codec.transform svd"] <= 0.5 * pools["router all"]

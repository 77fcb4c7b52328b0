"""What routers learn in a run is written, whatever the number of ranks, and the next goes on."""

import stat

import pytest
import torch
from parity_models import VOCAB, build, draw_weights
from ranks import run_ranks

from pikv_megatron import PiKVConfig, PiKVForCausalLM, process_groups
from pikv_megatron.calibrated import load_calibrated

SIZES = dict(shard_after=0, page_size=4, window=6, num_sinks=2, flush_interval=3, token_shards=4)
PROMPTS = [[(7 * i) % VOCAB for i in range(60)], [(3 * i) % VOCAB for i in range(41)], [5, 9]]


def new_model(pg, path) -> PiKVForCausalLM:
    config = PiKVConfig(**SIZES, router={"name": "reinforced", "cost": 0.05}, learned=path)
    model = build(pg, config)
    draw_weights(model, pg.ep.rank())
    return PiKVForCausalLM(model, config, vocab_size=VOCAB)


def run_twice(num_ranks: int, path) -> dict:
    """Two runs, of which the second begins with a smaller batch; what each has learned."""
    with process_groups(expert_parallel_size=num_ranks, timeout_seconds=60) as pg:
        tokens, counts = [], []
        for batches in ([PROMPTS], [PROMPTS[:1], PROMPTS]):
            lm = new_model(pg, path)
            for prompts in batches:
                tokens.append(lm.generate(prompts, max_new_tokens=9).token_ids)
            lm.engine.save_learned(path, "tiny")
            torch.distributed.barrier()
            counts.append(load_calibrated(path).layers[0]["visits.relevance.squares"][3, 3])
        other = new_model(pg, path)
        other.model.decoder.layers[1].self_attention.linear_proj.weight.data *= 2
        with pytest.raises(ValueError, match="learned .* of the model 'tiny', and layer 1 of this"):
            other.generate([[1]], max_new_tokens=1)
        return {"tokens": tokens, "visits": [16 * float(count) for count in counts]}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    path = tmp_path_factory.mktemp("learned") / "alone.safetensors"
    return run_ranks(run_twice, 1, 1, path)[0], load_calibrated(path).layers


def test_a_run_goes_on_from_what_the_last_one_learned(tmp_path, alone):
    path = tmp_path / "pair.safetensors"
    first, second = run_ranks(run_twice, 2, 2, path)
    assert first == second == alone[0]
    once, twice = first["visits"]
    assert once > 0 and 2 * once < twice, "the second run fed one sequence more, and began anew"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for number, layer in load_calibrated(path).layers.items():
        for name, part in layer.items():
            torch.testing.assert_close(part, alone[1][number][name], rtol=1e-4, atol=1e-5)


def test_what_nobody_learns_is_refused(tmp_path, one_rank):
    with pytest.raises(ValueError, match="learned .*: no layer's router keeps what it learns"):
        config = PiKVConfig(**SIZES, router="top_k", learned=tmp_path / "x.safetensors")
        PiKVForCausalLM(build(one_rank, config), config).generate([[1]], max_new_tokens=1)
    with pytest.raises(ValueError, match="learned .*: there is no such folder: make it"):
        new_model(one_rank, tmp_path / "none" / "x").generate([[1]], max_new_tokens=1)

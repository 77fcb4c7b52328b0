"""Lossy methods act on models of other shapes as they do on Mixtral's."""

from pathlib import Path

import pytest
import torch
from parity_models import cached_logits
from ranks import run_ranks
from tiny_models import VOCAB_SIZE, deepseek_v3, glm4_moe, gpt_oss, mixtral

from pikv_megatron import PiKVConfig, PiKVInferenceContext, pikv_layer_spec, process_groups
from pikv_megatron.checkpoint.huggingface import load_huggingface

SMALL = dict(
    shard_after=0, page_size=4, window=6, num_sinks=2, flush_interval=3, prefill_chunk_size=32
)
METHODS = {
    "selection": {"selector": {"name": "budget", "share": 0.25}},
    "retention": {"retention": "h2o", "budget": {"name": "share", "keep": 0.5}},
    "int4": {"codec": {"format": "int4"}},
}
MODELS = {make.__name__: make for make in (mixtral, glm4_moe, gpt_oss, deepseek_v3)}
LENS, NUM_FED = (120, 90), 24
# Random heads look about more or less widely, and so lose more or less.
SAME = 1.5


def logits(directory: Path, pg, fields: dict) -> torch.Tensor:
    """Of this rank's tokens behind the prompts."""
    config = PiKVConfig(**SMALL, **fields)
    model = load_huggingface(
        directory, pg, torch.float32, lambda spec: pikv_layer_spec(spec, config)
    )
    generator = torch.Generator().manual_seed(5)
    fed = [
        torch.randint(3, VOCAB_SIZE, (length + NUM_FED,), generator=generator).tolist()
        for length in LENS
    ]
    context = PiKVInferenceContext.for_model(model, config, 2, 256)
    found = cached_logits(model, context, fed, list(LENS), SMALL["prefill_chunk_size"])
    return torch.cat([found[index][LENS[index] :] for index in found])


def distances(root: Path, num_ranks: int) -> dict[str, dict[str, tuple[float, float]]]:
    """By model and method: squares of what differs from the lossless logits, and their spread."""
    result: dict = {}
    with process_groups(expert_parallel_size=num_ranks, timeout_seconds=60) as pg:
        for name in MODELS:
            lossless = logits(root / name, pg, {})
            spread = float((lossless - lossless.mean(-1, keepdim=True)).square().sum())
            result[name] = {
                method: (float((logits(root / name, pg, fields) - lossless).square().sum()), spread)
                for method, fields in METHODS.items()
            }
    return result


@pytest.mark.parametrize("num_ranks", [2])
def test_a_method_costs_what_it_costs_on_mixtral(tmp_path, num_ranks):
    for name, make in MODELS.items():
        make().save_pretrained(tmp_path / name)
    ranks = run_ranks(distances, num_ranks, tmp_path, num_ranks, timeout=280)

    def distance(name: str, method: str) -> float:
        lost, spread = (sum(part) for part in zip(*(rank[name][method] for rank in ranks)))
        return (lost / spread) ** 0.5

    for method in METHODS:
        mixtrals = distance("mixtral", method)
        assert 0 < mixtrals < 1
        for name in MODELS:
            assert 0 < distance(name, method) <= SAME * mixtrals, (name, method)

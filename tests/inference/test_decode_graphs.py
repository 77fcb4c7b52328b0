"""A recorded decode step does all of its work in memory that it had before, for any step's numbers.

What a CUDA graph would replay is run again here, with the plan of the step that was recorded.
"""

from collections import Counter

import pytest
import torch
from parity_models import VOCAB, build
from torch.utils._python_dispatch import TorchDispatchMode

from pikv_megatron import PiKVConfig
from pikv_megatron.inference.decode_graphs import DecodeGraphs, check_graphs
from pikv_megatron.inference.engine import Engine
from pikv_megatron.inference.request import Request

FIELDS = dict(shard_after=0, page_size=4, window=6, num_sinks=2, flush_interval=5, cuda_graphs=True)
METHODS = [
    {},
    {"sketch": "bounding_box", "selector": {"name": "budget", "share": 0.5, "tail": "mean"}},
    {"sketch": "mean_key", "selector": {"name": "mass", "share": 0.9}},
    {"selector": {"name": "certified", "tolerance": 0.3}, "codec": {"format": "int4"}},
    {"sketch": "bounding_box", "selector": {"name": "sampled", "epsilon": 0.3}},
    {"codec": {"format": "int4"}, "retention": "streaming",
     "budget": {"name": "pages", "pages": 9}},
]
REQUESTS = [Request(list(range(1, 40)), 40), Request([7] * 11, 30), Request([5, 3], 24)]


class Operators(TorchDispatchMode):
    """Counts what reads numbers back from a device, or asks how large a result is to be."""

    READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")

    def __init__(self):
        super().__init__()
        self.reads = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in self.READS:
            self.reads[name] += 1
        return function(*args, **kwargs or {})


def run_again(step):
    """What stands in for recording."""
    def replay():
        with Operators() as operators:
            logits = step()
        assert not operators.reads, operators.reads
        return logits

    return replay


def new_engine(pg, model, pikv: PiKVConfig, replays: bool) -> Engine:
    engine = Engine(model, pikv, pg.ep, VOCAB, 512, 4)
    if replays:
        runner = engine._runner
        runner.graphs = DecodeGraphs(engine.context, runner.feed, run_again)
    return engine


def addresses(engine: Engine) -> list[int]:
    parts = [layer.parts() for layer in engine.context.layers.values()]
    return [t.data_ptr() for by_name in parts for own in by_name.values() for t in own]


def tokens_of(engine: Engine) -> dict[int, list[int]]:
    """Of requests one of which comes late, while the others' sequences go on."""
    tokens: dict[int, list[int]] = {}
    engine.add(REQUESTS[:2])
    for step in range(200):
        if step == 9:
            engine.add(REQUESTS[2:])
        if not engine.running:
            return tokens
        where = addresses(engine)
        graphs = engine._runner.graphs
        before = graphs and graphs.num_replays
        for sequence_id, token in engine.step().token_ids.items():
            tokens.setdefault(sequence_id, []).append(token)
        if graphs and graphs.num_replays > before:
            assert addresses(engine) == where
    raise AssertionError("sequences do not end")


@pytest.mark.parametrize("methods", METHODS, ids=[
    "lossless", "budget", "mass", "certified", "sampled", "packed",
])
def test_replayed_steps_are_those_that_were_not_recorded(one_rank, methods):
    pikv = PiKVConfig(**FIELDS, **methods)
    model = build(one_rank, pikv)
    expected, engine = (new_engine(one_rank, model, pikv, replays) for replays in (False, True))
    assert tokens_of(engine) == tokens_of(expected)
    graphs = engine._runner.graphs
    # Three batch sizes and two widths; a fifth of the steps flush, and some feed prompts.
    assert graphs.num_replays > 20 and len(graphs._steps) <= 8


def test_pools_that_have_grown_are_recorded_anew(one_rank):
    pikv = PiKVConfig(**FIELDS)
    engine = new_engine(one_rank, build(one_rank, pikv), pikv, replays=True)
    for prompt in ([1, 2, 3], list(range(90))):
        engine.add([Request(prompt, 12)])
        while engine.running:
            engine.step()
        steps = dict(engine._runner.graphs._steps)
    assert steps and engine._runner.graphs._num_pages == engine.context.num_pages


@pytest.mark.parametrize("changes, named", [
    ({"lean_experts": False}, ["cuda_graphs", "lean_experts"]),
    ({"router": "top_k", "sketch": "mean_key"}, ["cuda_graphs", "router top_k"]),
    ({"retention": "h2o"}, ["cuda_graphs", "retention h2o"]),
])
def test_what_cannot_be_recorded_is_refused(one_rank, changes, named):
    with pytest.raises(ValueError) as error:
        pikv = PiKVConfig(**FIELDS, **changes)
        build(one_rank, PiKVConfig())
        Engine(build(one_rank, PiKVConfig()), pikv, one_rank.ep, VOCAB, 64, 1)
    assert all(name in str(error.value) for name in named), error.value


def test_other_types_than_bfloat16_are_refused():
    check_graphs(torch.bfloat16)
    with pytest.raises(ValueError, match="cuda_graphs.*float32"):
        check_graphs(torch.float32)

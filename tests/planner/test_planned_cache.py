"""What is planned is what running engines allocate and send, on every rank."""

import pytest
import torch
from parity_models import VOCAB, build
from ranks import run_ranks
from test_packaging import ROOT

from pikv_megatron import PiKVConfig, pikv_layer_spec, process_groups
from pikv_megatron.checkpoint.architecture import Architecture
from pikv_megatron.checkpoint.latent_sizes import LatentSizes
from pikv_megatron.checkpoint.model_builder import build_model
from pikv_megatron.checkpoint.name_table import named_tensors
from pikv_megatron.inference.engine import Engine
from pikv_megatron.inference.request import Request
from pikv_megatron.inference.traffic import TrafficMeter
from pikv_megatron.planner.planned_cache import PlannedCache
from pikv_megatron.planner.target import Target
from pikv_megatron.planner.traffic import decode_traffic
from pikv_megatron.planner.weights import Weights

# Layers and heads are those of the demo model, which some configurations name.
ARCHITECTURE = Architecture(
    num_layers=3, hidden_size=32, num_attention_heads=4, num_query_groups=2, kv_channels=32,
    num_experts=8, moe_ffn_hidden_size=32, vocab_size=VOCAB, max_sequence_length=4096,
)
LATENT = Architecture(
    num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=4, num_experts=8,
    moe_ffn_hidden_size=32, vocab_size=VOCAB, max_sequence_length=4096,
    latent_attention=LatentSizes(
        kv_lora_rank=24, qk_head_dim=16, qk_pos_emb_head_dim=8, v_head_dim=12
    ),
)
LATENT_CACHES = "pikv/lossless", "pikv/h2o", "codecs/int4", "allgather"
CONTEXT, NEW, BATCH = 500, 20, 3
NEAR = 96  # first tokens that stay at home: short contexts shall be spread, too
FOLDERS = [
    f"configs/{name}" for name in ("pikv", "routing", "selection", "retention", "codecs")
]
# What is decoded, too; and by how much steps may send more or less than is planned.
DECODED = {
    "pikv/lossless": 0.0, "pikv/h2o": 0.0, "retention/adakv": 0.0, "codecs/int4": 0.0,
    "routing/round_robin": 0.0, "retention/flexgen": 0.0,
    "pikv/low_rank_mass": 0.03,  # the columns of its header grow while steps are counted
    "selection/keys": 0.03,
    "allgather": 0.0,
}
# Decoded, too: of these the plan only says what they send at most.
ROUTED = "routing/top_k", "routing/hierarchical"


def configs() -> dict[str, PiKVConfig]:
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.yaml")]
    read = {f"{p.parent.name}/{p.stem}": PiKVConfig.from_file(p) for p in sorted(paths)}
    # A calibration is of one model, and weights are drawn here.
    found = {
        name: pikv for name, pikv in read.items()
        if pikv.calibration is None and pikv.retention.extra is None
    }
    found["allgather"] = found["pikv/h2o"].model_copy(update={"dispatcher": "allgather"})
    return {
        name: pikv.model_copy(update={"shard_after": min(NEAR, pikv.shard_after)})
        for name, pikv in found.items()
    }


class Run:
    """Sequences of one engine.

    Attributes:
        most: bytes of this rank's cache, the most of them while any sequence ran.
        lower: bytes of its pages in host memory and in files.
        sent: by operation, in a decode step.
    """

    def __init__(self, model, pg, pikv: PiKVConfig, is_decoded: bool):
        slots = -(-BATCH // pg.ep.size())
        self._engine = Engine(model, pikv, pg.ep, VOCAB, ARCHITECTURE.max_sequence_length, slots)
        prompts = [
            [(7 * i + number) % VOCAB for i in range(CONTEXT - NEW)] for number in range(BATCH)
        ]
        self._engine.add([Request(prompt, NEW) for prompt in prompts])
        self.most = self._engine.context.allocated_bytes()
        self.lower = self._engine.context.tiers.num_bytes
        self.sent: dict[str, float] = {}
        if is_decoded:
            self._decode(pikv.flush_interval)

    def _decode(self, num_metered: int) -> None:
        while not all(s.is_decoding for s in self._engine.running.values()):
            self._step()
        meter = TrafficMeter()
        meter.start()
        for _ in range(num_metered):
            self._step()
        meter.stop()
        while self._engine.running:
            self._step()
        counted = meter.bytes_by_op().items()
        self.sent = {op.removeprefix("pikv_"): count / num_metered for op, count in counted}

    def _step(self) -> None:
        self._engine.step()
        if self._engine.running:
            self.most = max(self.most, self._engine.context.allocated_bytes())


def run_all(pg) -> dict:
    return run(build(pg, PiKVConfig(), num_layers=3, kv_channels=32), pg, configs())


def run_latent(pg) -> dict:
    model = build_model(LATENT, pg, spec_transform=lambda spec: pikv_layer_spec(spec, PiKVConfig()))
    return run(model, pg, latent_configs())


def latent_configs() -> dict[str, PiKVConfig]:
    return {name: pikv for name, pikv in configs().items() if name in LATENT_CACHES}


def run(model, pg, caches: dict[str, PiKVConfig]) -> dict:
    runs = {
        name: Run(model, pg, pikv, name in (*DECODED, *ROUTED)) for name, pikv in caches.items()
    }
    return {
        "weights": sum(t.nbytes for t in named_tensors(model).values()),
        "most": {name: run.most for name, run in runs.items()},
        "lower": {name: run.lower for name, run in runs.items()},
        "sent": {name: run.sent for name, run in runs.items()},
    }


def run_on_ranks(num_ranks: int) -> tuple[dict, dict]:
    with process_groups(expert_parallel_size=num_ranks, timeout_seconds=60) as pg:
        return run_all(pg), run_latent(pg)


def check(
    by_rank: list[dict], architecture: Architecture, caches: dict[str, PiKVConfig]
) -> None:
    num_ranks = len(by_rank)
    weights = Weights.of(architecture, torch.float32)
    assert {found["weights"] for found in by_rank} == {weights.of_rank(num_ranks)}
    for name, pikv in caches.items():
        target = Target(architecture, pikv, num_ranks, BATCH, CONTEXT, NEW, torch.float32)
        cache = PlannedCache(target)
        most = [found["most"][name] for found in by_rank]
        planned = sum(cache.bytes_by_part().values())
        if name not in (*DECODED, *ROUTED):
            planned -= cache.waiting_bytes()
        if pikv.expert_shards > 1:
            # Experts are planned to be chosen evenly; where they are not, pools grow.
            assert max(most) >= planned, name
            continue
        assert most[0] == max(most) == planned, name
        assert by_rank[0]["lower"][name] == cache.lower_bytes(), name
        if name in DECODED:
            check_traffic(name, by_rank[0]["sent"][name], decode_traffic(target, cache)._asdict())


def check_traffic(name: str, sent: dict[str, float], planned: dict[str, float]) -> None:
    # Sequences that were prefilled later have less to flush at first.
    assert sent.pop("flush") == pytest.approx(planned.pop("flush"), rel=0.15), name
    assert sent == pytest.approx(planned, rel=DECODED[name]), name


def check_packing(by_rank: list[dict]) -> None:
    """Tokens travel in the bits that their pages allow: 112 bytes of numbers instead of 512."""
    names = "codecs/int4", "pikv/lossless"
    flushed = [sum(x["sent"][name]["flush"] for x in by_rank) for name in names]
    assert flushed[0] < 0.4 * flushed[1]


def check_skipping(by_rank: list[dict]) -> None:
    """Queries travel to the ranks of the shards that they visit, and to no others."""
    sent = {
        name: sum(found["sent"][name][op] for found in by_rank for op in ("query", "combine"))
        for name in ("pikv/lossless", *ROUTED)
    }
    # Two of the shards are on one rank where they are of one group, and else on two at most.
    most = {"routing/hierarchical": 1, "routing/top_k": 2}
    whole = sent["pikv/lossless"]
    for name, num_visited in most.items():
        assert sent[name] < 1.25 * num_visited / len(by_rank) * whole, name
    if len(by_rank) == 4:
        assert sent["routing/hierarchical"] < 0.4 * whole


def test_one_rank_takes_what_is_planned(one_rank):
    check([run_all(one_rank)], ARCHITECTURE, configs())
    check([run_latent(one_rank)], LATENT, latent_configs())


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_take_and_send_what_is_planned(num_ranks):
    grouped, latent = zip(*run_ranks(run_on_ranks, num_ranks, num_ranks, timeout=280))
    check_packing(grouped)
    check(grouped, ARCHITECTURE, configs())
    check_skipping(grouped)
    check(latent, LATENT, latent_configs())

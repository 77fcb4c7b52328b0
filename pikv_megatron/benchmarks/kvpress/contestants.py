"""What is compared, each brought to a budget of bytes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import kvpress
from pydantic import ValidationError

from pikv_megatron.benchmarks.kvpress.options import CompareOptions
from pikv_megatron.bridges.kvpress import PiKVPress
from pikv_megatron.config import PiKVConfig
from pikv_megatron.planner.planned_cache import PlannedCache
from pikv_megatron.planner.target import Target

# Presses drop a share of the tokens, and hold the others as computed.
PRESSES = ("SnapKVPress", "ExpectedAttentionPress", "KVzipPress", "StreamingLLMPress")
SIZES: dict[str, Any] = {
    "page_size": 16, "window": 32, "num_sinks": 4, "flush_interval": 8, "shard_after": 0,
}
CODECS: dict[str, dict[str, Any]] = {
    "": {},
    " int8": {"format": "int8"},
    " int4": {"format": "int4"},
    " K4 V2": {"format": {"keys": "int4", "values": "int2"}},
    " K3 V2 rotated": {"format": {"keys": "int3", "values": "int2"}, "rotation": "hadamard"},
    " int2 rotated": {"format": "int2", "rotation": "hadamard"},
}
POLICIES = ("snapkv", "h2o", "streaming")
CHUNK = 64
STEPS = 64  # of the share that stays


@dataclass(frozen=True)
class Entry:
    """One contestant at one budget.

    Attributes:
        name: of the contestant.
        budget: share of the bytes as computed.
        press: for a prompt.
        keep: share of the tokens, or of the pages, that stay.
    """

    name: str
    budget: float
    press: Any
    keep: float


def entries(options: CompareOptions) -> Iterator[Entry]:
    """Those of kvpress, then ours: each policy with each number of bits, as much as fits."""
    for budget in options.budgets:
        for name in PRESSES:
            press = getattr(kvpress, name)(compression_ratio=1 - budget)
            yield Entry(f"kvpress {name.removesuffix('Press')}", budget, press, budget)
        for policy in POLICIES:
            for bits, codec in CODECS.items():
                found = _largest(options, policy, codec, budget)
                if found is not None:
                    yield Entry(f"pikv {policy}{bits}", budget, PiKVPress(found[0]), found[1])


def _largest(
    options: CompareOptions, policy: str, codec: dict[str, Any], budget: float
) -> tuple[PiKVConfig, float] | None:
    """The configuration that keeps most within a budget, every byte counted; None: none fits."""
    for step in range(STEPS, 0, -1):
        keep = step / STEPS
        pikv = _config(options, policy, codec, keep)
        if pikv is not None and _share(options, pikv) <= budget:
            return pikv, keep
    return None


def _config(
    options: CompareOptions, policy: str, codec: dict[str, Any], keep: float
) -> PiKVConfig | None:
    """In chunks, so that what is dropped was hardly held."""
    try:
        return PiKVConfig(
            **SIZES, retention=policy, budget={"name": "share", "keep": keep},
            codec=codec, prefill_chunk_size=CHUNK,
            max_sequence_length=options.length,
        )
    except ValidationError:
        return None


def _share(options: CompareOptions, pikv: PiKVConfig) -> float:
    length = options.shortest_prompt
    target = Target(options.architecture, pikv, 1, 1, length, 1, options.dtype)
    dense = length * sum(spec.kv.token_bytes for spec in target.specs)
    return sum(PlannedCache(target).bytes_by_part().values()) / dense

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
MERGED = (2, 3, 4, 6, 8, 12, 16)  # pages that become one
CHUNK = 64
STEPS = 64  # of the share that stays


@dataclass(frozen=True)
class Entry:
    """One contestant at one budget.

    Attributes:
        name: of the contestant.
        budget: share of the bytes as computed.
        press: for a prompt.
        keep: share of the tokens, or of the pages, that stay; None: layers differ.
    """

    name: str
    budget: float
    press: Any
    keep: float | None


def entries(options: CompareOptions) -> Iterator[Entry]:
    """At each budget those of kvpress, then ours: each policy with each number of bits, as much as
    fits. Then the user's own caches."""
    for budget in options.budgets:
        for name in options.presses:
            press = getattr(kvpress, f"{name}Press")(compression_ratio=1 - budget)
            yield Entry(f"kvpress {name}", budget, press, budget)
        for policy, shares in _policies(options).items():
            for bits, codec in CODECS.items():
                found = _largest(options, shares, codec, budget)
                if found is not None:
                    yield Entry(f"pikv {policy}{bits}", budget, PiKVPress(found[0]), found[1])
    for name, pikv in options.caches.items():
        yield Entry(f"pikv {name}", _share(options, pikv), PiKVPress(pikv), None)


def _policies(options: CompareOptions) -> dict[str, list[tuple[float, dict[str, Any]]]]:
    """By name: shares of the tokens that stay, falling, and how a policy is told to keep them."""
    steps = [step / STEPS for step in range(STEPS, 0, -1)]
    found = {
        policy: [(keep, {"retention": policy, "budget": {"name": "share", "keep": keep}})
                 for keep in steps]
        for policy in options.policies
    }
    if options.calibration is not None:
        found["token_eviction"] = [
            (1 / pages, {"retention": {"name": "token_eviction", "pages": pages},
                         "calibration": options.calibration})
            for pages in MERGED
        ]
    return found


def _largest(
    options: CompareOptions, shares: list[tuple[float, dict[str, Any]]], codec: dict[str, Any],
    budget: float,
) -> tuple[PiKVConfig, float] | None:
    """The configuration that keeps most within a budget, every byte counted; None: none fits."""
    for keep, policy in shares:
        pikv = _config(options, policy | {"codec": codec})
        if pikv is not None and _share(options, pikv) <= budget:
            return pikv, keep
    return None


def _config(options: CompareOptions, methods: dict[str, Any]) -> PiKVConfig | None:
    """In chunks, so that what is dropped was hardly held."""
    try:
        return PiKVConfig(
            **SIZES, **methods, prefill_chunk_size=CHUNK, max_sequence_length=options.length
        )
    except ValidationError:
        return None


def _share(options: CompareOptions, pikv: PiKVConfig) -> float:
    length = options.shortest_prompt
    target = Target(options.architecture, pikv, 1, 1, length, 1, options.dtype)
    dense = length * sum(spec.kv.token_bytes for spec in target.specs)
    return sum(PlannedCache(target).bytes_by_part().values()) / dense

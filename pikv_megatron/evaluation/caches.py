"""The caches that a command line names, each at the shares of what its method spends."""

import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from pikv_megatron.cache.placement import Placement
from pikv_megatron.checkpoint.architecture import Architecture
from pikv_megatron.config import PiKVConfig
from pikv_megatron.evaluation.evaluator import LOSSLESS, lossless


def read_caches(
    names: Sequence[str], shares: Sequence[float], length: int, architecture: Architecture
) -> dict[str, PiKVConfig]:
    """The caches of a command line by name, a lossless one first.

    Args:
        names: files, or names of presets.
        shares: that each is put at, if it spends any.
        length: tokens of a sequence.
        architecture: of the model.

    Raises:
        ValueError: one cannot be read, put at a share, or used with the model; names it.
    """
    if max(shares, default=0) > 1:
        raise ValueError(f"--shares {max(shares):g}: there is no more than 1")
    caches: dict[str, PiKVConfig] = {}
    for text in names:
        for name, pikv in _at_shares(text, read_cache(text), shares).items():
            if name in caches:
                raise ValueError(f"--pikv {text}: another one is called {name}, too; rename one")
            _check_cache(text, name, pikv, length, architecture)
            caches[name] = pikv
    # The reference is laid out as the first of the others, unless one of that name is given.
    return {LOSSLESS: lossless(next(iter(caches.values()))), **caches}


def read_cache(text: str) -> PiKVConfig:
    """A name without a suffix is a preset's, unless there is such a file."""
    if Path(text).exists() or Path(text).suffix:
        return PiKVConfig.from_file(text)
    return PiKVConfig(preset=text)


def num_ranks() -> int:
    """Processes that were launched."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _at_shares(text: str, pikv: PiKVConfig, shares: Sequence[float]) -> dict[str, PiKVConfig]:
    """A cache at each share, by name; alone where it spends none, or no share is asked for."""
    name, found = Path(text).stem, {}
    num_shards = Placement.resolve(pikv, num_ranks()).num_shards
    for share in shares:
        try:
            put = pikv.at_share(share, num_shards)
        except ValueError as error:
            raise ValueError(f"--shares {share:g}: {text}: {error}") from error
        if put is not None:
            found[f"{name} {Fraction(share).limit_denominator(1000)}"] = put
    return found or {name: pikv}


def _check_cache(
    text: str, name: str, pikv: PiKVConfig, length: int, architecture: Architecture
) -> None:
    if name == LOSSLESS and pikv != lossless(pikv):
        raise ValueError(f"--pikv {text}: it is not lossless; rename it")
    if length > (pikv.max_sequence_length or length):
        raise ValueError(
            f"--pikv {text}: max_sequence_length {pikv.max_sequence_length} is less than "
            f"--length {length}"
        )
    if pikv.replicas > architecture.moe_router_topk:
        raise ValueError(
            f"--pikv {text}: replicas {pikv.replicas} must not exceed the "
            f"{architecture.moe_router_topk} experts that the model chooses for a token"
        )

"""Sequences, their part in a step, and where a stream window holds their tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


@dataclass
class CachedSequence:
    """One live sequence. Every rank of the expert-parallel group keeps all of them.

    Attributes:
        slot: its slot in the group, home rank * slots a rank + slot on the home rank.
        length: tokens in the cache.
        flushed: tokens [num_sinks, flushed) lie in shards.
    """

    slot: int
    flushed: int
    length: int = 0


@dataclass
class StepRow:
    """A sequence's part in a step: `count` new tokens after `past` cached ones.

    A row of one token is decoding; one of several is a prompt or a piece of one.
    """

    sequence: CachedSequence
    count: int
    past: int = field(init=False)

    def __post_init__(self):
        self.past = self.sequence.length

    @property
    def end(self) -> int:
        """Tokens in the cache after the step."""
        return self.past + self.count

    @property
    def is_decode(self) -> bool:
        return self.count == 1


RowsByRank = Sequence[Sequence[StepRow]]


@dataclass(frozen=True)
class WindowLayout:
    """Places of a stream window: sinks first, then a ring of `window` + `flush_interval`."""

    num_sinks: int
    window: int
    flush_interval: int

    @property
    def ring(self) -> int:
        return self.window + self.flush_interval

    @property
    def size(self) -> int:
        return self.num_sinks + self.ring

    def place(self, position: torch.Tensor) -> torch.Tensor:
        """Where a window holds each position."""
        ring = self.num_sinks + (position - self.num_sinks) % self.ring
        return torch.where(position < self.num_sinks, position, ring)

    def live(self, flushed: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        """[n, size], bool: places that hold tokens of [0, num_sinks) or [flushed, length), for
        flushed [n] and length [n]."""
        device = flushed.device
        sink_live = torch.arange(self.num_sinks, device=device) < length.unsqueeze(1)
        step = torch.arange(self.ring, device=device) + self.num_sinks - flushed.unsqueeze(1)
        is_live = step % self.ring < (length - flushed).unsqueeze(1)
        return torch.cat([sink_live, is_live], dim=1)

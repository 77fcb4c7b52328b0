"""Sequences, their part in a step, and where a stream window holds their tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np


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


class RowFields(NamedTuple):
    """Some rows of a step as arrays [r], int64, on the host.

    Attributes:
        slot: of its sequence, in the group.
        flushed: tokens [num_sinks, flushed) lie in shards before the step.
        past: tokens that are cached before.
        end: tokens that are cached after.
    """

    slot: np.ndarray
    flushed: np.ndarray
    past: np.ndarray
    end: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[StepRow]) -> "RowFields":
        fields = [(row.sequence.slot, row.sequence.flushed, row.past, row.end) for row in rows]
        return cls(*np.array(fields, dtype=np.int64).reshape(-1, 4).T)

    def first(self, count: int) -> "RowFields":
        return RowFields(*(x[:count] for x in self))

    def behind(self, count: int) -> "RowFields":
        return RowFields(*(x[count:] for x in self))

    @property
    def is_decode(self) -> np.ndarray:
        return self.end - self.past == 1

    @property
    def first_token(self) -> np.ndarray:
        """Of each row, among the tokens of all."""
        return self.end.cumsum() - self.past.cumsum() - (self.end - self.past)


class Spans(NamedTuple):
    """Runs of numbers, one behind the other: arrays [x], int64.

    Attributes:
        run: which run a number belongs to.
        number: itself.
    """

    run: np.ndarray
    number: np.ndarray

    @classmethod
    def of(cls, first: np.ndarray, last: np.ndarray) -> "Spans":
        """The runs [first, last); one whose last is not larger is empty.

        Example:
            First 3, 7, 0 and last 5, 7, 1: runs 0, 0, 2 and numbers 3, 4, 0.
        """
        counts = np.maximum(last - first, 0)
        run = np.repeat(np.arange(len(counts)), counts)
        shift = first - (counts.cumsum() - counts)
        return cls(run, np.arange(len(run)) + shift[run])


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

    def place(self, position: np.ndarray) -> np.ndarray:
        """Where a window holds each position."""
        sinks = self.num_sinks
        return np.where(position < sinks, position, sinks + (position - sinks) % self.ring)

    def live(self, flushed: np.ndarray, length: np.ndarray) -> np.ndarray:
        """[n, size], bool: places that hold tokens of [0, num_sinks) or [flushed, length), for
        flushed [n] and length [n]."""
        places = np.arange(self.size)
        flushed, length = flushed[:, None], length[:, None]
        is_in_ring = (places - flushed) % self.ring < length - flushed
        return np.where(places < self.num_sinks, places < length, is_in_ring)

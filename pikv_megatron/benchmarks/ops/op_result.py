"""Checks a case, then times it."""

from dataclasses import dataclass

from pikv_megatron.benchmarks.ops.op_case import OpCase
from pikv_megatron.benchmarks.ops.op_timer import OpTimer

OWN = "PiKV"


class WrongResult(Exception):
    """An operation failed its check, so that its times would mean nothing."""


@dataclass(frozen=True)
class OpResult:
    """A row of the table.

    Attributes:
        op: the operation's name.
        payload: how its numbers are stored.
        case: its sizes.
        error: as a multiple of what is allowed.
        ms: median milliseconds of a call.
        num_bytes: that it must read and write.
        copy_share: its bytes per second over those of a copy in the same run.
        peer_ms: median milliseconds of each peer, over the whole cache.
    """

    op: str
    payload: str
    case: str
    error: float
    ms: float
    num_bytes: int
    copy_share: float
    peer_ms: dict[str, float]

    @property
    def gigabytes_per_second(self) -> float:
        """10^9 bytes."""
        return self.num_bytes / self.ms / 1e6

    @property
    def fastest_peer(self) -> str | None:
        """None: it has no peers."""
        return min(self.peer_ms, key=self.peer_ms.__getitem__, default=None)

    @property
    def peer_ratio(self) -> float | None:
        """The fastest peer's time over the operation's; large is good."""
        return None if self.fastest_peer is None else self.peer_ms[self.fastest_peer] / self.ms


def measure_case(case: OpCase, timer: OpTimer, copy_bandwidth: float) -> OpResult:
    """The figures of a case.

    Args:
        copy_bandwidth: bytes per second.

    Raises:
        WrongResult: it is wrong.
    """
    error = case.error(case.run())
    if not error <= 1.0:
        raise WrongResult(
            f"{case.op} ({case.payload}; {case.case}) is off by {error:.3g} times what its types "
            "allow"
        )
    times = timer.milliseconds({OWN: case.run, **case.peers}, case.calls)
    ms = times.pop(OWN)
    share = 1e3 * case.num_bytes / ms / copy_bandwidth
    return OpResult(case.op, case.payload, case.case, error, ms, case.num_bytes, share, times)

"""What an operation is timed on, and the check that it must pass first."""

from dataclasses import dataclass, field
from itertools import cycle
from typing import Any, Callable, Mapping, Sequence

import torch

# Of the root mean square; an operation sums in float32 and rounds its result, and in bfloat16 the
# weights of its values too.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}


@dataclass(frozen=True)
class OpCase:
    """One row of the table.

    Attributes:
        op: the operation's name.
        payload: how its numbers are stored.
        case: its sizes, for people.
        run: the operation on its inputs.
        error: given what the first `run` returned, how far it is from a float64 computation on
            the same inputs, as a multiple of what the types allow: more than 1 is wrong.
        num_bytes: that it must read and write.
        peers: others that attend to the same cache, all of it.
        calls: of a contestant before it is the next one's turn: `run` and the peers take as many
            caches in turn.
    """

    op: str
    payload: str
    case: str
    run: Callable[[], Any]
    error: Callable[[Any], float]
    num_bytes: int
    peers: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    calls: int = 1


@dataclass(frozen=True)
class Grid:
    """The sizes that are measured.

    Attributes:
        tokens: cached tokens, one after the other.
        page_sizes: S.
        dtypes: of queries and plain pages; queries over scaled pages have the first one.
        device: where.
        seed: of all inputs.
    """

    tokens: tuple[int, ...]
    page_sizes: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    device: torch.device
    seed: int

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32, key: int = 0) -> torch.Tensor:
        """Normal numbers; the same for the same arguments."""
        rng = torch.Generator(self.device).manual_seed(self.seed + key)
        return torch.randn(shape, generator=rng, device=self.device).to(dtype)

    def integers(self, high: int, *shape: int, key: int = 0) -> torch.Tensor:
        """int64 from 0 to high - 1."""
        rng = torch.Generator(self.device).manual_seed(self.seed + key)
        return torch.randint(high, shape, generator=rng, device=self.device)


def in_turn(runs: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """A function that calls the next one of them each time, over and over."""
    order = cycle(runs)
    return lambda: next(order)()


def relative_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference over that of `expected`; infinite where it is NaN."""
    difference = (actual.double() - expected.double()).square().mean().sqrt()
    ratio = float(difference / expected.double().square().mean().sqrt())
    return ratio if ratio >= 0 else float("inf")


def rms_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """`relative_rms` as a multiple of what the type of `actual` allows."""
    return relative_rms(actual, expected) / TOLERANCES[actual.dtype]


def storage_bytes(*tensors: torch.Tensor | None) -> int:
    """Of all numbers."""
    return sum(t.numel() * t.dtype.itemsize for t in tensors if t is not None)


def name_of(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")

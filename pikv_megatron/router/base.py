"""Which shards a query visits.

What a router learns while it runs belongs to one sequence and lies on its home rank: no rank has to
be told, and what a sequence reads does not depend on its batch, nor, where its shards are the same,
on the number of ranks. What serves other sequences, too, does so from the next run on.

Legend: n sequences, N shards.
"""

from abc import ABC, abstractmethod
from fractions import Fraction
from typing import ClassVar, Mapping

import torch
from pydantic import Field

from pikv_megatron.options import Options
from pikv_megatron.relevance import Ask
from pikv_megatron.router.linear_gate import LinearGate
from pikv_megatron.router.visits import VisitSums


class KVRouter(ABC):
    """Chooses the shards that a step's queries visit (Megatron's MoE router chooses experts).

    Attributes:
        learns: it is to be told what the shards that were visited had of the attention.
        visits: what it knows of visits to any shard, which outlives the run; None: nothing.
    """

    learns = False
    visits: VisitSums | None = None

    @abstractmethod
    def visit(self, ask: Ask) -> torch.Tensor:
        """[n, N], bool: the shards that each sequence visits, at least one."""

    def learn(self, slots: torch.Tensor, shards: torch.Tensor, mass: torch.Tensor) -> None:
        """Take note of a step.

        Args:
            slots: [n], int64, slots of the sequences on this rank.
            shards: [n, N], bool, the shards that their queries visited.
            mass: [n, N], float32, share of the attention that each gave, mean over heads.
        """

    def release(self, slot: int) -> None:
        """The sequence of a slot of this rank ended."""

    def tensors(self) -> list[torch.Tensor]:
        """What is kept of sequences."""
        return []


class RouterOptions(Options):
    """Parameters of a router.

    Attributes:
        expert_source: who says by experts what shards are worth, `moe`, `previous` or `gate` of
            `GateOptions.source`; None: no one.
        keeps_learned: the router has `KVRouter.visits`.
        needs_newest: the router asks which shard holds the newest page.
    """

    expert_source: ClassVar[str | None] = None
    keeps_learned: ClassVar[bool] = False
    needs_newest: ClassVar[bool] = False

    @abstractmethod
    def build(self, num_slots: int, num_shards: int, device: torch.device) -> KVRouter | None:
        """The router of a layer, whose home rank has `num_slots` sequences; None visits every
        shard."""

    def gate(self, fitted: Mapping[str, torch.Tensor] | None) -> LinearGate | None:
        """What says by experts what shards are worth, where it is calibrated.

        Args:
            fitted: what was calibrated of the layer, by name; None: nothing was.

        Raises:
            ValueError: it is missing there.
        """
        return None


class VisitingOptions(RouterOptions):
    """Parameters of a router that visits some of the shards."""

    k: int = Field(2, ge=1, description="shards to visit")

    def at_share(self, share, num_shards):
        part = Fraction(share).limit_denominator(1000)
        k = part * num_shards
        if k.denominator > 1:
            raise ValueError(
                f"router {self.name} visits whole shards, and {share:g} of {num_shards} is {k}: "
                f"set token_shards, or expert_shards, to a multiple of {part.denominator}, or "
                "leave that share out"
            )
        return self.model_copy(update={"k": int(k)})

"""How queries and tokens travel between the ranks of the expert-parallel group.

Legend: n sequences of this home rank, sq query tokens, np query heads, hn head width.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from pikv_megatron.cache.placement import Placement
from pikv_megatron.cache.shard_store import OwnerReads, ShardStore
from pikv_megatron.cache.step_plan import StepPlan
from pikv_megatron.cache.tokens import TokenBlock
from pikv_megatron.ops.merge_states import merge_states
from pikv_megatron.types import AttentionState, PageList, Reads

QUERY_OP, COMBINE_OP, FLUSH_OP = "pikv_query", "pikv_combine", "pikv_flush"


@dataclass
class PendingQuery:
    """Queries under way to the owners.

    Attributes:
        query: what this rank is to attend to for others, [rows, sq, np, hn], once it arrived.
        reads: what those rows read here.
        work: the collective to wait for, or None.
        route: what the dispatcher needs to send the results home.
    """

    query: torch.Tensor
    reads: OwnerReads
    work: Any = None
    route: Any = None


class KVDispatcher(ABC):
    """Brings queries to the owners of shards, their results home, and tokens to their shards."""

    def __init__(self, placement: Placement):
        self.placement = placement

    @abstractmethod
    def dispatch(self, query: torch.Tensor, plan: StepPlan, reads: Reads) -> PendingQuery:
        """Start sending query [n, sq, np, hn], and what it reads, to the owners it visits."""

    @abstractmethod
    def combine(
        self, pending: PendingQuery, store: ShardStore, query: torch.Tensor, near: PageList,
        softmax_scale: float,
    ) -> AttentionState:
        """Attend for others, send the results home, and merge what came back for this rank.

        Args:
            query: [n, sq, np, hn], as given to `dispatch`.
            near: what this rank attends to for its own rows, while queries travel.
        """

    @abstractmethod
    def send(self, block: TokenBlock, plan: StepPlan, copies: int) -> TokenBlock:
        """Exchange the tokens that leave the windows; returns those for this rank's shards.

        Args:
            copies: rows of the block for each token of `plan.flush`.
        """


class LocalDispatcher(KVDispatcher):
    """One rank owns everything: the oracle of the others."""

    def dispatch(self, query, plan, reads):
        selected = None if reads.pages is None else reads.pages[:, 0]
        own = plan.own_reads._replace(visited=shard_bits(reads.shards), selected=selected)
        return PendingQuery(query, own)

    def combine(self, pending, store, query, near, softmax_scale):
        return store.attend(query, pending.reads, softmax_scale, [near])

    def send(self, block, plan, copies):
        return block


def merge_parts(packed: torch.Tensor, near: AttentionState) -> AttentionState:
    """Merge packed parts [parts, n, sq, np, hn + 1] with what was attended to at home."""
    out, lse = packed[..., :-1], packed[..., -1]
    merged = merge_states(
        torch.cat([out, near.out.float().unsqueeze(0)]), torch.cat([lse, near.lse.unsqueeze(0)])
    )
    return AttentionState(merged.out.to(near.out.dtype), merged.lse)


def shard_bits(visited: torch.Tensor | None) -> torch.Tensor | None:
    """[n, num_shards] bool -> [n] int64, bit s set for shard s."""
    if visited is None:
        return None
    bit = 1 << torch.arange(visited.shape[1], device=visited.device)
    return (visited * bit).sum(dim=1)


def pack_states(state: AttentionState) -> torch.Tensor:
    """[..., hn] and [...] -> [..., hn + 1], float32, so that one collective carries both."""
    return torch.cat([state.out.float(), state.lse.unsqueeze(-1)], dim=-1)

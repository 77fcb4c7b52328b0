"""What a decode step reads: decided at home, by what home knows.

Legend: n sequences, G ranks, m columns of a rank, M = G * m, k columns chosen.
"""

from typing import NamedTuple

import torch

from pikv_megatron.relevance import Ask
from pikv_megatron.router.base import KVRouter
from pikv_megatron.selector.base import PageSelector, ranked
from pikv_megatron.types import Reads


class StepChoice(NamedTuple):
    """What is read, and what it was chosen from.

    Attributes:
        reads: by owner.
        columns: [n, k], int64, the chosen pages out of M; None: every page of visited shards.
        ask: what router and selector were asked with; None if there was nothing to decide.
    """

    reads: Reads
    columns: torch.Tensor | None = None
    ask: Ask | None = None


def choose(
    router: KVRouter | None, selector: PageSelector | None, ask: Ask, num_ahead: int = 0
) -> StepChoice:
    """Let the router choose shards and the selector pages of them; `num_ahead` of the best that
    were left, where there is a selector, are likely to be chosen next."""
    shards = None if router is None else router.visit(ask)
    if selector is None:
        return StepChoice(Reads(shards), None, ask)
    may_read = ask.is_page
    if shards is not None:
        may_read = may_read & shards.gather(1, ask.directory.shard.flatten(1))
    columns = selector.select(ask, may_read, may_read.shape[1])
    places = ask.directory.table.shape[1:]
    reads = Reads(shards, by_rank(columns, *places))
    if selector.samples:
        sample = selector.draw(ask, columns)
        drawn = by_rank(sample.columns, *places)
        reads = reads._replace(drawn=drawn, log_weight=sample.log_weight)
    if num_ahead:
        left, is_left = ranked(ask.page_scores, ask.is_left(columns) & may_read, num_ahead)
        reads = reads._replace(ahead=by_rank(torch.where(is_left, left, -1), *places))
    return StepChoice(reads, columns, ask)


def by_rank(columns: torch.Tensor, num_ranks: int, num_columns: int) -> torch.Tensor:
    """Columns [n, k] out of all ranks' -> [n, G, min(k, m)] out of each rank's, -1 behind them;
    those of a single rank as they are.

    Example:
        Two ranks of 4 columns, columns 5, 2, 1, -1: the first rank reads 2, 1, the second 1.
    """
    if num_ranks == 1:
        return columns.unsqueeze(1)
    rank = torch.where(columns < 0, num_ranks, columns // max(1, num_columns))
    is_own = rank.unsqueeze(2) == torch.arange(num_ranks + 1, device=columns.device)
    place = (is_own.long().cumsum(dim=1) * is_own).sum(dim=2) - 1
    most = min(columns.shape[1], num_columns)
    listed = columns.new_full((len(columns), num_ranks + 1, most + 1), -1)
    # Places of what is not read go to a rank and a column that are cut off.
    place = torch.where(columns < 0, most, place)
    listed.flatten(1).scatter_(1, rank * (most + 1) + place, columns % max(1, num_columns))
    return listed[:, :num_ranks, :most]

"""Layers of one rank that decide together which pages stay, once the last of them has its own.

What a page is worth has to mean the same in each. A share of the attention does: in every layer,
all that a query attends to has 1.

Legend: l layers, r sequences, m columns of a sequence, s shards of this rank, or 1 where they
compete.
"""

from collections.abc import Sequence

import torch

from pikv_megatron.cache.owner.page_keeper import PageKeeper
from pikv_megatron.retention.base import beyond
from pikv_megatron.types import PageStats


def prune_alike(
    keepers: Sequence[PageKeeper], slots: torch.Tensor, most_pages: int
) -> list[torch.Tensor]:
    """Drop from layers that hold the same pages those that are worth least to all of them.

    Args:
        keepers: of the layers.
        slots: [r], int64, each once.
        most_pages: at least the pages that any of them ever filled here.

    Returns:
        [r, m], bool, of each layer: the columns that were dropped, here the same ones.
    """
    rivals = [keeper.rivals(slots, most_pages) for keeper in keepers]
    worth = sum(keeper.retention.utility(stats) for keeper, (stats, _) in zip(keepers, rivals))
    stats, limit = rivals[0]
    drop = beyond(stats, worth, limit)
    for keeper in keepers:
        keeper.drop(slots, drop)
    return [drop] * len(keepers)


def prune_across(
    keepers: Sequence[PageKeeper], slots: torch.Tensor, most_pages: int
) -> list[torch.Tensor]:
    """Drop pages of all layers, so that as many stay as their budgets allow together, those that
    are worth most. No layer keeps more than `Budget.across_layers` times its own limit.

    For arguments and what is returned see `prune_alike`.

    Example:
        Two layers whose pages are worth 9, 5, 4 and 3, 2, 1, with a limit of 1 each: the first
        keeps 9 and 5 and the second none, where layers may keep twice their limits.
    """
    rivals = [keeper.rivals(slots, most_pages) for keeper in keepers]
    drops = [
        keeper.retention.drop(stats, _at_most(limit, keeper.budget.across_layers))
        for keeper, (stats, limit) in zip(keepers, rivals)
    ]
    worth = [keeper.retention.utility(stats) for keeper, (stats, _) in zip(keepers, rivals)]
    left = [
        (stats.is_page & ~drop, stats.newest, stats.own_shard)
        for drop, (stats, _) in zip(drops, rivals)
    ]
    stats = PageStats(*(torch.cat(parts, dim=1) for parts in zip(*left)))
    losers = beyond(stats, torch.cat(worth, dim=1), sum(limit for _, limit in rivals))
    drops = [drop | own for drop, own in zip(drops, losers.tensor_split(len(drops), dim=1))]
    for keeper, drop in zip(keepers, drops):
        keeper.drop(slots, drop)
    return drops


def _at_most(limit: torch.Tensor, times: float) -> torch.Tensor:
    return (limit.double() * times).long()

"""Older pages of a shard, and how several become one, level by level.

Legend: r sequences, m columns, c groups, ng KV heads, S tokens a page, w width.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pikv_megatron.cache.pages.page_pool import PagePool
from pikv_megatron.codec.codec import PageCodec
from pikv_megatron.types import Ageing, PageStats

BEHIND = 1 << 20  # all shards
# Keys and values [ng, c, pages * S, w] and positions [c, pages * S] of groups -> keys and values
# [ng, c, S, w].
Merge = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def merge_level(
    codec: PageCodec, pool: PagePool, slots: Tensor, pages: Tensor, stats: PageStats,
    ageing: Ageing, level: int, merge: Merge,
) -> tuple[Tensor, Tensor]:
    """Merge the old pages of one level, in place: the oldest page of a group then holds all of it.

    Args:
        slots: [r], the sequences.
        pages: [r, m], page numbers.
        stats: of them.
        ageing: how many become one, and which are old.
        level: times that the pages were merged before.
        merge: what is left of a group's tokens.

    Returns:
        The pages of each group, oldest first, [group, c]; and [r, m], bool, True for all but the
        oldest.
    """
    is_mine = stats.is_page & (pool.level[pages] == level)
    column, is_first = _groups(is_mine, pool.shard[pages], stats.newest, ageing)
    row, place = is_first.nonzero(as_tuple=True)
    columns = [column[row, place + i] for i in range(ageing.pages)]
    group = torch.stack([pages[row, each] for each in columns])
    if row.numel():
        owners, position = slots[row], torch.cat([pool.position[page] for page in group], dim=1)
        parts = [pool.restore(codec, page, owners) for page in group]
        keys, values = (torch.cat(part, dim=2) for part in zip(*parts))
        kept = merge(keys, values, position)
        times = 0 if codec.ageing is None else level + 1
        codec.seal(*kept, pool.kv, pool.places(group[0]), owners, times)
        pool.position[group[0]] = position[:, ageing.pages - 1 :: ageing.pages]
        pool.level[group[0]] = level + 1
    drop = torch.zeros_like(stats.is_page)
    for each in columns[1:]:
        drop[row, each] = True
    return group, drop


def mean_of_pairs(keys: Tensor, values: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Neighbours become their mean, [ng, c, 2 S, w] -> [ng, c, S, w]."""
    return tuple(x.unflatten(2, (-1, 2)).mean(dim=3) for x in (keys, values))


def old_pages(stats: PageStats, num_young: int) -> Tensor:
    """[r, m], bool: the pages that are not among the newest `num_young` of their shard."""
    column, index, _, end = _by_age(stats.is_page, stats.shard, stats.newest)
    is_old = (end - index >= num_young) & stats.is_page.gather(1, column)
    return torch.zeros_like(is_old).scatter_(1, column, is_old)


def _groups(
    is_mine: Tensor, shard: Tensor, newest: Tensor, ageing: Ageing
) -> tuple[Tensor, Tensor]:
    """Columns shard by shard, oldest first, [r, m]; and which of these begin a group, [r, m].

    Example:
        One shard, 5 pages, 2 young ones, pairs: the oldest two are one, the third waits.
    """
    column, index, start, end = _by_age(is_mine, shard, newest)
    is_first = (index - start) % ageing.pages == 0
    is_first &= end - index >= ageing.young + ageing.pages - 1
    return column, is_first & is_mine.gather(1, column)


def _by_age(is_mine: Tensor, shard: Tensor, newest: Tensor) -> tuple[Tensor, ...]:
    """Columns shard by shard, oldest first, those that are not asked for last; their numbers in
    that order, and those of the first and of the last one of their shard: [r, m] each."""
    key = torch.where(is_mine, shard.long(), BEHIND) << 40
    key, column = (key + newest.clamp(min=0)).sort(dim=1)
    group, m = key >> 40, key.shape[1]
    index = torch.arange(m, device=key.device).expand_as(key)
    is_start = torch.ones_like(is_mine)
    is_start[:, 1:] = group[:, 1:] != group[:, :-1]
    start = torch.where(is_start, index, 0).cummax(dim=1).values
    is_end = is_start.roll(-1, dims=1)
    is_end[:, -1:] = True
    end = torch.where(is_end, index, m).flip(1).cummin(dim=1).values.flip(1)
    return column, index, start, end

"""Older pages of a shard, and how they become one, two by two, level by level (PyramidKV).

Legend: r sequences, m columns, c pairs, ng KV heads, S tokens a page, w width.
"""

import torch
from torch import Tensor

from pikv_megatron.cache.page_pool import PagePool
from pikv_megatron.codec.codec import PageCodec
from pikv_megatron.types import PageStats


def pool_level(
    codec: PageCodec, pool: PagePool, slots: Tensor, pages: Tensor, stats: PageStats, level: int
) -> tuple[Tensor, Tensor]:
    """Pool the old pages of one level, in place: the older page of a pair then holds both.

    Args:
        slots: [r], the sequences.
        pages: [r, m], page numbers.
        stats: of them.
        level: times that the pages were pooled before.

    Returns:
        The older and the newer page of each pair, [2, c]; and [r, m], bool, True for the newer.
    """
    levels = codec.levels(pool.kv, pages)
    shards = pool.shard[pages]
    column, is_first = _pairs(
        stats.is_page & (levels == level), shards, stats.newest, codec.ageing.young
    )
    row, place = is_first.nonzero(as_tuple=True)
    older, newer = column[row, place], column[row, place + 1]
    pair = torch.stack([pages[row, older], pages[row, newer]])
    if row.numel():
        owners = slots[row]
        parts = [codec.restore(pool.kv, page, owners) for page in pair]
        tokens = [_pooled(torch.cat(part, dim=2)) for part in zip(*parts)]
        codec.seal(*tokens, pool.kv, pair[0], owners, level + 1)
        pool.position[pair[0]] = torch.cat([pool.position[page] for page in pair], dim=1)[:, 1::2]
    drop = torch.zeros_like(stats.is_page)
    drop[row, newer] = True
    return pair, drop


def old_pages(stats: PageStats, num_young: int) -> Tensor:
    """[r, m], bool: the pages that are not among the newest `num_young` of their shard."""
    column, index, _, end = _by_age(stats.is_page, stats.shard, stats.newest)
    is_old = (end - index >= num_young) & stats.is_page.gather(1, column)
    return torch.zeros_like(is_old).scatter_(1, column, is_old)


def _pooled(x: Tensor) -> Tensor:
    """[ng, c, 2 S, w] -> [ng, c, S, w]."""
    return x.unflatten(2, (-1, 2)).mean(dim=3)


def _pairs(
    is_mine: Tensor, shard: Tensor, newest: Tensor, num_young: int
) -> tuple[Tensor, Tensor]:
    """Columns shard by shard, oldest first, [r, m]; and which of these begin a pair, [r, m].

    Example:
        One shard, 5 pages, 2 young ones: the oldest two are a pair, the third waits for a partner.
    """
    column, index, start, end = _by_age(is_mine, shard, newest)
    is_first = ((index - start) % 2 == 0) & (end - index >= num_young + 1)
    return column, is_first & is_mine.gather(1, column)


def _by_age(is_mine: Tensor, shard: Tensor, newest: Tensor) -> tuple[Tensor, ...]:
    """Columns shard by shard, oldest first, those that are not asked for last; their numbers in
    that order, and those of the first and of the last one of their shard: [r, m] each."""
    key = torch.where(is_mine, shard.long(), shard.max() + 1) << 40
    key, column = (key + newest.clamp(min=0)).sort(dim=1)
    group, m = key >> 40, key.shape[1]
    index = torch.arange(m, device=key.device).expand_as(key)
    is_start = torch.ones_like(is_mine)
    is_start[:, 1:] = group[:, 1:] != group[:, :-1]
    start = torch.where(is_start, index, 0).cummax(dim=1).values
    is_end = is_start.roll(-1, dims=1)
    is_end[:, -1] = True
    end = torch.where(is_end, index, m).flip(1).cummin(dim=1).values.flip(1)
    return column, index, start, end

"""Attention of a few queries over the pages of several pools: split over the pages, then reduced.

Flash-Decoding (Dao et al., 2023): a decode step has too few query rows to fill a GPU, so the pages
of a sequence are dealt to several programs, each with an online softmax over its own part, and the
parts are merged by their log-sum-exps. The rows of all query heads that share a KV head, and of all
query tokens, go through one matrix product, so keys and values are read once.

Legend: n sequences, sq query tokens, np query heads, ng KV heads, g = np / ng, m pages listed for a
sequence, S tokens a page, r_k and r_v stored widths.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton

from pikv_kernels.attend_split import attend_split
from pikv_kernels.merge_states import merge_states
from pikv_kernels.packing import packing_of
from pikv_kernels.page_tiles import NEAR

# Of the keys or of the values of a tile.
TILE_BYTES = 16 << 10
# Shorter parts cost more in merging than they give in parallel work.
MIN_SPLIT_TOKENS = 256
# Of the sum of values that a program keeps in registers, 4 bytes each.
ACCUMULATED = 16 << 10
# Programs that a processor of the GPU can have under way at once.
PROGRAMS_PER_PROCESSOR = 2
# What the interpreter pretends to have, so that it goes through the splits, too.
CPU_PROCESSORS = 8


class _Launch(NamedTuple):
    """How the pages of one list are dealt to programs."""

    page_list: Any
    tiling: dict[str, int]
    num_splits: int
    pages_per_split: int
    num_row_blocks: int


def decode_attention(
    query: torch.Tensor, lists: Sequence[Any], softmax_scale: float, with_mass: bool = False
) -> tuple[tuple[torch.Tensor, torch.Tensor], list[torch.Tensor] | None]:
    """Softmax attention of query [n, sq, np, r_k] over all tokens that the page lists name.

    One launch a list, then one reduction over the parts of all lists. Nothing waits for the GPU.

    Args:
        lists: `PageList`s, one or more.

    Returns:
        (out [n, sq, np, r_v] in the query's type, lse [n, sq, np] float32), and the masses
        [n, sq, np, m] of each list's pages if asked for.
    """
    query = query.contiguous()
    width = lists[0].pages.value_width
    launches = [_plan(query, each) for each in lists]
    num_parts = sum(launch.num_splits for launch in launches)
    shape, device = query.shape[:3], query.device
    part_out = torch.empty((num_parts, *shape, width), dtype=torch.float32, device=device)
    part_lse = torch.empty((num_parts, *shape), dtype=torch.float32, device=device)
    page_lses = [
        torch.empty((*shape, each.table.shape[1]), dtype=torch.float32, device=device)
        if with_mass else None for each in lists
    ]
    first_split = 0
    for launch, page_lse in zip(launches, page_lses):
        if launch.num_splits:
            _launch(query, launch, part_out, part_lse, page_lse, first_split, softmax_scale)
        first_split += launch.num_splits
    out, lse = merge_states(part_out, part_lse, query.dtype)
    if not with_mass:
        return (out, lse), None
    anchor = lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)
    return (out, lse), [page_lse.sub_(anchor).exp_() for page_lse in page_lses]


def _plan(query: torch.Tensor, page_list: Any) -> _Launch:
    """Choose tiles and splits from shapes alone."""
    n, num_queries, num_heads, key_width = query.shape
    pages, is_shared = page_list.pages, page_list.pages.values is None
    keys, values = pages.keys, pages.keys if is_shared else pages.values
    num_groups, value_width = keys.shape[0], pages.value_width
    group = num_heads // num_groups
    m, page_size = page_list.table.shape[1], pages.page_size
    # Of shared rows, the values' columns are one tile and the keys' others another.
    own_width = key_width - value_width if is_shared else key_width
    block_k, block_v = (
        max(16, triton.next_power_of_2(width)) for width in (own_width, value_width)
    )
    formats = [packing_of(x, scale, page_size) for x, scale in (
        (keys, pages.key_scale), (values, pages.key_scale if is_shared else pages.value_scale)
    )]
    num_planes = max(planes for _, planes in formats)
    rows = page_size // num_planes
    # So that the keys and values of a few tiles fit in any GPU's shared memory.
    row_bytes = max(block_k * keys.element_size(), block_v * values.element_size())
    block_n = max(16, min(64, TILE_BYTES // row_bytes))
    lanes = min(triton.next_power_of_2(rows), block_n)
    tile_pages = block_n // lanes
    most_rows = min(64, max(16, ACCUMULATED // block_v))
    block_m = min(most_rows, max(16, triton.next_power_of_2(num_queries * group)))
    num_row_blocks = triton.cdiv(num_queries * group, block_m)
    tiling = dict(
        GROUP=group, KEY_WIDTH=key_width, VALUE_WIDTH=value_width, ROWS=rows,
        PAGE_SIZE=page_size, TILE_PAGES=tile_pages, TILES=triton.cdiv(rows, block_n),
        KEY_FORMAT=formats[0][0], VALUE_FORMAT=formats[1][0],
        KEY_LOADS=num_planes // formats[0][1], VALUE_LOADS=num_planes // formats[1][1],
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, BLOCK_V=block_v,
        IS_SHARED=is_shared,
    )
    if n * num_queries * m == 0:
        return _Launch(page_list, tiling, 0, 0, num_row_blocks)
    programs = PROGRAMS_PER_PROCESSOR * _num_processors(query.device)
    wanted = triton.cdiv(programs, n * num_groups * num_row_blocks)
    pages_per_split = max(triton.cdiv(m, wanted), triton.cdiv(MIN_SPLIT_TOKENS, page_size))
    pages_per_split = triton.cdiv(pages_per_split, tile_pages) * tile_pages
    return _Launch(
        page_list, tiling, triton.cdiv(m, pages_per_split), pages_per_split, num_row_blocks
    )


def _launch(
    query: torch.Tensor, launch: _Launch, part_out: torch.Tensor, part_lse: torch.Tensor,
    page_lse: torch.Tensor | None, first_split: int, softmax_scale: float,
) -> None:
    page_list, pages = launch.page_list, launch.page_list.pages
    n, num_queries = query.shape[:2]
    num_groups = pages.keys.shape[0]
    pools = [
        x.view(torch.uint8) if x is not None and x.dtype == torch.float8_e4m3fn else x
        for x in pages[:6]
    ]
    if pages.values is None:
        pools[1] = pools[0]
    assert all(x is None or x.stride(3) == 1 for x in pools), "channels must lie together"
    mask, bias, turn = page_list.token_mask, page_list.logit_bias, page_list.turn
    turns = (None, None, None) if turn is None else (
        turn.position.contiguous(), turn.rows.contiguous(), turn.angles.contiguous()
    )
    attend_split[(n * num_groups * launch.num_row_blocks, launch.num_splits)](
        query, *pools, pages.log_multiplicity,
        page_list.table.contiguous(), page_list.lens.contiguous(),
        None if mask is None else mask.contiguous().view(torch.uint8),
        None if bias is None else bias.contiguous(),
        *turns, part_out, part_lse, page_lse,
        *[None if x is None else x.stride()[:3] for x in pools],
        n, num_queries, num_groups, page_list.table.shape[1], launch.num_row_blocks,
        launch.pages_per_split, first_split, softmax_scale,
        0 if turn is None else len(turn.angles) - NEAR.value,
        TURNED=0 if turn is None else turn.angles.shape[1],
        KEY_GROUPS=1 if pages.key_scale is None else pages.key_scale.shape[2],
        VALUE_GROUPS=1 if pages.value_scale is None else pages.value_scale.shape[3],
        **launch.tiling,
    )


@lru_cache
def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return CPU_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count

"""Attention of many queries of one sequence, a piece of its prompt, to listed pages, on a CPU.

A decode step reads keys and values that no query shares. A prompt's piece has so many queries that
products of matrices are best: torch's flash attention goes over each block of pages, unpacked, and
the blocks are merged by log-sum-exp.

Legend: sq query tokens, np query heads, ng KV heads, g = np / ng, r width, c pages of a block of t
tokens.
"""

from collections.abc import Iterator, Sequence

import torch

from pikv_megatron.ops.dense_attention import empty_state
from pikv_megatron.ops.expand_pages import expand_pages
from pikv_megatron.ops.merge_states import merge_states
from pikv_megatron.ops.turn_keys import turn_listed
from pikv_megatron.types import AttentionState, PageList

MIN_QUERIES = 64
BLOCK_TOKENS = 16384


def is_chunk(query: torch.Tensor, lists: Sequence[PageList]) -> bool:
    """Whether `attend_chunk` serves these arguments of `decode_attention`."""
    is_long = query.is_cpu and len(query) == 1 and query.shape[1] >= MIN_QUERIES
    return is_long and all(
        x.pages.log_multiplicity is None
        and (x.pages.values is None or x.pages.keys.shape[3] == x.pages.value_width)
        for x in lists
    )


def attend_chunk(
    query: torch.Tensor, lists: Sequence[PageList], softmax_scale: float
) -> AttentionState:
    """As `decode_attention`, for query [1, sq, np, r]."""
    num_groups = lists[0].pages.keys.shape[0]
    heads = query[0].float().unflatten(1, (num_groups, -1)).permute(1, 2, 0, 3)  # [ng, g, sq, r]
    parts = [
        part for each in lists for part in _parts(heads.contiguous(), each, softmax_scale)
    ]
    width = lists[0].pages.value_width
    if not parts:
        return empty_state(query, width)
    whole = merge_states(*(torch.stack(x) for x in zip(*parts)))
    return AttentionState(whole.out[..., :width].to(query.dtype), whole.lse)


def _parts(
    heads: torch.Tensor, page_list: PageList, softmax_scale: float
) -> Iterator[AttentionState]:
    """Block by block, [1, sq, np, r]."""
    step = max(1, BLOCK_TOKENS // page_list.pages.page_size)
    for columns in (page_list.lens[0] > 0).nonzero().squeeze(1).split(step):
        keys, values = (
            x.unsqueeze(1).expand(-1, heads.shape[1], -1, -1) for x in _tokens(page_list, columns)
        )
        if keys.shape[2]:
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                heads, keys, values, scale=softmax_scale
            )
            out, lse = out.permute(2, 0, 1, 3).flatten(1, 2), lse.permute(2, 0, 1).flatten(1, 2)
            if page_list.logit_bias is not None:
                lse = lse + page_list.logit_bias[0]
            yield AttentionState(out.unsqueeze(0), lse.unsqueeze(0))


def _tokens(
    page_list: PageList, columns: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the tokens of columns [c] that are read, [ng, t, r], float32.

    Flash attention has one width: values that are columns of the keys come with the other columns.
    """
    page_size = page_list.pages.page_size
    shown = torch.arange(page_size) < page_list.lens[0, columns].unsqueeze(1)
    if page_list.token_mask is not None:
        shown &= page_list.token_mask[0, columns]
    keys, values = expand_pages(page_list.pages, page_list.table[0, columns])
    if page_list.turn is not None:
        keys = turn_listed(keys, page_list.turn, page_list.turn.rows[0, columns])
    numbers = [x.flatten(1, 2) for x in (keys, values)]
    if page_list.pages.values is None:
        numbers = numbers[:1]
    if not shown.all():
        place = shown.flatten().nonzero().squeeze(1)
        numbers = [x.index_select(1, place) for x in numbers]
    return numbers[0], numbers[-1]

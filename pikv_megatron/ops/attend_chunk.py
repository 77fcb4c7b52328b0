"""Attention of many queries of one sequence, a piece of its prompt, to listed pages, on a CPU.

With few queries, as in decoding, the logits of all tokens are small and one softmax over all of
them is best. A prompt's piece has so many that they would not fit into any cache: torch's flash
attention goes over each block of pages, and the blocks are merged by log-sum-exp.

Legend: sq query tokens, np query heads, ng KV heads, g = np / ng, r width, t tokens of a block.
"""

from collections.abc import Iterator, Sequence

import torch

from pikv_megatron.ops.dense_attention import empty_state
from pikv_megatron.ops.merge_states import merge_states
from pikv_megatron.ops.page_blocks import PageBlock, page_blocks, read_keys, read_values
from pikv_megatron.types import AttentionState, PageList

MIN_QUERIES = 64
BLOCK_TOKENS = 16384


def is_chunk(query: torch.Tensor, lists: Sequence[PageList]) -> bool:
    """Whether `attend_chunk` serves these arguments of `decode_attention`."""
    is_long = query.is_cpu and len(query) == 1 and query.shape[1] >= MIN_QUERIES
    return is_long and all(
        x.pages.log_multiplicity is None and x.pages.keys.shape[3] == x.pages.values.shape[3]
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
    if not parts:
        return empty_state(query, query.shape[3])
    whole = merge_states(*(torch.stack(x) for x in zip(*parts)))
    return AttentionState(whole.out.to(query.dtype), whole.lse)


def _parts(
    heads: torch.Tensor, page_list: PageList, softmax_scale: float
) -> Iterator[AttentionState]:
    """Block by block, [1, sq, np, r]."""
    for block in page_blocks(page_list, BLOCK_TOKENS):
        keys, values = _tokens(page_list, block)
        if keys.shape[1]:
            keys, values = (
                x.unsqueeze(1).expand(-1, heads.shape[1], -1, -1) for x in (keys, values)
            )
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                heads, keys, values, scale=softmax_scale
            )
            out, lse = out.permute(2, 0, 1, 3).flatten(1, 2), lse.permute(2, 0, 1).flatten(1, 2)
            if page_list.logit_bias is not None:
                lse = lse + page_list.logit_bias[0]
            yield AttentionState(out.unsqueeze(0), lse.unsqueeze(0))


def _tokens(page_list: PageList, block: PageBlock) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the tokens of a block that are read, [ng, t, r], float32."""
    shown = None if block.hidden is None else (~block.hidden[0]).nonzero().squeeze(1)
    keys = _joined([x.transpose(1, 2) for x in read_keys(page_list, block)], shown)
    is_in_place = block.run is not None and page_list.pages.keys.dtype == torch.float32
    if shown is None and not is_in_place:
        keys = keys.clone()  # values are read into the same memory
    return keys, _joined(read_values(page_list, block, torch.float32), shown)


def _joined(heads: list[torch.Tensor], shown: torch.Tensor | None) -> torch.Tensor:
    joined = heads[0] if len(heads) == 1 else torch.cat(heads)
    return joined if shown is None else joined.index_select(1, shown)

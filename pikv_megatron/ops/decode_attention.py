"""Attention of a few queries over the pages of several pools.

The torch version serves where no kernel does. It expands all listed pages; the kernels read them
where they lie.

Legend: n sequences, sq query tokens, np query heads, ng KV heads, g = np / ng, m pages listed for a
sequence, S tokens a page, r_k and r_v stored widths, t = m * S tokens of a list, T of all lists.
"""

from collections.abc import Sequence

import torch

from pikv_megatron.ops.attend_chunk import attend_chunk, is_chunk
from pikv_megatron.ops.backend import kernel_op
from pikv_megatron.ops.dense_attention import empty_state, group_heads, ungroup_heads
from pikv_megatron.ops.expand_pages import expand_pages
from pikv_megatron.ops.turn_keys import turn_listed
from pikv_megatron.types import AttentionState, PageList


@torch.no_grad()
def decode_attention(
    query: torch.Tensor,
    lists: Sequence[PageList],
    softmax_scale: float,
    with_mass: bool = False,
) -> tuple[AttentionState, list[torch.Tensor] | None]:
    """Softmax attention over all tokens that the lists name; every query sees all of them.

    Args:
        query: [n, sq, np, r_k]; head h reads KV head h // g.
        lists: one or more, each with its own pool; r_k and r_v are common to all. What they do not
            name may hold anything, NaN too.
        softmax_scale: factor on q . k, before biases and log multiplicities.
        with_mass: whether to return the masses.

    Returns:
        The attention, `out` in the query's type; and for each list the masses [n, sq, np, m],
        float32: the share of this softmax that each page has, 0 for pages that are not read.

    Example:
        Two lists name one token each, with equal logits: either page has the mass 0.5, and `out` is
        the mean of the two values.
    """
    if not with_mass and is_chunk(query, lists):
        return attend_chunk(query, lists, softmax_scale), None
    kernel = kernel_op("decode_attention", query)
    if kernel is not None:
        state, masses = kernel(query, lists, softmax_scale, with_mass)
        return AttentionState(*state), masses
    if query.numel() == 0 or not any(each.table.shape[1] for each in lists):
        state = empty_state(query, lists[0].pages.value_width)
        masses = [state.lse.new_zeros(*state.lse.shape, x.table.shape[1]) for x in lists]
    else:
        state, masses = _attend(query, lists, softmax_scale)
    return state, masses if with_mass else None


def _attend(
    query: torch.Tensor, lists: Sequence[PageList], softmax_scale: float
) -> tuple[AttentionState, list[torch.Tensor]]:
    num_groups, sq = lists[0].pages.keys.shape[0], query.shape[1]
    rows = group_heads(query.float() * softmax_scale, num_groups)  # [ng, n, sq * g, r_k]
    parts = [_logits_and_values(rows, each) for each in lists]
    logits, values = (torch.cat(part, dim) for part, dim in zip(zip(*parts), (3, 2)))
    lse = torch.logsumexp(logits, dim=3, keepdim=True)
    weights = logits.sub_(lse.masked_fill(lse == -torch.inf, 0.0)).exp_()
    out = torch.matmul(weights, values).to(query.dtype)
    by_list = weights.split([part[0].shape[3] for part in parts], dim=3)
    masses = [
        ungroup_heads(own.unflatten(3, (-1, each.pages.page_size)).sum(dim=4), sq)
        for own, each in zip(by_list, lists)
    ]
    return AttentionState(ungroup_heads(out, sq), ungroup_heads(lse, sq).squeeze(3)), masses


def _logits_and_values(
    rows: torch.Tensor, page_list: PageList
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [ng, n, sq * g, t], -inf for what is not read, and values [ng, n, t, r_v], 0 there."""
    pages, (n, m) = page_list.pages, page_list.table.shape
    keys, values = (
        x.unflatten(1, (n, m)) for x in expand_pages(pages, page_list.table.flatten())
    )
    if page_list.turn is not None:
        keys = turn_listed(keys, page_list.turn, page_list.turn.rows)
    keys, values = keys.flatten(2, 3), values.flatten(2, 3)
    logits = torch.matmul(rows, keys.transpose(2, 3))
    if pages.log_multiplicity is not None:
        by_page = pages.log_multiplicity[page_list.table]
        logits += by_page.repeat_interleave(pages.page_size, dim=1).unsqueeze(1)
    if page_list.logit_bias is not None:
        logits += group_heads(page_list.logit_bias.unsqueeze(3), pages.keys.shape[0])
    shown = torch.arange(pages.page_size, device=rows.device) < page_list.lens.unsqueeze(2)
    if page_list.token_mask is not None:
        shown = shown & page_list.token_mask
    hidden = ~shown.flatten(1)
    # 0 times NaN would be NaN.
    return (
        logits.masked_fill_(hidden.unsqueeze(1), -torch.inf),
        values.masked_fill(hidden.unsqueeze(2), 0.0),
    )

"""Attention of a few queries over paged keys and values, in plain torch.

Legend: n sequences, sq query tokens, np query heads, ng KV heads, g = np / ng, hn head width,
m pages a sequence, S tokens a page.
"""

import torch

from pikv_megatron.ops.merge_states import merge_states
from pikv_megatron.types import AttentionState

# Pages are copied through a block of about the size of a CPU's second-level cache.
GATHER_BYTES = 4 << 20


def decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    page_table: torch.Tensor,
    token_mask: torch.Tensor,
    softmax_scale: float,
) -> AttentionState:
    """Attend to the pages of each sequence.

    Pages that lie one behind the other are read in place; others are gathered, a block of
    columns at a time.

    Args:
        query: [n, sq, np, hn].
        keys: [ng, num_pages, S, hn], the pool.
        values: [ng, num_pages, S, hn].
        page_table: [n, m], int64, page numbers; padding points to any page.
        token_mask: [n, m * S], bool, True where the token is to be read.
        softmax_scale: factor on the logits.
    """
    n, m = page_table.shape
    if n * m == 0:
        return _empty_state(query)
    page_size = keys.shape[2]
    flat = page_table.reshape(-1)
    if flat.is_cpu and _is_run(flat):
        part = slice(int(flat[0]), int(flat[0]) + flat.numel())
        return dense_attention(
            query, _rows(keys[:, part], n), _rows(values[:, part], n), token_mask, softmax_scale
        )
    page_bytes = keys.shape[0] * page_size * keys.shape[3] * keys.element_size()
    columns = max(1, GATHER_BYTES // (n * page_bytes)) if flat.is_cpu else m
    states = []
    for first in range(0, m, columns):
        last = min(m, first + columns)
        pages = page_table[:, first:last].reshape(-1)
        mask = token_mask[:, first * page_size : last * page_size]
        k, v = (_rows(pool.index_select(1, pages), n) for pool in (keys, values))
        states.append(dense_attention(query, k, v, mask, softmax_scale))
    if len(states) == 1:
        return states[0]
    return merge_states(torch.stack([s.out for s in states]), torch.stack([s.lse for s in states]))


def dense_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    softmax_scale: float,
) -> AttentionState:
    """Attend to dense keys; heads of a group share one matrix product.

    Args:
        query: [n, sq, np, hn].
        keys: [ng, n, t, hn].
        values: [ng, n, t, hn].
        mask: [n, t] or [n, sq, t], bool, True where the token is to be read.
        softmax_scale: factor on the logits.
    """
    n, sq, num_heads, width = query.shape
    num_groups = keys.shape[0]
    if n == 0:
        return _empty_state(query)
    group = num_heads // num_groups
    # [n, sq, ng, g, hn] -> [ng, n, sq * g, hn]
    rows = query.view(n, sq, num_groups, group, width).permute(2, 0, 1, 3, 4)
    rows = rows.reshape(num_groups, n, sq * group, width) * softmax_scale
    logits = torch.matmul(rows, keys.transpose(2, 3)).float()
    hidden = ~(mask.unsqueeze(1) if mask.dim() == 2 else mask.repeat_interleave(group, dim=1))
    logits.masked_fill_(hidden, -torch.inf)
    lse = torch.logsumexp(logits, dim=-1)
    finite = lse.masked_fill(lse == -torch.inf, 0.0)
    weights = logits.sub_(finite.unsqueeze(-1)).exp_().to(values.dtype)
    out = torch.matmul(weights, values)
    out = out.view(num_groups, n, sq, group, width).permute(1, 2, 0, 3, 4)
    lse = lse.view(num_groups, n, sq, group).permute(1, 2, 0, 3)
    return AttentionState(
        out.reshape(n, sq, num_heads, width), lse.reshape(n, sq, num_heads)
    )


def _rows(pages: torch.Tensor, n: int) -> torch.Tensor:
    """[ng, n * m, S, hn] -> [ng, n, m * S, hn]."""
    return pages.reshape(pages.shape[0], n, -1, pages.shape[3])


def _is_run(pages: torch.Tensor) -> bool:
    run = torch.arange(pages.numel()) + pages[0]
    return torch.equal(pages, run)


def _empty_state(query: torch.Tensor) -> AttentionState:
    lse = query.new_full(query.shape[:-1], -torch.inf, dtype=torch.float32)
    return AttentionState(torch.zeros_like(query), lse)

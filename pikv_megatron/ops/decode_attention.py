"""Attention of a few queries over the pages of several pools.

The torch version is the decode path of a CPU. It takes the logits of all listed tokens first, then
one softmax, then the values: on a CPU the logits of a decode step are small, and nothing has to be
merged or rescaled. Pages pass through a reused block of a few megabytes.

Legend: n sequences, sq query tokens, np query heads, ng KV heads, g = np / ng, m pages listed for a
sequence, S tokens a page, r_k and r_v stored widths, T tokens of all lists.
"""

from collections.abc import Sequence

import torch

from pikv_megatron.ops.backend import triton_op
from pikv_megatron.ops.dense_attention import (
    empty_state,
    group_heads,
    ungroup_heads,
)
from pikv_megatron.ops.page_blocks import (
    PageBlock,
    noted,
    num_columns,
    page_blocks,
    read_keys,
    read_values,
)
from pikv_megatron.ops.workspace import scratch
from pikv_megatron.types import AttentionState, PageList

# Of the float32 numbers of a block of pages, keys or values.
BLOCK_BYTES = 4 << 20
# Sequences, then queries, are taken in turns where the logits would need more.
LOGIT_BYTES = 32 << 20
# Shorter products are not worth their call.
MIN_BLOCK_TOKENS = 256


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
    kernel = triton_op("decode_attention", query)
    if kernel is not None:
        state, masses = kernel(query, lists, softmax_scale, with_mass)
        return AttentionState(*state), masses
    state = empty_state(query, lists[0].pages.values.shape[3])
    masses = [
        state.lse.new_zeros(*state.lse.shape, each.table.shape[1]) for each in lists
    ] if with_mass else None
    lists = [_trim(each) for each in lists]
    num_tokens = sum(each.table.shape[1] * each.pages.page_size for each in lists)
    if state.lse.numel() == 0 or num_tokens == 0:
        return state, masses
    rows, queries = _turns(query, lists, num_tokens)
    if rows == query.shape[0] and queries == query.shape[1]:
        _attend(query, lists, softmax_scale, state, masses)
        return state, masses
    for first in range(0, query.shape[0], rows):
        for start in range(0, query.shape[1], queries):
            part = slice(first, first + rows), slice(start, start + queries)
            views = None if masses is None else [mass[part] for mass in masses]
            _attend(
                query[part], [_take(each, *part) for each in lists], softmax_scale,
                AttentionState(state.out[part], state.lse[part]), views,
            )
    return state, masses


def _attend(
    query: torch.Tensor, lists: list[PageList], softmax_scale: float, state: AttentionState,
    masses: list[torch.Tensor] | None,
) -> None:
    """Write one turn's attention to `state` and its masses to `masses`."""
    n, sq = query.shape[:2]
    num_groups = lists[0].pages.keys.shape[0]
    rows = group_heads(query.float() * softmax_scale, num_groups)
    sizes = [each.table.shape[1] * each.pages.page_size for each in lists]
    logits = scratch("logits", (*rows.shape[:3], sum(sizes)), torch.float32, query.device)
    parts = logits.split(sizes, dim=3)
    blocks = [page_blocks(each, _block_tokens(each, n)) for each in lists]
    for each, part, own in zip(lists, parts, blocks):
        for block in own:
            _write_logits(rows, each, block, part[..., _tokens(each, block)])
        if each.logit_bias is not None:
            part += group_heads(each.logit_bias.unsqueeze(3), num_groups)
    dtype = _value_dtype(query)
    top = logits.amax(dim=3, keepdim=True)
    top.masked_fill_(top == -torch.inf, 0.0)
    total = logits.sub_(top).exp_().sum(dim=3, keepdim=True)
    out = rows.new_zeros(*rows.shape[:3], state.out.shape[3])
    for each, part, own in zip(lists, parts, blocks):
        for block in own:
            weights = part[..., _tokens(each, block)]
            _multiply(weights, read_values(each, block, dtype), out, adds=True)
    # The largest logit alone adds 1 to the total: it is less only where there is no token.
    out /= total.clamp(min=1.0)
    state.out.copy_(ungroup_heads(out, sq))
    state.lse.copy_(ungroup_heads(top + total.log(), sq).squeeze(3))
    for index, mass in enumerate(masses or ()):
        m = lists[index].table.shape[1]
        if m:
            shares = parts[index].unflatten(3, (m, -1)).sum(dim=4) / total.clamp(min=1.0)
            mass[..., :m] = ungroup_heads(shares, sq)


def _write_logits(
    rows: torch.Tensor, page_list: PageList, block: PageBlock, out: torch.Tensor
) -> None:
    """Logits of a block to out [ng, n, sq * g, t], -inf for hidden tokens, biases not included."""
    _multiply(rows, read_keys(page_list, block).transpose(2, 3), out)
    multiplicity = page_list.pages.log_multiplicity
    if multiplicity is not None:
        by_token = multiplicity[block.pages].repeat_interleave(page_list.pages.page_size, dim=1)
        out += by_token.unsqueeze(1)
    if block.hidden is not None:
        out.masked_fill_(block.hidden.unsqueeze(1), -torch.inf)


def _multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, adds: bool = False) -> None:
    """Matrix products over the first two dimensions, in b's type, into or onto `out`, float32."""
    if a.dtype != b.dtype:
        a = scratch("narrow weights", a.shape, b.dtype, a.device).copy_(a)
    if b.shape[1] == 1 or b.stride(0) == b.shape[1] * b.stride(1):
        return _multiply_flat(a.flatten(0, 1), b.flatten(0, 1), out.flatten(0, 1), adds)
    for left, right, product in zip(a, b, out):
        _multiply_flat(left, right, product, adds)


def _multiply_flat(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, adds: bool) -> None:
    if b.dtype == out.dtype and out.is_contiguous():
        torch.baddbmm(out, a, b, beta=1 if adds else 0, out=out)
        return
    # Torch would take a product into strided memory matrix by matrix.
    product = torch.bmm(a, b, out=scratch("product", out.shape, b.dtype, b.device))
    out.add_(product) if adds else out.copy_(product)


def _value_dtype(query: torch.Tensor) -> torch.dtype:
    """What values are multiplied in, where they are stored in it; float32 otherwise.

    A query of bfloat16 gets an output of bfloat16, and as in flash attention its weights are
    rounded to that for the product, which halves the time. Logits stay float32.
    """
    is_native = query.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if is_native else torch.float32


def _tokens(page_list: PageList, block: PageBlock) -> slice:
    page_size = page_list.pages.page_size
    return slice(block.columns.start * page_size, block.columns.stop * page_size)


def _token_bytes(page_list: PageList) -> int:
    keys, values = page_list.pages.keys, page_list.pages.values
    return 4 * keys.shape[0] * max(keys.shape[3], values.shape[3])


def _block_tokens(page_list: PageList, n: int) -> int:
    return BLOCK_BYTES // (n * _token_bytes(page_list))


def _turns(query: torch.Tensor, lists: list[PageList], num_tokens: int) -> tuple[int, int]:
    """How many sequences and queries are attended at once."""
    n, sq, num_heads = query.shape[:3]
    shortest = min(MIN_BLOCK_TOKENS, num_tokens)
    row_bytes = max(max(shortest, x.pages.page_size) * _token_bytes(x) for x in lists)
    query_bytes = 4 * num_heads * num_tokens
    rows = min(BLOCK_BYTES // row_bytes, LOGIT_BYTES // (sq * query_bytes))
    return min(n, max(1, rows)), min(sq, max(1, LOGIT_BYTES // query_bytes))


def _trim(page_list: PageList) -> PageList:
    """Without the last columns if no sequence reads them; costs no synchronisation on a GPU."""
    if not page_list.lens.is_cpu or page_list.lens.numel() == 0:
        return page_list
    m = noted(page_list, "num_columns", lambda: num_columns(page_list))
    if m == page_list.table.shape[1]:
        return page_list
    mask = page_list.token_mask
    return page_list._replace(
        table=page_list.table[:, :m], lens=page_list.lens[:, :m],
        token_mask=None if mask is None else mask[:, :m],
    )


def _take(page_list: PageList, rows: slice, queries: slice) -> PageList:
    mask, bias = page_list.token_mask, page_list.logit_bias
    return page_list._replace(
        table=page_list.table[rows], lens=page_list.lens[rows],
        token_mask=None if mask is None else mask[rows],
        logit_bias=None if bias is None else bias[rows, queries], notes=None,
    )

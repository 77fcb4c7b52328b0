"""Attention of a few queries over the pages of several pools.

The torch version is the decode path of a CPU. It takes the logits of all listed tokens first, then
one softmax, then the values: on a CPU the logits of a decode step are small, and nothing has to be
merged or rescaled. Pages pass through a reused block of a few megabytes. Sequences are padded to
the longest one of their class: a batch of very different lengths has several.

Legend: n sequences, sq query tokens, np query heads, ng KV heads, g = np / ng, m pages listed for a
sequence, S tokens a page, r_k and r_v stored widths, T tokens of all lists.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from pikv_megatron.ops.attend_chunk import attend_chunk, is_chunk
from pikv_megatron.ops.backend import triton_op
from pikv_megatron.ops.dense_attention import (
    empty_state,
    group_heads,
    ungroup_heads,
)
from pikv_megatron.ops.length_classes import (
    Classes,
    class_lists,
    even_lists,
    length_classes,
    row_orders,
)
from pikv_megatron.ops.merge_states import merge_states
from pikv_megatron.ops.packed_products import add_values, multiply_keys
from pikv_megatron.ops.page_blocks import (
    PageBlock,
    noted,
    page_blocks,
    row_columns,
    token_bytes,
)
from pikv_megatron.ops.workspace import scratch
from pikv_megatron.types import AttentionState, PageList

# Of the float32 numbers of a block of pages, keys or values.
BLOCK_BYTES = 4 << 20
# Sequences, then queries, are taken in turns where the logits would need more.
LOGIT_BYTES = 32 << 20
# Shorter products are not worth their call.
MIN_BLOCK_TOKENS = 256

Attended = tuple[AttentionState, list[torch.Tensor]]


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
    if not with_mass and is_chunk(query, lists):
        return attend_chunk(query, lists, softmax_scale), None
    trimmed, classes = lists, None
    if all(each.lens.is_cpu for each in lists):  # looking would make the host wait for a GPU
        columns = tuple(noted(x, "row columns", lambda: row_columns(x)) for x in lists)
        trimmed = [_trim(x, max(own, default=0)) for x, own in zip(lists, columns)]
        classes = length_classes(trimmed, columns)
    if classes is None:
        state, masses = _attend_rows(query, trimmed, softmax_scale, with_mass)
    else:
        is_even = even_lists(trimmed, columns)
        state, masses = _attend_ragged(
            query, trimmed, classes, is_even, softmax_scale, with_mass
        )
    if not with_mass:
        return state, None
    return state, _padded(masses, [x.table.shape[1] for x in lists])


def _attend_ragged(
    query: torch.Tensor, lists: Sequence[PageList], classes: Classes, is_even: Sequence[bool],
    softmax_scale: float, with_mass: bool,
) -> Attended:
    """Lists that pad little are attended to at once, the others class by class, and merged."""
    ragged = [x for x, kind in zip(lists, is_even) if not kind]
    even = [x for x, kind in zip(lists, is_even) if kind]
    parts = [_attend_classes(query, ragged, classes, softmax_scale, with_mass)]
    if even:
        parts.append(_attend_rows(query, even, softmax_scale, with_mass))
    states = [state for state, _ in parts]
    whole = states[0] if not even else merge_states(*(torch.stack(x) for x in zip(*states)))
    if not with_mass:
        return whole, []
    anchor = whole.lse.masked_fill(whole.lse == -torch.inf, 0.0)
    shares = [
        iter([mass * (state.lse - anchor).exp().unsqueeze(3) for mass in masses])
        for state, masses in parts
    ]
    return whole, [next(shares[kind]) for kind in is_even]


def _attend_classes(
    query: torch.Tensor, lists: Sequence[PageList], classes: Classes, softmax_scale: float,
    with_mass: bool,
) -> Attended:
    """Class by class; the results lie in the order of the sequences."""
    order, place = row_orders(classes)
    by_class = zip(*(class_lists(each, classes) for each in lists))
    turns = []
    sizes = [len(rows) for rows in classes]
    for rows, part, own in zip(order.split(sizes), query[order].split(sizes), by_class):
        own = [
            x if each.logit_bias is None else x._replace(logit_bias=each.logit_bias[rows])
            for x, each in zip(own, lists)
        ]
        turns.append(_attend_rows(part, own, softmax_scale, with_mass))
    widths = [each.table.shape[1] for each in lists]
    state, masses = _join([(state, _padded(parts, widths)) for state, parts in turns], dim=0)
    return AttentionState(*(x[place] for x in state)), [mass[place] for mass in masses]


def _padded(masses: list[torch.Tensor], widths: Sequence[int]) -> list[torch.Tensor]:
    """Masses [..., m] of lists that were cut to fewer columns -> [..., widths]."""
    return [F.pad(mass, (0, width - mass.shape[-1])) for mass, width in zip(masses, widths)]


def _attend_rows(
    query: torch.Tensor, lists: Sequence[PageList], softmax_scale: float, with_mass: bool
) -> Attended:
    """All sequences side by side, padded to the longest, in turns where the logits are large."""
    num_tokens = sum(each.table.shape[1] * each.pages.page_size for each in lists)
    n, sq = query.shape[:2]
    if n * sq * num_tokens == 0:
        state = empty_state(query, lists[0].pages.values.shape[3])
        return state, [state.lse.new_zeros(*state.lse.shape, x.table.shape[1]) for x in lists]
    rows, queries = _turns(query, lists, num_tokens)
    if rows == n and queries == sq:
        return _attend(query, lists, softmax_scale, with_mass)
    turns = [
        _join([
            _attend(query[own, part], [_take(x, own, part) for x in lists], softmax_scale,
                    with_mass)
            for part in _slices(sq, queries)
        ], dim=1)
        for own in _slices(n, rows)
    ]
    return _join(turns, dim=0)


def _attend(
    query: torch.Tensor, lists: Sequence[PageList], softmax_scale: float, with_mass: bool
) -> Attended:
    """One turn's attention and its masses."""
    n, sq = query.shape[:2]
    num_groups, width = lists[0].pages.keys.shape[0], lists[0].pages.values.shape[3]
    rows = group_heads(query.float() * softmax_scale, num_groups).flatten(0, 1)
    sizes = [each.table.shape[1] * each.pages.page_size for each in lists]
    shape = *rows.shape[:2], sum(sizes)
    logits = scratch("logits", shape, torch.float32, query.device)
    weights = scratch("weights", shape, torch.float32, query.device)
    blocks = [page_blocks(each, _block_tokens(each, n)) for each in lists]
    for each, part, own in zip(lists, logits.split(sizes, dim=2), blocks):
        for block in own:
            _write_logits(rows, each, block, _columns(part, each, block))
        if each.logit_bias is not None:
            part += group_heads(each.logit_bias.unsqueeze(3), num_groups).flatten(0, 1)
    # Whoever reads a page as a whole reads a token.
    is_any_empty = all(block.hidden is not None for own in blocks for block in own)
    lse = _softmax(logits, weights, is_any_empty)
    dtype = _value_dtype(query)
    out = rows.new_zeros(*rows.shape[:2], width)
    parts = weights.split(sizes, dim=2)
    for each, part, own in zip(lists, parts, blocks):
        for block in own:
            add_values(_columns(part, each, block), each, block, dtype, out)

    def by_query(x: torch.Tensor) -> torch.Tensor:
        return ungroup_heads(x.unflatten(0, (num_groups, n)), sq)

    state = AttentionState(by_query(out).to(query.dtype), by_query(lse).squeeze(3))
    if not with_mass:
        return state, []
    by_page = [part.unflatten(2, (-1, x.pages.page_size)) for part, x in zip(parts, lists)]
    return state, [by_query(part.sum(dim=3)) for part in by_page]


def _softmax(
    logits: torch.Tensor, weights: torch.Tensor, is_any_empty: bool
) -> torch.Tensor:
    """Softmax over the last dimension to `weights`; the log-sum-exps [..., 1], which follow from
    the largest logit and the largest weight.

    Args:
        is_any_empty: some row may have no token; its weights become 0.
    """
    top = logits.amax(dim=2, keepdim=True)
    torch.softmax(logits, 2, out=weights)
    if is_any_empty:
        is_empty = top == -torch.inf
        weights.masked_fill_(is_empty, 0.0)
        return top - weights.amax(dim=2, keepdim=True).log().masked_fill_(is_empty, 0.0)
    return top - weights.amax(dim=2, keepdim=True).log()


def _slices(length: int, step: int) -> list[slice]:
    return [slice(first, first + step) for first in range(0, length, step)]


def _join(turns: list[Attended], dim: int) -> Attended:
    """Turns side by side along sequences (0) or queries (1)."""
    states, masses = zip(*turns)
    joined = AttentionState(*(torch.cat(part, dim=dim) for part in zip(*states)))
    return joined, [torch.cat(part, dim=dim) for part in zip(*masses)]


def _write_logits(
    rows: torch.Tensor, page_list: PageList, block: PageBlock, out: torch.Tensor
) -> None:
    """Logits of a block to out [ng * n, sq * g, t], -inf for hidden tokens, without biases."""
    multiply_keys(rows, page_list, block, out)
    num_groups = page_list.pages.keys.shape[0]
    multiplicity = page_list.pages.log_multiplicity
    if multiplicity is not None:
        by_token = multiplicity[block.pages].repeat_interleave(page_list.pages.page_size, dim=1)
        out += by_token.repeat(num_groups, 1).unsqueeze(1)
    if block.hidden is not None:
        by_group = out.unflatten(0, (num_groups, -1))
        by_group.masked_fill_(block.hidden.unsqueeze(1), -torch.inf)


def _columns(part: torch.Tensor, page_list: PageList, block: PageBlock) -> torch.Tensor:
    """The tokens of a block, of a tensor over all tokens of its list."""
    columns, page_size = block.columns, page_list.pages.page_size
    if columns.start == 0 and columns.stop * page_size == part.shape[2]:
        return part
    return part[..., columns.start * page_size : columns.stop * page_size]


def _value_dtype(query: torch.Tensor) -> torch.dtype:
    """What values are multiplied in, where they are stored in it; float32 otherwise.

    A query of bfloat16 gets an output of bfloat16, and as in flash attention its weights are
    rounded to that for the product, which halves the time. Logits stay float32.
    """
    is_native = query.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if is_native else torch.float32


def _block_tokens(page_list: PageList, n: int) -> int:
    return BLOCK_BYTES // (n * token_bytes(page_list))


def _turns(query: torch.Tensor, lists: Sequence[PageList], num_tokens: int) -> tuple[int, int]:
    """How many sequences and queries are attended at once."""
    n, sq, num_heads = query.shape[:3]
    shortest = min(MIN_BLOCK_TOKENS, num_tokens)
    row_bytes = max(max(shortest, x.pages.page_size) * token_bytes(x) for x in lists)
    query_bytes = 4 * num_heads * num_tokens
    rows = min(BLOCK_BYTES // row_bytes, LOGIT_BYTES // (sq * query_bytes))
    return min(n, max(1, rows)), min(sq, max(1, LOGIT_BYTES // query_bytes))


def _trim(page_list: PageList, num_columns: int) -> PageList:
    """Without the last columns if no sequence reads them."""
    if num_columns == page_list.table.shape[1]:
        return page_list
    mask = page_list.token_mask
    table, lens, mask = noted(page_list, "trimmed", lambda: [
        None if x is None else x[:, :num_columns] for x in (page_list.table, page_list.lens, mask)
    ])
    return page_list._replace(table=table, lens=lens, token_mask=mask)


def _take(page_list: PageList, rows: slice, queries: slice) -> PageList:
    mask, bias = page_list.token_mask, page_list.logit_bias
    return page_list._replace(
        table=page_list.table[rows], lens=page_list.lens[rows],
        token_mask=None if mask is None else mask[rows],
        logit_bias=None if bias is None else bias[rows, queries], notes=None,
    )

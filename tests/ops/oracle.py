"""Attention over pages in float64, token by token as `KVPages` describes them."""

from typing import NamedTuple

import torch

from pikv_megatron.types import KeyTurn, KVPages, PageList


class Expected(NamedTuple):
    """What `decode_attention` should give, in float64."""

    out: torch.Tensor
    lse: torch.Tensor
    masses: list[torch.Tensor]


def expand(
    pool: torch.Tensor, scale: torch.Tensor | None, zero: torch.Tensor | None, pages: KVPages,
    groups: tuple[int, int],
) -> torch.Tensor:
    """[ng, p, R, r] as stored -> [ng, p, S, r]; `groups`: tokens, channels that share a scale."""
    if scale is None:
        return pool.double()
    token = torch.arange(pages.page_size, device=pool.device)
    channel = torch.arange(pool.shape[3], device=pool.device)
    if pool.dtype == torch.uint8:
        bits = 8 * pool.shape[2] // pages.page_size
        if bits == 3:
            low, high = pool.long().split([pages.page_size // 4, pages.page_size // 8], dim=2)
            numbers = (_bits(low, token, 2) + 4 * _bits(high, token, 1)).double()
        else:
            numbers = _bits(pool.long(), token, bits).double()
    else:
        numbers = pool.double()[:, :, token]
    at = (slice(None), slice(None), (token // groups[0])[:, None], (channel // groups[1])[None])
    numbers = numbers * scale.double()[at]
    return numbers if zero is None else numbers + zero.double()[at]


def _bits(rows: torch.Tensor, token: torch.Tensor, bits: int) -> torch.Tensor:
    """Tokens of `bits` bits from rows [ng, p, R, r] of integers."""
    shift = (token // rows.shape[2] * bits)[:, None]
    return (rows[:, :, token % rows.shape[2]] >> shift) % 2**bits


def expand_pages(pages: KVPages) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [ng, p, S, r_k] and values [ng, p, S, r_v], float64."""
    key_tokens, channels = 1, 1
    if pages.key_scale is not None:
        key_tokens = pages.page_size // pages.key_scale.shape[2]
    keys = expand(pages.keys, pages.key_scale, pages.key_zero, pages, (key_tokens, 1))
    if pages.shared is not None:
        return keys, keys[..., : pages.shared.value_width]
    if pages.value_scale is not None:
        channels = pages.values.shape[3] // pages.value_scale.shape[3]
    return keys, expand(pages.values, pages.value_scale, pages.value_zero, pages, (1, channels))


def turned(keys: torch.Tensor, position: torch.Tensor, turn: KeyTurn) -> torch.Tensor:
    """Keys [ng, t, r] at positions [t], by complex numbers."""
    phases, half = torch.complex(*turn.angles.double().chunk(2, dim=1)), turn.angles.shape[1] // 2
    pairs = torch.complex(keys[..., :half], keys[..., half : 2 * half])
    pairs = pairs * phases[position // 64] * phases[len(phases) - 64 + position % 64]
    return torch.cat([pairs.real, pairs.imag, keys[..., 2 * half :]], dim=-1)


def is_read(page_list: PageList) -> torch.Tensor:
    """[n, m, S], bool: the tokens that a list names."""
    page_size = page_list.pages.page_size
    token = torch.arange(page_size, device=page_list.lens.device)
    named = token < page_list.lens.unsqueeze(2)
    return named if page_list.token_mask is None else named & page_list.token_mask


def expected_attention(
    query: torch.Tensor, lists: list[PageList], softmax_scale: float
) -> Expected:
    """The softmax over the union of the lists, one sequence at a time."""
    n, sq, num_heads = query.shape[:3]
    expanded = [expand_pages(each.pages) for each in lists]
    head = torch.arange(num_heads) // (num_heads // expanded[0][0].shape[0])
    result = Expected(
        query.new_zeros(n, sq, num_heads, expanded[0][1].shape[3], dtype=torch.float64),
        query.new_full((n, sq, num_heads), -torch.inf, dtype=torch.float64),
        [query.new_zeros(n, sq, num_heads, x.table.shape[1], dtype=torch.float64) for x in lists],
    )
    for row in range(n):
        logits, values, columns = [], [], []
        for each, (keys, vals) in zip(lists, expanded):
            column, token = is_read(each)[row].nonzero(as_tuple=True)
            page = each.table[row, column]
            own = keys[:, page, token]
            if each.turn is not None:
                own = turned(own, each.turn.position[each.turn.rows[row, column], token], each.turn)
            part = torch.einsum("qhr,htr->qht", query[row].double(), own[head])
            part = part * softmax_scale
            if each.pages.log_multiplicity is not None:
                part = part + each.pages.log_multiplicity[page].double()
            if each.logit_bias is not None:
                part = part + each.logit_bias[row].double().unsqueeze(2)
            logits.append(part)
            values.append(vals[:, page, token][head])
            columns.append(column)
        if not sum(c.numel() for c in columns):
            continue
        whole = torch.cat(logits, dim=2)
        weights = torch.softmax(whole, dim=2)
        result.out[row] = torch.einsum("qht,htr->qhr", weights, torch.cat(values, dim=1))
        result.lse[row] = torch.logsumexp(whole, dim=2)
        sizes = [c.numel() for c in columns]
        for mass, column, share in zip(result.masses, columns, weights.split(sizes, dim=2)):
            mass[row].index_add_(2, column, share)
    return result


def relative_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the error over that of what is expected; 0 for no numbers at all."""
    if expected.numel() == 0:
        return 0.0
    error = (actual.double() - expected.double()).square().mean().sqrt()
    size = expected.double().square().mean().sqrt()
    return float(error / size) if size > 0 else float(error)

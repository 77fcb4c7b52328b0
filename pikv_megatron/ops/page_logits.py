"""Page logits from each kind of sketch, in plain torch: one block of pages.

Legend: x KV heads of all sequences of the block, g query heads a KV head, b pages of a sequence,
S tokens a page, P tokens a byte, R = S / P byte rows, w width, r directions. Logits are not scaled
yet, and valid until the next block; bounds hold for the logits of exact keys up to float32's
rounding.
"""

import torch

from pikv_megatron.ops.workspace import scratch
from pikv_megatron.types import LowRankSketch

# Of a channel's largest magnitude: the rounding of up to 256 channels' products in float32.
ROUNDING = 2.0**-16


def mean_key_logits(query: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """[x, g, w] queries, [x, b, w] mean keys -> [x, g, b]."""
    return _product(query, _as_float(mean))


def box_logits(query: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """The largest logit of any key in the box: [x, g, w], [x, b, w] twice -> [x, g, b].

    A positive q_i takes the box's high end and a negative one its low end, so the maximum over
    corners is two matrix products (Quest, arXiv 2406.10774, takes it elementwise).
    """
    above = _product(query.clamp(min=0), _as_float(high))
    return above.baddbmm_(query.clamp(max=0), _as_float(low).transpose(1, 2))


def token_logits(query: torch.Tensor, block: LowRankSketch) -> torch.Tensor:
    """q . k of every token less q . zero, [x, g, r] -> [x, g, S, b], by tokens of a page first.

    Zero points are one addition a page; they are `zero_logits`.
    """
    shape, device = block.codes.transpose(1, 2).shape, block.codes.device  # [x, R, b, r]
    rows = scratch("sketch rows", shape, torch.uint8, device).copy_(block.codes.transpose(1, 2))
    planes = block.page_size // shape[1]
    masked = scratch("sketch codes", shape, torch.uint8, device)
    tokens = scratch("sketch numbers", (shape[0], planes, *shape[1:]), torch.float32, device)
    for plane in range(planes):
        # A code that is left where it lies is too large by a power of two, which the scale undoes.
        shift = 8 // planes * plane
        torch.bitwise_and(rows, (2 ** (8 // planes) - 1) << shift, out=masked)
        scale = block.scale.float().mul_(2.0**-shift).unsqueeze(1)
        tokens[:, plane].copy_(masked).mul_(scale)
    return _product(query, tokens.flatten(1, 3)).unflatten(2, (block.page_size, -1))


def zero_logits(query: torch.Tensor, block: LowRankSketch) -> torch.Tensor:
    """q . zero, [x, g, r] -> [x, g, b]."""
    return torch.bmm(query, block.zero.float().transpose(1, 2))


def low_rank_margin(
    query: torch.Tensor, query_residual: torch.Tensor, block: LowRankSketch
) -> torch.Tensor:
    """How far a token's q . k can lie above its sketch's: [x, g, r], [x, g] -> [x, g, b].

    Scales and zero points are rounded so that no code is clamped (`packing.quantise`): each channel
    is off by half a scale at most. What the directions leave of the key gives at most the product
    of the norms, by Cauchy-Schwarz.

    Example:
        q 2, -1, scales 0.5, 1, residuals 0.1 and 3: 2 * 0.25 + 1 * 0.5 + 0.1 * 3 = 1.3.
    """
    scale, zero = block.scale.float(), block.zero.float()
    # No page has codes beyond 255; the term is tiny, so the number of bits is not asked for.
    off = scale * 0.5 + (zero.abs() + scale * 255) * ROUNDING
    margin = torch.bmm(query.abs(), off.transpose(1, 2))
    # A query that the directions hold wholly needs no residual, be it infinite for unknown.
    known = torch.where(query_residual > 0, query_residual, 0.0).unsqueeze(2)
    return margin + torch.where(known > 0, known * block.residual.unsqueeze(1), 0.0)


def _product(query: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[x, g, w], [x, rows, w] -> [x, g, rows]; valid until the next call."""
    shape = (*query.shape[:2], rows.shape[1])
    return torch.bmm(
        query, rows.transpose(1, 2), out=scratch("sketch logits", shape, query.dtype, query.device)
    )


def _as_float(numbers: torch.Tensor) -> torch.Tensor:
    """float32; valid until the next call."""
    if numbers.dtype == torch.float32:
        return numbers
    return scratch("sketch numbers", numbers.shape, torch.float32, numbers.device).copy_(numbers)

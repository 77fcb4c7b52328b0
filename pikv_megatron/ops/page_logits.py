"""Page logits from each kind of sketch, in plain torch.

Legend: x KV heads of all sequences, g query heads a KV head, b pages of a sequence, S tokens a
page, w width, r directions. Logits are as the queries are scaled; bounds hold for the logits of
exact keys up to float32's rounding.
"""

import torch

from pikv_megatron.ops.packing import unpack
from pikv_megatron.types import LowRankSketch

# Of a channel's largest magnitude: the rounding of up to 256 channels' products in float32.
ROUNDING = 2.0**-16


def mean_key_logits(query: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """[x, g, w] queries, [x, b, w] mean keys -> [x, g, b]."""
    return torch.bmm(query, mean.float().transpose(1, 2))


def box_logits(query: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """The largest logit of any key in the box: [x, g, w], [x, b, w] twice -> [x, g, b].

    A positive q_i takes the box's high end and a negative one its low end, so the maximum over
    corners is two matrix products (Quest, arXiv 2406.10774, takes it elementwise).
    """
    above = torch.bmm(query.clamp(min=0), high.float().transpose(1, 2))
    return above.baddbmm_(query.clamp(max=0), low.float().transpose(1, 2))


def token_logits(query: torch.Tensor, listed: LowRankSketch) -> torch.Tensor:
    """q . k of every token: [x, g, r] -> [x, g, b, S]."""
    codes = unpack(listed.codes, 8 * listed.codes.shape[2] // listed.page_size).float()
    tokens = codes * listed.scale.float().unsqueeze(2) + listed.zero.float().unsqueeze(2)
    logits = torch.bmm(query, tokens.flatten(1, 2).transpose(1, 2))
    return logits.unflatten(2, (listed.codes.shape[1], listed.page_size))


def low_rank_margin(
    query: torch.Tensor, query_residual: torch.Tensor, listed: LowRankSketch
) -> torch.Tensor:
    """How far a token's q . k can lie above its sketch's: [x, g, r], [x, g] -> [x, g, b].

    Scales and zero points are rounded so that no code is clamped (`packing.quantise`): each channel
    is off by half a scale at most. What the directions leave of the key gives at most the product
    of the norms, by Cauchy-Schwarz.

    Example:
        q 2, -1, scales 0.5, 1, residuals 0.1 and 3: 2 * 0.25 + 1 * 0.5 + 0.1 * 3 = 1.3.
    """
    scale, zero = listed.scale.float(), listed.zero.float()
    # No page has codes beyond 255; the term is tiny, so the number of bits is not asked for.
    off = scale * 0.5 + (zero.abs() + scale * 255) * ROUNDING
    margin = torch.bmm(query.abs(), off.transpose(1, 2))
    # A query that the directions hold wholly needs no residual, be it infinite for unknown.
    known = torch.where(query_residual > 0, query_residual, 0.0).unsqueeze(2)
    return margin + torch.where(known > 0, known * listed.residual.unsqueeze(1), 0.0)

"""How much each page matters to a query, from the sketches of the pages, and the best k.

The torch version serves where no kernel does.

Legend: n sequences, np query heads, ng KV heads, g = np / ng, p rows of the sketch, m pages listed
for a sequence, S tokens a page, w width of the sketch (its directions for a low-rank one).
"""

from typing import Literal

import torch

from pikv_megatron.ops.backend import kernel_op
from pikv_megatron.ops.page_logits import (
    box_logits,
    low_rank_margin,
    mean_key_logits,
    token_logits,
)
from pikv_megatron.types import (
    BoundingBoxSketch,
    LowRankSketch,
    MeanKeySketch,
    PageScores,
    PageSketch,
)


@torch.no_grad()
def score_pages(
    query: torch.Tensor,
    sketch: PageSketch,
    table: torch.Tensor,
    lens: torch.Tensor,
    k: int,
    softmax_scale: float,
    statistic: Literal["mass", "best"],
    query_residual: torch.Tensor | None = None,
    bound: bool = False,
) -> PageScores:
    """Estimate the attention of a query to each page and choose the k pages with the most.

    A page's logit is the log-sum-exp of its tokens' logits ("mass", for diffuse attention) or the
    largest of them ("best", for retrieval). Mean keys estimate every token's logit by one;
    bounding boxes bound the largest (Quest, arXiv 2406.10774); low-rank sketches give each token's
    own (Loki, arXiv 2406.02542). The score is the mean over heads of the softmax of logits.

    Args:
        query: [n, np, w], any floating dtype; projected as the keys were for a low-rank sketch.
        sketch: of every page of the pool.
        table: [n, m], int64, rows of `sketch`; any where `lens` is 0.
        lens: [n, m], int32, tokens of the page, its first ones; 0: not listed. Mean keys and boxes
            use it for the mass only.
        k: pages to choose; 0 chooses none, and ranks none.
        softmax_scale: factor on the logits, positive.
        statistic: "mass" or "best".
        query_residual: [n, np], the norm of what the r directions leave of the query.
        bound: make `logit` an upper bound on the statistic of the exact keys (those that were
            sketched), up to float32's rounding.

    Raises:
        ValueError: an argument is out of range, or there is no such bound.

    Example:
        Mean keys 1, 2, 3 of one channel, q = 1, scale 1, "best", lens 4, 0, 4: logits 1, -inf, 3,
        scores 0.12, 0, 0.88; k = 1 chooses column 2.
    """
    _check(sketch, k, softmax_scale, statistic, query_residual, bound)
    kernel = kernel_op("score_pages", query)
    if kernel is not None:
        return PageScores(*kernel(
            query, sketch, table, lens, k, softmax_scale, statistic, query_residual, bound
        ))
    is_listed = lens > 0
    rows = torch.where(is_listed, table, 0)
    listed = sketch._replace(**{
        name: x[:, rows].flatten(0, 1)
        for name, x in sketch._asdict().items() if isinstance(x, torch.Tensor)
    })  # [ng * n, m, ...]
    num_groups = sketch[0].shape[0]
    residual = None
    if bound and query_residual is not None:
        residual = _by_group(query_residual, num_groups, softmax_scale)
    logit = _logits(
        _by_group(query, num_groups, softmax_scale), residual, listed, lens, statistic, num_groups
    )  # [ng, n, g, m]
    logit = logit.transpose(0, 1).flatten(1, 2).masked_fill(~is_listed.unsqueeze(1), -torch.inf)
    score = torch.softmax(logit, dim=2).mean(dim=1).masked_fill(~is_listed, 0.0)
    return PageScores(logit, score, _choose(score, is_listed, k) if k else _none(score))


def _check(sketch, k, softmax_scale, statistic, query_residual, bound) -> None:
    if k < 0:
        raise ValueError(f"k is {k}: choose 0 pages or more")
    if not softmax_scale > 0:
        raise ValueError(f"softmax_scale is {softmax_scale}: it must be positive")
    if statistic not in ("mass", "best"):
        raise ValueError(f'statistic is {statistic!r}: it must be "mass" or "best"')
    if bound and isinstance(sketch, MeanKeySketch):
        raise ValueError(
            "bound is True for mean keys, which bound nothing: use a bounding box or low-rank "
            "sketch, or bound=False"
        )
    if bound and isinstance(sketch, LowRankSketch) and query_residual is None:
        raise ValueError(
            "query_residual is None: the bound of a low-rank sketch needs the norm of what the "
            "directions leave of each query, zeros where they leave nothing"
        )


def _by_group(x: torch.Tensor, num_groups: int, softmax_scale: float) -> torch.Tensor:
    """[n, np, ...] -> [ng * n, g, ...], float32, scaled."""
    by_group = (x.float() * softmax_scale).unflatten(1, (num_groups, -1))
    return by_group.transpose(0, 1).flatten(0, 1)


def _logits(
    query: torch.Tensor, residual: torch.Tensor | None, listed: PageSketch, lens: torch.Tensor,
    statistic: str, num_groups: int,
) -> torch.Tensor:
    """Statistic of the listed pages: query [ng * n, g, w] -> [ng, n, g, m]."""
    shape = num_groups, len(lens)
    if isinstance(listed, LowRankSketch):
        tokens = token_logits(query, listed).unflatten(0, shape)
        logit = _reduce_tokens(tokens, lens, statistic)
        if residual is not None:
            logit += low_rank_margin(query, residual, listed).unflatten(0, shape)
        return logit
    if isinstance(listed, BoundingBoxSketch):
        logit = box_logits(query, listed.low, listed.high)
    else:
        logit = mean_key_logits(query, listed.mean)
    logit = logit.unflatten(0, shape)
    return logit + lens.log().unsqueeze(1) if statistic == "mass" else logit


def _reduce_tokens(logits: torch.Tensor, lens: torch.Tensor, statistic: str) -> torch.Tensor:
    """[ng, n, g, m, S] -> [ng, n, g, m] over the first `lens` [n, m] tokens."""
    token = torch.arange(logits.shape[4], device=lens.device)
    hidden = (token >= lens.unsqueeze(2)).unsqueeze(1)
    logits = logits.masked_fill(hidden, -torch.inf)
    return logits.amax(dim=4) if statistic == "best" else logits.logsumexp(dim=4)


def _choose(score: torch.Tensor, is_listed: torch.Tensor, k: int) -> torch.Tensor:
    """Columns of the k best listed pages, rising, lower columns first among equals; -1 behind."""
    n, m = score.shape
    # Bits of floats that are not negative rise with them; the column makes every key unique.
    column = torch.arange(m, device=score.device)
    key = (score.view(torch.int32).long() << 32) | (m - 1 - column)
    key.masked_fill_(~is_listed, -1)
    best = key.topk(min(k, m), dim=1, sorted=False).values
    chosen = torch.where(best < 0, m, m - 1 - (best & 0xFFFFFFFF)).sort(dim=1).values
    padded = chosen.new_full((n, k), -1)
    padded[:, : chosen.shape[1]] = chosen.masked_fill(chosen == m, -1)
    return padded


def _none(score: torch.Tensor) -> torch.Tensor:
    return score.new_empty(len(score), 0, dtype=torch.int64)

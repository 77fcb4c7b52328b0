"""How much each page matters to a query, from the sketches of the pages, and the best k.

Legend: n sequences, np query heads, ng KV heads, g = np / ng, p rows of the sketch, m pages listed
for a sequence, S tokens a page, w width of the sketch (r directions for a low-rank one).
"""

from typing import Literal

import torch

from pikv_megatron.ops.backend import triton_op
from pikv_megatron.ops.page_logits import (
    box_logits,
    low_rank_margin,
    mean_key_logits,
    token_logits,
    zero_logits,
)
from pikv_megatron.ops.workspace import scratch
from pikv_megatron.types import (
    BoundingBoxSketch,
    LowRankSketch,
    MeanKeySketch,
    PageScores,
    PageSketch,
)

# Sketches are gathered and unpacked through a reused block.
BLOCK_BYTES = 4 << 20


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
        k: pages to choose, at least 1.
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
    kernel = triton_op("score_pages", query)
    if kernel is not None:
        return PageScores(*kernel(
            query, sketch, table, lens, k, softmax_scale, statistic, query_residual, bound
        ))
    logit = _logits(query, sketch, table, lens, softmax_scale, statistic, query_residual, bound)
    is_listed = lens > 0
    not_listed = ~is_listed
    logit.masked_fill_(not_listed.unsqueeze(1), -torch.inf)
    share = scratch("page shares", logit.shape, logit.dtype, logit.device)
    score = torch.softmax(logit, dim=2, out=share).mean(dim=1).masked_fill_(not_listed, 0.0)
    return PageScores(logit, score, _choose(score, is_listed, k))


def _check(sketch, k, softmax_scale, statistic, query_residual, bound) -> None:
    if k < 1:
        raise ValueError(f"k is {k}: choose at least one page")
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


def _logits(
    query, sketch, table, lens, softmax_scale, statistic, query_residual, bound
) -> torch.Tensor:
    """[n, np, m], float32; columns that are not listed hold anything."""
    n, num_heads, _ = query.shape
    num_columns = table.shape[1]
    parts = {name: t for name, t in sketch._asdict().items() if isinstance(t, torch.Tensor)}
    num_groups = next(iter(parts.values())).shape[0]
    group = num_heads // num_groups
    logit = query.new_empty(n, num_groups, group, num_columns, dtype=torch.float32)
    queries = (query.float() * softmax_scale).unflatten(1, (num_groups, group))
    residuals = None
    if bound and query_residual is not None:
        residuals = (query_residual.float() * softmax_scale).unflatten(1, (num_groups, group))
    step = _block_columns(sketch)
    table = torch.where(lens > 0, table, 0)
    for row in range(n):
        for first in range(0, num_columns, step):
            columns = slice(first, first + step)
            pages = _as_slice(table[row, columns])
            block = sketch._replace(**{name: _take(t, pages) for name, t in parts.items()})
            logit[row, :, :, columns] = _block_logits(
                queries[row], None if residuals is None else residuals[row], block,
                lens[row, columns], statistic,
            )
    return logit.flatten(1, 2)


def _block_logits(query, residual, block, lens, statistic) -> torch.Tensor:
    """Statistic of the pages of a block: query [ng, g, w], lens [b] -> [ng, g, b]."""
    if isinstance(block, LowRankSketch):
        logit = _reduce_tokens(token_logits(query, block), lens, statistic)
        logit += zero_logits(query, block)
        return logit if residual is None else logit + low_rank_margin(query, residual, block)
    if isinstance(block, BoundingBoxSketch):
        logit = box_logits(query, block.low, block.high)
    else:
        logit = mean_key_logits(query, block.mean)
    return logit.add_(lens.log()) if statistic == "mass" else logit


def _reduce_tokens(logits: torch.Tensor, lens: torch.Tensor, statistic: str) -> torch.Tensor:
    """[ng, g, S, b] -> [ng, g, b] over the first `lens` tokens; anything where there is none."""
    is_hidden = torch.arange(logits.shape[2], device=lens.device).unsqueeze(1) >= lens
    logits.masked_fill_(is_hidden, -torch.inf)
    best = logits.amax(dim=2)
    if statistic == "best":
        return best
    return logits.sub_(best.unsqueeze(2)).exp_().sum(dim=2).log_().add_(best)


def _block_columns(sketch: PageSketch) -> int:
    """Pages whose sketches, as float32, fill a block."""
    rows, width = sketch.page_size if isinstance(sketch, LowRankSketch) else 1, sketch[0].shape[-1]
    return max(16, BLOCK_BYTES // (sketch[0].shape[0] * rows * width * 4))


def _as_slice(pages: torch.Tensor) -> torch.Tensor | slice:
    """The slice that names the same pages, on a CPU, where they lie one behind the other."""
    if pages.is_cpu:
        first, last = int(pages[0]), int(pages[-1])
        if last - first == pages.numel() - 1:
            if torch.equal(pages, torch.arange(first, last + 1)):
                return slice(first, last + 1)
    return pages


def _take(field: torch.Tensor, pages: torch.Tensor | slice) -> torch.Tensor:
    """field[:, pages], in place for a slice."""
    return field[:, pages] if isinstance(pages, slice) else field.index_select(1, pages)


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

"""How much each page matters to a query, from the sketches of the pages, and the best k.

Legend: n sequences, np query heads, ng KV heads, g = np / ng, p rows of the sketch, m pages listed
for a sequence, S tokens a page, w width of the sketch (its directions for a low-rank one),
r sequences and b columns of a block.
"""

from typing import Literal, NamedTuple

import torch

from pikv_megatron.ops.backend import triton_op
from pikv_megatron.ops.listed_rows import run_of, table_blocks, take_rows
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


class _Block(NamedTuple):
    """A part of a table.

    Attributes:
        rows: r sequences.
        columns: b of them.
        pages: rows of the sketch, [r * b] or a slice.
        lens: [r, b], int32.
        log_lens: [r, 1, b], float32.
    """

    rows: slice
    columns: slice
    pages: torch.Tensor | slice
    lens: torch.Tensor
    log_lens: torch.Tensor


class _Listing(NamedTuple):
    """What a table lists.

    Attributes:
        hidden: [n, m], bool, True where nothing is listed; None where everything is.
        blocks: its parts.
    """

    hidden: torch.Tensor | None
    blocks: list[_Block]


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
    notes: dict | None = None,
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
        notes: what a CPU found out about `table` and `lens`, so that calls with the same ones need
            not look again.

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
    listed = _listing(sketch, table, lens, {} if notes is None else notes)
    logit = _logits(
        query, sketch, table.shape[1], listed, softmax_scale, statistic, query_residual, bound
    )
    if listed.hidden is not None:
        logit.masked_fill_(listed.hidden.unsqueeze(1), -torch.inf)
    share = scratch("page shares", logit.shape, logit.dtype, logit.device)
    score = torch.softmax(logit, dim=2, out=share).mean(dim=1)
    if listed.hidden is not None:
        score.masked_fill_(listed.hidden, 0.0)
    return PageScores(logit, score, _choose(score, lens > 0, k) if k else _none(score))


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


def _listing(
    sketch: PageSketch, table: torch.Tensor, lens: torch.Tensor, notes: dict
) -> _Listing:
    """What a table lists, from the notes where it was found before."""
    page_bytes = _page_bytes(sketch)
    if page_bytes not in notes:
        hidden = lens == 0
        rows = torch.where(hidden, 0, table)
        notes[page_bytes] = _Listing(
            None if hidden.is_cpu and not hidden.any() else hidden,
            [
                _Block(part, columns, run_of(rows[part, columns]), lens[part, columns],
                       lens[part, columns].log().unsqueeze(1))
                for part, columns in table_blocks(*table.shape, page_bytes, BLOCK_BYTES)
            ],
        )
    return notes[page_bytes]


def _logits(
    query, sketch, num_columns, listed, softmax_scale, statistic, query_residual, bound
) -> torch.Tensor:
    """[n, np, m], float32; columns that are not listed hold anything."""
    n, num_heads, _ = query.shape
    parts = {name: t for name, t in sketch._asdict().items() if isinstance(t, torch.Tensor)}
    num_groups = next(iter(parts.values())).shape[0]
    logit = query.new_empty(n, num_heads, num_columns, dtype=torch.float32)
    by_group = logit.unflatten(1, (num_groups, -1)).transpose(0, 1)  # [ng, n, g, m]
    queries = _by_group(query, num_groups, softmax_scale)
    residuals = None
    if bound and query_residual is not None:
        residuals = _by_group(query_residual, num_groups, softmax_scale)
    for block in listed.blocks:
        rows = block.rows
        gathered = sketch._replace(**{
            name: take_rows(f"listed {name}", t, block.pages, len(block.lens))
            for name, t in parts.items()
        })
        by_group[:, rows, :, block.columns] = _block_logits(
            queries[:, rows].flatten(0, 1),
            None if residuals is None else residuals[:, rows].flatten(0, 1),
            gathered, block, statistic,
        )
    return logit


def _by_group(x: torch.Tensor, num_groups: int, softmax_scale: float) -> torch.Tensor:
    """[n, np, ...] -> [ng, n, g, ...], float32, scaled."""
    return (x.float() * softmax_scale).unflatten(1, (num_groups, -1)).transpose(0, 1)


def _block_logits(query, residual, sketch, block: _Block, statistic) -> torch.Tensor:
    """Statistic of the pages of a block: query [x, g, w], x = ng * r -> [ng, r, g, b]."""
    shape = (-1, len(block.lens))
    if isinstance(sketch, LowRankSketch):
        tokens = token_logits(query, sketch).unflatten(0, shape)
        logit = _reduce_tokens(tokens, block.lens, statistic)
        logit += zero_logits(query, sketch).unflatten(0, shape)
        if residual is None:
            return logit
        return logit.add_(low_rank_margin(query, residual, sketch).unflatten(0, shape))
    if isinstance(sketch, BoundingBoxSketch):
        logit = box_logits(query, sketch.low, sketch.high)
    else:
        logit = mean_key_logits(query, sketch.mean)
    logit = logit.unflatten(0, shape)
    return logit.add_(block.log_lens) if statistic == "mass" else logit


def _reduce_tokens(logits: torch.Tensor, lens: torch.Tensor, statistic: str) -> torch.Tensor:
    """[ng, r, g, S, b] -> [ng, r, g, b] over the first `lens` [r, b] tokens; anything where there
    is none."""
    token = torch.arange(logits.shape[3], device=lens.device).unsqueeze(1)
    logits.masked_fill_((token >= lens.unsqueeze(1)).unsqueeze(1), -torch.inf)
    best = logits.amax(dim=3)
    if statistic == "best":
        return best
    return logits.sub_(best.unsqueeze(3)).exp_().sum(dim=3).log_().add_(best)


def _page_bytes(sketch: PageSketch) -> int:
    """Of a page's sketch of all KV heads, as float32."""
    rows, width = sketch.page_size if isinstance(sketch, LowRankSketch) else 1, sketch[0].shape[-1]
    return sketch[0].shape[0] * rows * width * 4


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

"""How much each page matters to a query: logits, scores and the best k in four launches.

Legend: n sequences, np query heads, ng KV heads, g = np / ng, m pages listed, M pages of a tile, S
tokens a page. A tensor reaches a kernel as a pair: its pointer and its strides.
"""

import torch
import triton
import triton.language as tl

from pikv_kernels.make_sketch import BOX, LOW_RANK, MEAN, pair
from pikv_kernels.page_logits import low_rank_logits, page_logits
from pikv_kernels.select_topk import select_topk

TILE_TOKENS = 64
BLOCK_COLUMNS = 1024


@triton.jit
def _logits(
    query, first, second, third, norms, query_norms, table, lens, logit, num_columns, num_groups,
    group, width, page_size, softmax_scale, KIND: tl.constexpr, MASS: tl.constexpr,
    BOUND: tl.constexpr, PLANES: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr,
    BLOCK_R: tl.constexpr, W: tl.constexpr, G: tl.constexpr,
):
    """Program (i, j): block i of the pages of sequence j // ng, KV head j % ng.

    Example:
        ng 2, m 100, M 32: programs (0..3, 0..2 n - 1); (3, 1) has pages 96 to 99 of sequence 0,
        query heads g to 2 g - 1.
    """
    column = tl.program_id(0) * M + tl.arange(0, M)
    row = (tl.program_id(1) // num_groups).to(tl.int64)
    kv_head = (tl.program_id(1) % num_groups).to(tl.int64)
    is_head = tl.arange(0, G) < group
    head = kv_head * group + tl.arange(0, G)
    is_column = column < num_columns
    length = tl.load(lens[0] + row * lens[1][0] + column * lens[1][1], mask=is_column, other=0)
    is_page = length > 0
    page = tl.load(table[0] + row * table[1][0] + column * table[1][1], mask=is_page, other=0)
    if KIND == LOW_RANK:
        total = low_rank_logits(
            query, first, second, third, norms, query_norms, row, head, is_head, kv_head, page,
            length, width, page_size, softmax_scale, MASS, BOUND, PLANES, M, BLOCK_R, W, G,
        )
    else:
        total = softmax_scale * page_logits(
            query, first, second, row, head, is_head, kv_head, page, is_page, width, KIND,
            PRECISION, M, W, G,
        )
        if MASS:
            total += tl.log(tl.maximum(length, 1).to(tl.float32))[:, None]
    total = tl.where(is_page[:, None], total, float("-inf"))
    place = logit + (row * num_groups * group + head)[None, :] * num_columns + column[:, None]
    tl.store(place, total, mask=is_column[:, None] & is_head[None, :])


@triton.jit
def _normalisers(logit, lse, num_columns, BLOCK: tl.constexpr):
    """Program i: log-sum-exp of row i; 0 where nothing is listed, so that it can be subtracted."""
    row = tl.program_id(0).to(tl.int64)
    best = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    for first in range(0, num_columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(logit + row * num_columns + column, mask=column < num_columns,
                    other=float("-inf"))
        best = tl.maximum(best, x)
    top = tl.max(best, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, num_columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(logit + row * num_columns + column, mask=column < num_columns,
                    other=float("-inf"))
        total += tl.exp(x - top)
    mass = tl.sum(total, 0)
    tl.store(lse + row, tl.where(mass > 0, top + tl.log(tl.where(mass > 0, mass, 1.0)), 0.0))


@triton.jit
def _scores(logit, lse, score, num_columns, num_heads, BLOCK: tl.constexpr):
    """Program (i, j): block i of the columns of sequence j, mean over heads of exp(logit - lse).

    Example:
        Two heads give a page 0.2 and 0.6 of their mass: score 0.4.
    """
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    is_column = column < num_columns
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for head in range(num_heads):
        line = row * num_heads + head
        x = tl.load(logit + line * num_columns + column, mask=is_column, other=float("-inf"))
        total += tl.exp(x - tl.load(lse + line))
    tl.store(score + row * num_columns + column, total / num_heads, mask=is_column)


def score_pages(
    query: torch.Tensor,
    sketch: tuple,
    table: torch.Tensor,
    lens: torch.Tensor,
    k: int,
    softmax_scale: float,
    statistic: str,
    query_residual: torch.Tensor | None = None,
    bound: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `pikv_megatron.ops.score_pages.score_pages`, for arguments that it has checked.

    Returns:
        logit, score and chosen of `PageScores`.
    """
    n, num_heads, width = query.shape
    m = table.shape[1]
    logit = query.new_empty(n, num_heads, m, dtype=torch.float32)
    score = query.new_empty(n, m, dtype=torch.float32)
    if n and m:
        _launch_logits(
            query, sketch, table, lens, logit, softmax_scale, statistic, query_residual, bound
        )
        lse = query.new_empty(n, num_heads, dtype=torch.float32)
        block = min(BLOCK_COLUMNS, triton.next_power_of_2(m))
        _normalisers[(n * num_heads,)](logit, lse, m, BLOCK=block)
        _scores[(triton.cdiv(m, block), n)](logit, lse, score, m, num_heads, BLOCK=block)
    return logit, score, select_topk(score, lens, k)


def _launch_logits(
    query, sketch, table, lens, logit, softmax_scale, statistic, query_residual, bound
) -> None:
    n, num_heads, width = query.shape
    num_groups = sketch[0].shape[0]
    group = num_heads // num_groups
    kind, parts, page_size, planes = MEAN, sketch[:1], 1, 1
    if hasattr(sketch, "low"):
        kind, parts = BOX, sketch[:2]
    elif hasattr(sketch, "codes"):
        kind, parts, page_size = LOW_RANK, sketch[:4], sketch.page_size
        planes = page_size // sketch.codes.shape[2]
    pairs = [pair(part) for part in parts] + [None] * (4 - len(parts))
    block_r = triton.next_power_of_2(page_size // planes)
    pages = max(1, TILE_TOKENS // block_r)
    # TF32 holds every bfloat16 and float16 number, so their products are exact.
    is_half = query.dtype.itemsize == 2 and sketch[0].dtype.itemsize == 2
    _logits[(triton.cdiv(table.shape[1], pages), n * num_groups)](
        pair(query), *pairs, pair(query_residual), pair(table), pair(lens), logit, table.shape[1],
        num_groups, group, width, page_size, softmax_scale, KIND=kind.value,
        MASS=statistic == "mass", BOUND=bound, PLANES=planes,
        PRECISION="tf32" if is_half else "ieee", M=pages, BLOCK_R=block_r,
        W=min(64, max(16, triton.next_power_of_2(width))),
        G=max(16, triton.next_power_of_2(group)),
    )

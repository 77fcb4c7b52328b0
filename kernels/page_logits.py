"""Page logits from each kind of sketch, in registers.

Legend: np query heads, ng KV heads, g = np / ng, S tokens a page, P tokens a byte, R = S / P
byte rows, w width. A tensor reaches a kernel as a pair: its pointer and its strides. Tiles have M
pages, T = M * BLOCK_R tokens, W channels and G >= g heads.
"""

import triton
import triton.language as tl

from pikv_kernels.make_sketch import BOX

# As in `pikv_megatron.ops.page_logits`: the rounding of up to 256 products.
ROUNDING: tl.constexpr = tl.constexpr(2.0**-16)


@triton.jit
def _load_query(query, row, head, is_head, channel, width):
    """[W, G], float32, 0 outside."""
    start = query[0] + row * query[1][0] + head * query[1][1]
    mask = (channel < width)[:, None] & is_head[None, :]
    q = tl.load(start[None, :] + channel[:, None] * query[1][2], mask=mask, other=0.0)
    return q.to(tl.float32)


@triton.jit
def _load_rows(x, kv_head, page, is_page, channel, width):
    """Rows `page` of x [ng, p, width], float32 [M, W], 0 outside."""
    start = x[0] + kv_head * x[1][0] + page * x[1][1]
    mask = is_page[:, None] & (channel < width)[None, :]
    return tl.load(start[:, None] + channel[None, :] * x[1][2], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def page_logits(
    query, first, second, row, head, is_head, kv_head, page, is_page, width, KIND: tl.constexpr,
    PRECISION: tl.constexpr, M: tl.constexpr, W: tl.constexpr, G: tl.constexpr,
):
    """[M, G] logits of mean keys, or the largest of boxes.

    Example:
        q 2, -1; box 0..3, 1..4: 2 * 3 - 1 * 1 = 5.
    """
    total = tl.zeros((M, G), dtype=tl.float32)
    for start in range(0, width, W):
        channel = start + tl.arange(0, W)
        q = _load_query(query, row, head, is_head, channel, width)
        rows = _load_rows(first, kv_head, page, is_page, channel, width)
        if KIND == BOX:
            high = _load_rows(second, kv_head, page, is_page, channel, width)
            total = tl.dot(high, tl.maximum(q, 0.0), total, input_precision=PRECISION)
            q = tl.minimum(q, 0.0)
        total = tl.dot(rows, q, total, input_precision=PRECISION)
    return total


@triton.jit
def _token_logits(
    query, codes, scales, zeros, row, head, is_head, kv_head, page, byte_row, is_token, shift,
    width, BOUND: tl.constexpr, BITS: tl.constexpr, T: tl.constexpr, W: tl.constexpr,
    G: tl.constexpr,
):
    """[T, G] logits of one plane of packed tokens, or upper bounds on them.

    Example:
        Byte 99 = 3 + 0 * 4 + 2 * 16 + 1 * 64, BITS 2, shift 4, scale 0.5, zero -1, q 3: the token's
        key is 2 * 0.5 - 1 = 0, its logit 0, and with half a scale of doubt 3 * 0.25 = 0.75 at most.
    """
    total = tl.zeros((T, G), dtype=tl.float32)
    for start in range(0, width, W):
        channel = start + tl.arange(0, W)
        q = _load_query(query, row, head, is_head, channel, width)
        scale = _load_rows(scales, kv_head, page, is_token, channel, width)
        zero = _load_rows(zeros, kv_head, page, is_token, channel, width)
        place = codes[0] + kv_head * codes[1][0] + page * codes[1][1] + byte_row * codes[1][2]
        mask = is_token[:, None] & (channel < width)[None, :]
        packed = tl.load(place[:, None] + channel[None, :] * codes[1][3], mask=mask, other=0)
        code = (packed.to(tl.int32) >> shift) & (2**BITS - 1)
        total = tl.dot(code.to(tl.float32) * scale + zero, q, total, input_precision="ieee")
        if BOUND:
            off = scale * 0.5 + (tl.abs(zero) + scale * 255.0) * ROUNDING
            total = tl.dot(off, tl.abs(q), total, input_precision="ieee")
    return total


@triton.jit
def low_rank_logits(
    query, codes, scales, zeros, norms, query_norms, row, head, is_head, kv_head, page, length,
    width, page_size, softmax_scale, MASS: tl.constexpr, BOUND: tl.constexpr, PLANES: tl.constexpr,
    M: tl.constexpr, BLOCK_R: tl.constexpr, W: tl.constexpr, G: tl.constexpr,
):
    """[M, G], scaled: log-sum-exp or maximum over a page's first `length` tokens, plane by plane.

    Example:
        Planes of one token each with logits 1, 3, length 2: maximum 3; mass 3 + log(1 + e^-2).
    """
    T: tl.constexpr = M * BLOCK_R
    num_rows = page_size // PLANES
    byte_row = tl.arange(0, T) % BLOCK_R
    token_page = tl.reshape(tl.broadcast_to(page[:, None], (M, BLOCK_R)), (T,))
    token_length = tl.reshape(tl.broadcast_to(length[:, None], (M, BLOCK_R)), (T,))
    best = tl.full((M, G), float("-inf"), dtype=tl.float32)
    total = tl.zeros((M, G), dtype=tl.float32)
    for plane in tl.static_range(PLANES):
        is_token = (byte_row < num_rows) & (byte_row + plane * num_rows < token_length)
        logit = softmax_scale * _token_logits(
            query, codes, scales, zeros, row, head, is_head, kv_head, token_page, byte_row,
            is_token, plane * (8 // PLANES), width, BOUND, 8 // PLANES, T, W, G,
        )
        logit = tl.where(is_token[:, None], logit, float("-inf"))
        logit = tl.reshape(logit, (M, BLOCK_R, G))
        new_best = tl.maximum(best, tl.max(logit, 1))
        if MASS:
            # -inf less -inf would be NaN; any finite number does while nothing is counted.
            finite = tl.where(new_best == float("-inf"), 0.0, new_best)
            part = tl.sum(tl.exp(logit - finite[:, None, :]), 1)
            total = total * tl.exp(best - finite) + part
        best = new_best
    if MASS:
        best += tl.log(tl.where(total > 0, total, 1.0))
    if BOUND:
        best += softmax_scale * _residuals(norms, query_norms, row, head, is_head, kv_head, page,
                                           length > 0)
    return best


@triton.jit
def _residuals(norms, query_norms, row, head, is_head, kv_head, page, is_page):
    """[M, G], product of the norms that the directions leave; 0 where they leave no query."""
    left = tl.load(query_norms[0] + row * query_norms[1][0] + head * query_norms[1][1],
                   mask=is_head, other=0.0).to(tl.float32)[None, :]
    norm = tl.load(norms[0] + kv_head * norms[1][0] + page * norms[1][1], mask=is_page, other=0.0)
    return tl.where(left > 0, left * norm[:, None], 0.0)

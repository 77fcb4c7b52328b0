"""One split of paged attention: an online softmax over some pages of one sequence.

Legend: n sequences, sq query tokens, np query heads, ng KV heads, g = np / ng, m pages listed for a
sequence, S tokens a page, P planes, ROWS = S / P, r_k and r_v stored widths. P is the most tokens
that a stored row of keys or of values has; one with fewer takes several loads.
"""

import triton
import triton.language as tl

from pikv_kernels.page_tiles import (
    key_numbers,
    load_high,
    load_rows,
    partner_of,
    plane_numbers,
    scale_values,
    turn_keys,
)

# Columns that are looked at together for the first and the last page of a sequence.
SCAN: tl.constexpr = tl.constexpr(512)


@triton.jit
def attend_split(
    query, keys, values, key_scale, key_zero, value_scale, value_zero, log_multiplicity,
    table, lens, token_mask, logit_bias, turn_position, turn_rows, turn_angles, part_out, part_lse,
    page_lse, key_strides, value_strides, key_scale_strides, key_zero_strides, value_scale_strides,
    value_zero_strides,
    num_sequences, num_queries, num_groups, m, num_row_blocks, pages_per_split, first_split,
    softmax_scale, num_far,
    GROUP: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, PAGE_SIZE: tl.constexpr, KEY_GROUPS: tl.constexpr,
    VALUE_GROUPS: tl.constexpr, KEY_FORMAT: tl.constexpr, VALUE_FORMAT: tl.constexpr,
    KEY_LOADS: tl.constexpr, VALUE_LOADS: tl.constexpr, TILE_PAGES: tl.constexpr,
    TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, IS_SHARED: tl.constexpr, TURNED: tl.constexpr,
):
    """One split of the pages of one sequence, for a block of the rows of one KV head.

    A tile has BLOCK_N lanes: TILE_PAGES small pages side by side, or one of the TILES tiles of a
    large page. A lane is a token in each plane. So pages begin and end with tiles, and a page's
    log-sum-exp is a reduction of the tile over its last dimension. Every product accumulates in
    float32, and its sum over tiles in a float32 accumulator, so that digits do not run out in long
    contexts.

    Where values are the first columns of the keys, `values` are the keys: a tile of their first
    VALUE_WIDTH columns serves both products, and `keys` are read behind them only.

    Keys that are stored before RoPE (TURNED channels of them turn) are loaded a second time, each
    channel's partner in its place, and turned in registers.

    Example:
        S = ROWS = 3, BLOCK_N = 16: a page takes 4 lanes, the last one empty, and TILE_PAGES = 4.
        Lane 9 is row 9 % 4 = 1 of the tile's page 9 // 4 = 2. With g = 4 and sq = 2, row 6 of the
        block is query token 6 // 4 = 1 and head 6 % 4 = 2 of the group.

        Keys of 4 bits, values of 2, S = 16: P = 4, ROWS = 4. Row 1 of values has the tokens 1, 5,
        9, 13; of keys, row 1 has 1 and 9, row 5 has 5 and 13: KEY_LOADS = 2, VALUE_LOADS = 1.

    Args:
        query: [n, sq, np, r_k].
        part_out: [splits of all lists, n, sq, np, r_v], float32; this list begins at `first_split`.
        part_lse: [splits of all lists, n, sq, np], float32.
        page_lse: [n, sq, np, m], float32, the log-sum-exp of each page; None: not asked for.
    """
    head = tl.program_id(0) // num_row_blocks % num_groups
    sequence = (tl.program_id(0) // num_row_blocks // num_groups).to(tl.int64)
    row = tl.program_id(0) % num_row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = row < num_queries * GROUP
    # The row's place in [n, sq, np].
    place = (sequence * num_queries + row // GROUP) * (num_groups * GROUP)
    place = place + head * GROUP + row % GROUP
    FIRST: tl.constexpr = VALUE_WIDTH if IS_SHARED else 0
    HAS_KEYS: tl.constexpr = KEY_WIDTH > FIRST
    key_channel = FIRST + tl.arange(0, BLOCK_K)
    value_channel = tl.arange(0, BLOCK_V)
    if turn_angles is not None:
        partner = partner_of(key_channel, TURNED)
    if IS_SHARED:
        shared_rows = tl.load(
            query + place[:, None] * KEY_WIDTH + value_channel[None, :],
            mask=is_row[:, None] & (value_channel < VALUE_WIDTH)[None, :], other=0.0,
        )
    rows = tl.load(
        query + place[:, None] * KEY_WIDTH + key_channel[None, :],
        mask=is_row[:, None] & (key_channel < KEY_WIDTH)[None, :], other=0.0,
    )
    if logit_bias is not None:
        bias = tl.load(logit_bias + place, mask=is_row, other=0.0)
    keys += head.to(tl.int64) * key_strides[0]
    values += head.to(tl.int64) * value_strides[0]
    if key_scale is not None:
        key_scale += head.to(tl.int64) * key_scale_strides[0]
    if key_zero is not None:
        key_zero += head.to(tl.int64) * key_zero_strides[0]
    if value_scale is not None:
        value_scale += head.to(tl.int64) * value_scale_strides[0]
    if value_zero is not None:
        value_zero += head.to(tl.int64) * value_zero_strides[0]

    LANES: tl.constexpr = BLOCK_N // TILE_PAGES
    lane = tl.arange(0, BLOCK_N)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.full([BLOCK_M], 0.0, tl.float32)
    acc = tl.full([BLOCK_M, BLOCK_V], 0.0, tl.float32)
    start = tl.program_id(1) * pages_per_split
    limit = tl.minimum(start + pages_per_split, m)
    # What lies before the sequence's own first page and behind its last one is not gone through: of
    # pages of two ages, a list reads older columns, and another one newer ones.
    stop, begin = start, limit
    for first in range(start, limit, SCAN):
        column = first + tl.arange(0, SCAN)
        length = tl.load(lens + sequence * m + column, mask=column < limit, other=0)
        stop = tl.maximum(stop, tl.max(tl.where(length > 0, column + 1, 0), 0))
        begin = tl.minimum(begin, tl.min(tl.where(length > 0, column, limit), 0))
    begin = tl.minimum(begin, stop)
    for first in range(begin, stop, TILE_PAGES):
        column = first + lane // LANES
        listed = sequence * m + column
        length = tl.load(lens + listed, mask=column < stop, other=0)
        page = tl.load(table + listed, mask=length > 0, other=0)
        if turn_rows is not None:
            turn_row = tl.load(turn_rows + listed, mask=length > 0, other=0)
        page_top = tl.full([BLOCK_M, TILE_PAGES], -float("inf"), tl.float32)
        page_total = tl.full([BLOCK_M, TILE_PAGES], 0.0, tl.float32)
        for tile in range(TILES):
            row_in_page = tile * BLOCK_N + lane % LANES
            # The first plane has the lane's first token: beyond `length`, no plane is read.
            is_lane = (row_in_page < ROWS) & (row_in_page < length)
            stored_k = load_rows(
                keys, page, row_in_page, is_lane, key_channel, key_strides, KEY_WIDTH
            )
            high_k = load_high(
                keys, page, row_in_page, is_lane, key_channel, key_strides, KEY_WIDTH, ROWS,
                KEY_FORMAT,
            )
            stored_v = load_rows(
                values, page, row_in_page, is_lane, value_channel, value_strides, VALUE_WIDTH
            )
            high_v = load_high(
                values, page, row_in_page, is_lane, value_channel, value_strides, VALUE_WIDTH,
                ROWS, VALUE_FORMAT,
            )
            for plane in tl.static_range(PAGE_SIZE // ROWS):
                token = row_in_page + plane * ROWS
                is_read = is_lane & (token < length)
                if token_mask is not None:
                    shown = tl.load(
                        token_mask + listed * PAGE_SIZE + token, mask=is_read, other=0
                    )
                    is_read = is_read & (shown != 0)
                if KEY_LOADS > 1:
                    stored_k = load_rows(
                        keys, page, row_in_page + plane % KEY_LOADS * ROWS, is_lane, key_channel,
                        key_strides, KEY_WIDTH,
                    )
                logits = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
                if IS_SHARED:
                    # Keys are packed alike, so their rows are the values'.
                    v = key_numbers(
                        stored_v, high_v, key_scale, key_zero, key_scale_strides,
                        key_zero_strides, page, row_in_page, token, is_lane, value_channel,
                        plane, ROWS, KEY_FORMAT, VALUE_WIDTH, PAGE_SIZE, KEY_GROUPS,
                    ).to(rows.dtype)
                    logits = tl.dot(shared_rows, tl.trans(v), logits, input_precision="ieee")
                if HAS_KEYS:
                    k = key_numbers(
                        stored_k, high_k, key_scale, key_zero, key_scale_strides,
                        key_zero_strides, page, row_in_page, token, is_lane, key_channel,
                        plane // KEY_LOADS, ROWS, KEY_FORMAT, KEY_WIDTH, PAGE_SIZE, KEY_GROUPS,
                    )
                    if turn_angles is not None:
                        stored_p = load_rows(
                            keys, page, row_in_page + plane % KEY_LOADS * ROWS, is_lane, partner,
                            key_strides, KEY_WIDTH,
                        )
                        high_p = load_high(
                            keys, page, row_in_page, is_lane, partner, key_strides, KEY_WIDTH,
                            ROWS, KEY_FORMAT,
                        )
                        partners = key_numbers(
                            stored_p, high_p, key_scale, key_zero, key_scale_strides,
                            key_zero_strides, page, row_in_page, token, is_lane, partner,
                            plane // KEY_LOADS, ROWS, KEY_FORMAT, KEY_WIDTH, PAGE_SIZE,
                            KEY_GROUPS,
                        )
                        k = turn_keys(
                            k, partners, turn_position, turn_row, turn_angles, num_far, token,
                            is_read, key_channel, TURNED, PAGE_SIZE,
                        )
                    k = k.to(rows.dtype)
                    logits = tl.dot(rows, tl.trans(k), logits, input_precision="ieee")
                logits = logits * softmax_scale
                if log_multiplicity is not None:
                    logits += tl.load(log_multiplicity + page, mask=is_read, other=0.0)[None, :]
                if logit_bias is not None:
                    logits += bias[:, None]
                logits = tl.where(is_read[None, :], logits, -float("inf"))
                if page_lse is not None:
                    by_page = tl.reshape(logits, [BLOCK_M, TILE_PAGES, LANES])
                    new_top = tl.maximum(page_top, tl.max(by_page, 2))
                    anchor = tl.where(new_top == -float("inf"), 0.0, new_top)
                    page_total *= tl.exp(page_top - anchor)
                    page_total += tl.sum(tl.exp(by_page - anchor[:, :, None]), 2)
                    page_top = new_top
                new_top = tl.maximum(top, tl.max(logits, 1))
                # Without any key so far, every weight is exp(-inf - 0) = 0.
                anchor = tl.where(new_top == -float("inf"), 0.0, new_top)
                weights = tl.exp(logits - anchor[:, None])
                rescale = tl.exp(top - anchor)
                total = total * rescale + tl.sum(weights, 1)
                top = new_top
                if VALUE_LOADS > 1:
                    stored_v = load_rows(
                        values, page, row_in_page + plane % VALUE_LOADS * ROWS, is_lane,
                        value_channel, value_strides, VALUE_WIDTH,
                    )
                if not IS_SHARED:
                    v = stored_v
                if VALUE_FORMAT > 0 and not IS_SHARED:
                    v = plane_numbers(
                        stored_v, high_v, row_in_page, plane // VALUE_LOADS, ROWS, VALUE_FORMAT
                    )
                    v = scale_values(
                        v, value_scale, value_zero, value_scale_strides, value_zero_strides, page,
                        token, is_lane, VALUE_WIDTH, BLOCK_V, VALUE_GROUPS,
                    )
                # A weight of 0 does not help against NaN.
                v = tl.where(is_read[:, None], v, 0.0).to(rows.dtype)
                acc *= rescale[:, None]
                acc += tl.dot(weights.to(rows.dtype), v, input_precision="ieee")
        if page_lse is not None:
            page_column = first + tl.arange(0, TILE_PAGES)
            page_log = tl.where(
                page_total > 0.0, page_top + tl.log(tl.maximum(page_total, 1.0)), -float("inf")
            )
            tl.store(
                page_lse + place[:, None] * m + page_column[None, :], page_log,
                mask=is_row[:, None] & (page_column < stop)[None, :],
            )
    if page_lse is not None:
        for first in range(start, begin, TILE_PAGES):
            page_column = first + tl.arange(0, TILE_PAGES)
            tl.store(
                page_lse + place[:, None] * m + page_column[None, :], -float("inf"),
                mask=is_row[:, None] & (page_column < begin)[None, :],
            )
        for first in range(stop, limit, TILE_PAGES):
            page_column = first + tl.arange(0, TILE_PAGES)
            tl.store(
                page_lse + place[:, None] * m + page_column[None, :], -float("inf"),
                mask=is_row[:, None] & (page_column < limit)[None, :],
            )
    # The largest logit alone adds 1 to the total: it is less only where there is no token.
    divisor = tl.maximum(total, 1.0)
    split = (first_split + tl.program_id(1)).to(tl.int64)
    place += split * num_sequences * num_queries * num_groups * GROUP
    tl.store(
        part_out + place[:, None] * VALUE_WIDTH + value_channel[None, :], acc / divisor[:, None],
        mask=is_row[:, None] & (value_channel < VALUE_WIDTH)[None, :],
    )
    tl.store(part_lse + place, top + tl.log(divisor), mask=is_row)

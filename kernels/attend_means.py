"""Attention over pages as wholes: split over the pages, then reduced.

Legend: n sequences, np query heads, ng KV heads, g = np / ng, m pages listed for a sequence, w
width of the mean values. Tiles have M pages, W channels and G >= g heads. A tensor reaches a kernel
as a pair: its pointer and its strides.
"""

import torch
import triton
import triton.language as tl

from pikv_kernels.make_sketch import pair
from pikv_kernels.merge_states import merge_states

# Wider tiles of float32 products would not fit in registers.
M, MAX_W = 16, 64
# Shorter parts cost more in merging than they give in parallel work.
SPLIT_PAGES = 256


@triton.jit
def _attend(
    logit, is_tail, mean_value, table, part_out, part_lse, num_sequences, num_groups, group,
    num_columns, width, SPLIT_PAGES: tl.constexpr, M: tl.constexpr, W: tl.constexpr,
    G: tl.constexpr,
):
    """Program (i, j, c): part j of the pages of sequence i // ng, KV head i % ng, block c of the
    channels, by online softmax.

    Example:
        ng 2, m 600, w 128: programs (0..2 n - 1, 0..2, 0..1); (1, 2, 1) has pages 512 to 599 of
        sequence 0, query heads g to 2 g - 1, channels 64 to 127.

    Args:
        part_out: [splits, n, np, w], float32.
        part_lse: [splits, n, np], float32.
    """
    row = (tl.program_id(0) // num_groups).to(tl.int64)
    kv_head = (tl.program_id(0) % num_groups).to(tl.int64)
    head = kv_head * group + tl.arange(0, G)
    is_head = tl.arange(0, G) < group
    channel = tl.program_id(2) * W + tl.arange(0, W)
    top = tl.full([G], -float("inf"), tl.float32)
    total = tl.full([G], 0.0, tl.float32)
    acc = tl.full([G, W], 0.0, tl.float32)
    start = tl.program_id(1) * SPLIT_PAGES
    for first in range(start, tl.minimum(start + SPLIT_PAGES, num_columns), M):
        column = first + tl.arange(0, M)
        is_read = column < num_columns
        is_read &= tl.load(is_tail[0] + row * is_tail[1][0] + column * is_tail[1][1],
                           mask=is_read, other=0) != 0
        page = tl.load(table[0] + row * table[1][0] + column * table[1][1], mask=is_read, other=0)
        place = logit[0] + row * logit[1][0] + head * logit[1][1]
        logits = tl.load(place[:, None] + column[None, :] * logit[1][2],
                         mask=is_head[:, None] & is_read[None, :], other=-float("inf"))
        place = mean_value[0] + kv_head * mean_value[1][0] + page * mean_value[1][1]
        values = tl.load(place[:, None] + channel[None, :] * mean_value[1][2],
                         mask=is_read[:, None] & (channel < width)[None, :], other=0.0)
        new_top = tl.maximum(top, tl.max(logits, 1))
        # Without any page so far, every weight is exp(-inf - 0) = 0.
        anchor = tl.where(new_top == -float("inf"), 0.0, new_top)
        weights = tl.exp(logits - anchor[:, None])
        rescale = tl.exp(top - anchor)
        total = total * rescale + tl.sum(weights, 1)
        acc = acc * rescale[:, None]
        acc += tl.dot(weights, values.to(tl.float32), input_precision="ieee")
        top = new_top
    # The largest logit alone adds 1 to the total: it is less only where there is no page.
    divisor = tl.maximum(total, 1.0)
    line = (tl.program_id(1).to(tl.int64) * num_sequences + row) * num_groups * group + head
    tl.store(part_out + line[:, None] * width + channel[None, :], acc / divisor[:, None],
             mask=is_head[:, None] & (channel < width)[None, :])
    if tl.program_id(2) == 0:
        tl.store(part_lse + line, top + tl.log(divisor), mask=is_head)


def attend_means(
    logit: torch.Tensor, is_tail: torch.Tensor, mean_value: torch.Tensor, table: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `pikv_megatron.ops.attend_means.attend_means`.

    Returns:
        out [n, 1, np, w] and lse [n, 1, np], float32.
    """
    n, num_heads, m = logit.shape
    num_groups, _, width = mean_value.shape
    group, num_splits = num_heads // num_groups, triton.cdiv(m, SPLIT_PAGES)
    shape, device = (num_splits, n, 1, num_heads), logit.device
    part_out = torch.empty((*shape, width), dtype=torch.float32, device=device)
    part_lse = torch.empty(shape, dtype=torch.float32, device=device)
    if part_lse.numel():
        block = min(MAX_W, max(16, triton.next_power_of_2(width)))
        _attend[(n * num_groups, num_splits, triton.cdiv(width, block))](
            pair(logit), pair(is_tail.view(torch.uint8)), pair(mean_value), pair(table),
            part_out, part_lse, n, num_groups, group, m, width, SPLIT_PAGES=SPLIT_PAGES, M=M,
            W=block, G=max(16, triton.next_power_of_2(group)),
        )
    return merge_states(part_out, part_lse)

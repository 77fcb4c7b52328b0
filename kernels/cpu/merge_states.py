"""Partial attention merged by log-sum-exp: `merge_states.cpp`."""

import torch

from pikv_kernels.cpu.compiled import call
from pikv_kernels.cpu.fields import TYPES


def merge_states(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge k parts: out [k, n, sq, np, w] and lse [k, n, sq, np], whose type is float32.

    Returns:
        [n, sq, np, w] in the type of the parts, and [n, sq, np], float32.
    """
    num_parts, *rows, width = out.shape
    out, lse = out.contiguous(), lse.contiguous()
    merged, total = torch.empty(*rows, width), torch.empty(rows)
    call("merge_states", [
        num_parts, total.numel(), width, TYPES[out.dtype], out.data_ptr(), lse.data_ptr(),
        merged.data_ptr(), total.data_ptr(),
    ])
    return merged.to(out.dtype), total

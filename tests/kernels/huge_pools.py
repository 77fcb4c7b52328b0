"""Pools whose pages lie so far apart that their places need 64 bits; few of them take memory."""

import torch

# Page 2 is beyond 2^31 numbers; heads of a page are neighbours.
PAGE_STRIDE = 1_100_000_000
HEAD_STRIDE = 4096


def huge_pool(shape: tuple[int, ...], dtype: torch.dtype, device) -> torch.Tensor:
    """[ng, p, ...] of contiguous pages in memory of its own that is never filled."""
    inner = torch.empty(shape[2:], device="meta").stride()
    strides = (HEAD_STRIDE, PAGE_STRIDE, *inner)
    last = sum((s - 1) * stride for s, stride in zip(shape, strides))
    storage = torch.UntypedStorage((last + 1) * dtype.itemsize, device=device)
    return torch.empty(0, dtype=dtype, device=device).set_(storage, 0, shape, strides)


def without_copies(monkeypatch) -> None:
    """Triton's interpreter would copy every storage onto itself, and so claim all its memory."""
    from triton.runtime.interpreter import GridExecutor

    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *args: None)

"""Scratch memory that outlives a call.

A buffer of some megabytes that is allocated anew at every decode step costs a page fault for every
4 KiB of it, more than the copy that it is for.
"""

import math
import threading

import torch

# A larger buffer is handed out, but not kept.
KEPT_BYTES = 64 << 20
# Views are kept too: making one takes as long as a small operation. A step needs a few shapes.
MOST_VIEWS = 32

_local = threading.local()


def scratch(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """An uninitialised, contiguous tensor, valid until this thread asks for the name again.

    Args:
        name: one of the few fixed names of its callers; each holds at most `KEPT_BYTES` a device.
    """
    views = _local.__dict__.setdefault((name, device), {})
    view = views.get((shape, dtype))
    if view is None:
        # A tensor made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            view = _new_view(views, math.prod(shape) * dtype.itemsize, device)
            view = view.view(dtype).view(shape)
        if view.untyped_storage().nbytes() <= KEPT_BYTES:
            views[shape, dtype] = view
    return view


def _new_view(views: dict, num_bytes: int, device: torch.device) -> torch.Tensor:
    """Bytes of the buffer that `views` are of, or of a new one where that is too small."""
    storage = next(iter(views.values())).untyped_storage() if views else None
    if storage is None or storage.nbytes() < num_bytes:
        if num_bytes <= KEPT_BYTES:
            views.clear()
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)
    if len(views) >= MOST_VIEWS:
        views.clear()
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, (num_bytes,))

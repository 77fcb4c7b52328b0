"""What a collective costs before it carries anything: the backend's own latency."""

import time
from statistics import median

import torch
import torch.distributed as dist

CALLS = 200


def collective_latency_ms(group: dist.ProcessGroup, device: torch.device) -> float | None:
    """Median of gathering one number from each rank, milliseconds; None on one rank."""
    if group.size() == 1:
        return None
    own = torch.zeros(1, device=device)
    every, seconds = own.new_empty(group.size()), []
    for _ in range(CALLS):
        start = time.perf_counter()
        dist.all_gather_into_tensor(every, own, group=group)
        if own.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 1e3 * median(seconds)

"""What a collective costs before it carries anything: the backend's own latency."""

from statistics import median

import torch
import torch.distributed as dist

from pikv_megatron.benchmarks.model.timing import CLOCKS, of_ranks

CALLS = 200


def collective_latency_ms(
    group: dist.ProcessGroup, device: torch.device, clock: str
) -> float | None:
    """Median of gathering one number from each rank, milliseconds; None on one rank.

    Args:
        clock: one of `CLOCKS`.
    """
    if group.size() == 1:
        return None
    own = torch.zeros(1, device=device)
    every, seconds, read = own.new_empty(group.size()), [], CLOCKS[clock]
    for _ in range(CALLS):
        start = read()
        dist.all_gather_into_tensor(every, own, group=group)
        if own.is_cuda:
            torch.cuda.synchronize()
        seconds.append(read() - start)
    return 1e3 * of_ranks(clock, [median(seconds)])[0]

"""How much of a step its collectives take: the backend's part, which is the same over any cache."""

from contextlib import ExitStack, contextmanager
from functools import partialmethod
from typing import Any, Callable, Iterator, Mapping
from unittest.mock import patch

import torch.distributed as dist

from pikv_megatron.benchmarks.model.decoding import Contestant
from pikv_megatron.benchmarks.model.timing import Clock, PartClock

# Of a process group: what all functions of torch and of DeepSpeed come down to, by the names of
# several versions of torch.
METHODS = (
    "allreduce", "allgather", "barrier", "all_gather_single", "_allgather_base",
    "all_to_all_single", "alltoall_base", "reduce_scatter_single", "_reduce_scatter_base",
)


@contextmanager
def collective_clocks(
    contestants: Mapping[str, Contestant], clock: Clock
) -> Iterator[dict[str, PartClock]]:
    """Time what contestants' models spend in collectives for the length of a `with` block, by
    contestant: posting them and waiting for them, by the wall for slower ranks too."""
    clocks = {name: PartClock(clock) for name in contestants}
    running: list[PartClock] = []
    with ExitStack() as stack:
        for name, contestant in contestants.items():
            own = clocks[name]
            for hook in (
                contestant.model.register_forward_pre_hook(lambda *_, own=own: running.append(own)),
                contestant.model.register_forward_hook(lambda *_: running.clear()),
            ):
                stack.callback(hook.remove)
        calls = [(dist.ProcessGroup, name) for name in METHODS if hasattr(dist.ProcessGroup, name)]
        for owner, name in [*calls, (dist.Work, "wait")]:
            timed = partialmethod(_timed, getattr(owner, name), running)
            stack.enter_context(patch.object(owner, name, timed))
        yield clocks


def _timed(self: Any, call: Callable, running: list[PartClock], *args: Any, **kwargs: Any) -> Any:
    if not running:
        return call(self, *args, **kwargs)
    running[0].start()
    try:
        return call(self, *args, **kwargs)
    finally:
        running[0].stop()

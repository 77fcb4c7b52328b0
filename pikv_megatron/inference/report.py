"""The table at the end of a run."""

import time
from dataclasses import dataclass

import torch.distributed as dist
from rich.filesize import decimal
from rich.table import Table

from pikv_megatron.inference.traffic import TrafficMeter
from pikv_megatron.types import Recalled


@dataclass(frozen=True)
class RankUsage:
    """What the cache cost on one rank.

    Attributes:
        kv_bytes: the cache's tensors, where they are computed with.
        dense_bytes: a dense cache of the same sequences, as a stock rank holds it.
        bytes_by_op: handed to each of the cache's collectives while decoding.
        host_bytes: pages in host memory, where they lie in tiers.
        file_bytes: pages in files.
        recalled: pages that came back to the device while decoding.
    """

    kv_bytes: int
    dense_bytes: int
    bytes_by_op: dict[str, int]
    host_bytes: int = 0
    file_bytes: int = 0
    recalled: Recalled = Recalled()


class RunClock:
    """Times a run from its steps, and counts traffic from the end of the prefill.

    Args:
        num_prompts: how many sequences there are.
    """

    def __init__(self, num_prompts: int):
        self.meter = TrafficMeter()
        self.num_decode_steps = 0
        self.num_decoded_tokens = 0
        self._waiting = set(range(num_prompts))
        self._start = self._prefilled = self._end = time.perf_counter()

    def step(self, tokens: list[int | None]) -> None:
        """Note a step's tokens; decoding begins once every prompt has its first."""
        self._end = time.perf_counter()
        if not self._waiting:
            self.num_decode_steps += 1
            self.num_decoded_tokens += sum(token is not None for token in tokens)
            return
        self._waiting -= {i for i, token in enumerate(tokens) if token is not None}
        if not self._waiting:
            self._prefilled = time.perf_counter()
            self.meter.start()

    @property
    def prefill_seconds(self) -> float:
        """Until every prompt had its first token."""
        return self._prefilled - self._start

    @property
    def decode_seconds(self) -> float:
        """From then to the last token."""
        return self._end - self._prefilled


def gather_usage(usage: RankUsage) -> list[RankUsage]:
    """Every rank's usage, by rank; called on all of them."""
    usages: list[RankUsage | None] = [None] * dist.get_world_size()
    dist.all_gather_object(usages, usage)
    return usages


def report_table(
    clock: RunClock, num_prompt_tokens: int, num_new_tokens: int, usages: list[RankUsage]
) -> Table:
    """Speed of the run, memory and traffic of its cache."""
    table = Table("", "", show_header=False)
    table.add_row("prompt tokens", f"{num_prompt_tokens:,} in {clock.prefill_seconds:.2f} s")
    table.add_row("new tokens", f"{num_new_tokens:,}")
    table.add_row("tokens per second, decoding", _speed(clock))
    kv_bytes = [usage.kv_bytes for usage in usages]
    dense_bytes = max(usage.dense_bytes for usage in usages)
    table.add_row("KV bytes held per rank", _span(kv_bytes))
    table.add_row("dense cache per rank", decimal(dense_bytes))
    if dense_bytes:
        table.add_row("held / dense, largest rank", f"{max(kv_bytes) / dense_bytes:.3f}")
    table.add_section()
    steps = max(1, clock.num_decode_steps)
    if any(usage.host_bytes for usage in usages):
        _add_tiers(table, usages, steps)
    sent = [sum(usage.bytes_by_op.values()) / steps for usage in usages]
    table.add_row("bytes sent per decode step and rank", _span(sent))
    for op in usages[0].bytes_by_op:
        table.add_row(f"  {op}", _span([usage.bytes_by_op[op] / steps for usage in usages]))
    return table


def _add_tiers(table: Table, usages: list[RankUsage], steps: int) -> None:
    """What lies below the device, and what came back from there in a step."""
    total = sum((usage.recalled for usage in usages), Recalled())
    waited = max(usage.recalled.seconds for usage in usages)
    table.add_row("beside it in host memory", _span([usage.host_bytes for usage in usages]))
    table.add_row("beside it in files", _span([usage.file_bytes for usage in usages]))
    table.add_section()
    table.add_row("pages back per decode step, all ranks", f"{total.from_host / steps:.1f} of host "
                  f"memory, {total.from_file / steps:.1f} of files, {total.ahead / steps:.1f} read "
                  "ahead")
    table.add_row("waited for them, longest rank", f"{1000 * waited / steps:.2f} ms")
    table.add_section()


def _speed(clock: RunClock) -> str:
    if not clock.num_decoded_tokens:
        return "none decoded"
    return f"{clock.num_decoded_tokens / clock.decode_seconds:.1f}"


def _span(values: list[float]) -> str:
    """One figure for all ranks, or the smallest and the largest."""
    low, high = decimal(round(min(values))), decimal(round(max(values)))
    return low if low == high else f"{low} to {high}"

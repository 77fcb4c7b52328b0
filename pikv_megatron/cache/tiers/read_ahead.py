"""Records that a thread reads from a file before they are asked for, while the model runs on.

Legend: c records, B bytes of a record.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import torch

from pikv_megatron.cache.tiers.disk_tier import DiskTier, Loss


class Staged(NamedTuple):
    """What was read.

    Attributes:
        rows: [c], int64, rising.
        records: [c, B].
    """

    rows: torch.Tensor
    records: torch.Tensor


class ReadAhead:
    """Holds what was last asked for in advance, and nothing else.

    Args:
        disk: what is read.
    """

    def __init__(self, disk: DiskTier):
        self._disk = disk
        self._staged: Staged | None = None
        self._pending: Future[Staged] | None = None

    def begin(self, rows: torch.Tensor) -> None:
        """Read rows [c], each named once, that may be asked for next."""
        staged = self._settled()
        self._pending = _reader().submit(self._stage, rows.sort().values, staged)

    def read(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        """As of `DiskTier.read`, and how many of them were there already."""
        return self._read(rows, self._settled())

    def drop(self) -> None:
        """Rows will be used again, for others."""
        self._settled()
        self._staged = None

    def tensors(self) -> list[torch.Tensor]:
        staged = self._settled()
        return [] if staged is None else list(staged)

    def _settled(self) -> Staged | None:
        """What is held, once the thread is done."""
        if self._pending is not None:
            self._staged, self._pending = self._pending.result(), None
        return self._staged

    def _stage(self, rows: torch.Tensor, staged: Staged | None) -> Staged:
        """What is held next; what is lost is left to be found lost."""
        records, loss, _ = self._read(rows, staged)
        return Staged(rows[loss == Loss.NONE], records[loss == Loss.NONE])

    def _read(
        self, rows: torch.Tensor, staged: Staged | None
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        if staged is None or not len(staged.rows):
            return *self._disk.read(rows), 0
        place, is_here = _find(staged.rows, rows)
        records, loss = staged.records[place], torch.zeros_like(rows)
        records[~is_here], loss[~is_here] = self._disk.read(rows[~is_here])
        return records, loss, int(is_here.sum())


def _find(rows: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where in rising rows each of those wanted [c] is, any place for those that are not there; and
    which of them are."""
    place = torch.searchsorted(rows, wanted).clamp(max=len(rows) - 1)
    return place, rows[place] == wanted


@cache
def _reader() -> ThreadPoolExecutor:
    """One thread for all layers: a file gives no more to several."""
    return ThreadPoolExecutor(1, thread_name_prefix="pikv-read-ahead")

"""Pages of a pool that are not on the device: in host memory, and beyond its room in a file.

A page that comes back from host memory leaves it: another one takes its row. What was written to
the file stays there, and is written once.

Legend: p pages of the pool, c some of them, B bytes of a record.
"""

from pathlib import Path

import torch

from pikv_megatron.cache.pages.widen import narrow, widen
from pikv_megatron.cache.tiers.disk_tier import DiskTier, Loss
from pikv_megatron.cache.tiers.host_tier import HostTier
from pikv_megatron.cache.tiers.read_ahead import ReadAhead
from pikv_megatron.types import Recalled


class LowerTiers:
    """Books and records, all of them on the host.

    Args:
        record_bytes: B.
        directory: of the file; None: the system's for such files.
        device: of the pool.

    Attributes:
        host_row: [p + 1], int64, of a page in host memory, -1 elsewhere.
        disk_row: [p + 1], int64, of a page in the file, -1 for none; it may lie on the device too.
        loss: [p + 1], int64, why a page cannot be read again, `Loss`.
        recalled: what went back to the device since it was last looked at.
    """

    def __init__(self, record_bytes: int, directory: Path | None, device: torch.device):
        self.host = HostTier(record_bytes, device)
        self.disk = DiskTier(record_bytes, directory, device)
        self.recalled = Recalled()
        self._ahead = ReadAhead(self.disk)
        none = torch.full((1,), -1, device=self.host.rows.pages().device)
        self.host_row, self.disk_row, self.loss = none, none.clone(), torch.zeros_like(none)

    def add(self, num_pages: int) -> None:
        """So many pages more, which lie nowhere yet."""
        self.host_row, self.disk_row, self.loss = (
            widen(book, num_pages, 0) for book in (self.host_row, self.disk_row, self.loss)
        )
        new = slice(-1 - num_pages, -1)
        self.host_row[new] = self.disk_row[new] = -1

    def reserve(self, in_host: int, in_file: int) -> None:
        """See that there is room for so many."""
        self.host.reserve(in_host)
        self.disk.reserve(in_file)

    def keep(self, pages: torch.Tensor, records: torch.Tensor, last_read: torch.Tensor) -> None:
        """Take pages [c] that leave the device and are not in the file, read longest ago first.

        Where host memory has no room left, what was read longest ago goes on to the file.

        Args:
            records: [c, B].
            last_read: [p + 1], int64, of the pool, when each page was last read.
        """
        lacking = self.host.rows.missing(len(pages))
        if lacking:
            held = (self.host_row >= 0).nonzero().squeeze(1)
            held = held[last_read[held].argsort()[:lacking].cpu()]
            self._write(held, self.host.read(self.host_row[held]))
            self._leave_host(held)
            straight = lacking - len(held)
            self._write(pages[:straight], records[:straight])
            pages, records = pages[straight:], records[straight:]
            self.host.rows.missing(len(pages))
        if len(pages):
            rows = self.host.rows.allocate(torch.ones_like(pages, dtype=torch.bool))
            self.host.write(rows, records)
            self.host_row[pages] = rows

    def take(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pages [c] that go to the device, and their records [c, B]: without those that cannot be
        read again."""
        in_host = self.host_row[pages] >= 0
        held, filed = pages[in_host], pages[~in_host]
        records = self.host.read(self.host_row[held])
        self._leave_host(held)
        self.recalled += Recalled(from_host=len(held))
        if not len(filed):
            return held, records
        read, self.loss[filed], num_ahead = self._ahead.read(self.disk_row[filed])
        is_whole = self.loss[filed] == Loss.NONE
        self.recalled += Recalled(from_file=len(filed) - num_ahead, ahead=num_ahead)
        return torch.cat([held, filed[is_whole]]), torch.cat([records, read[is_whole]])

    def fetch_ahead(self, pages: torch.Tensor) -> None:
        """Begin to read those of pages [c], each named once, that lie in the file."""
        rows = self.disk_row[pages[self.host_row[pages] < 0]]
        if len(rows):
            self._ahead.begin(rows)

    def forget(self, pages: torch.Tensor) -> None:
        """Pages [c] are no more."""
        self._ahead.drop()
        self._leave_host(pages[self.host_row[pages] >= 0])
        rows = self.disk_row[pages]
        self.disk.rows.release(rows[rows >= 0])
        self.disk_row[pages], self.loss[pages] = -1, Loss.NONE

    def compact(self, kept: torch.Tensor) -> None:
        """Keep the pages `kept` [k], and give back the memory of free rows."""
        self._ahead.drop()
        number = self.host.compact()
        self.host_row, self.disk_row, self.loss = (
            narrow(book, kept, 0) for book in (self.host_row, self.disk_row, self.loss)
        )
        self.host_row = torch.where(self.host_row >= 0, number[self.host_row], -1)
        self.disk.shrink()

    def tensors(self) -> list[torch.Tensor]:
        """What takes host memory."""
        books = [self.host_row, self.disk_row, self.loss]
        return [*books, *self.host.tensors(), *self.disk.tensors(), *self._ahead.tensors()]

    def check_integrity(self) -> None:
        """Every row is free or has exactly one page."""
        for free, book in ((self.host.rows, self.host_row), (self.disk.rows, self.disk_row)):
            every = torch.cat([book[book >= 0], free.pages()]).sort().values
            assert torch.equal(every, torch.arange(free.num_pages)), "rows lost or held twice"

    def _leave_host(self, pages: torch.Tensor) -> None:
        self.host.rows.release(self.host_row[pages])
        self.host_row[pages] = -1

    def _write(self, pages: torch.Tensor, records: torch.Tensor) -> None:
        """Put pages [c] into the file."""
        if not len(pages):
            return
        missing = self.disk.rows.missing(len(pages))
        assert not missing, "the plan sends more to the file than it has room for"
        rows = self.disk.rows.allocate(torch.ones_like(pages, dtype=torch.bool))
        self.disk_row[pages] = rows
        self.loss[pages] = self.disk.write(rows, records)

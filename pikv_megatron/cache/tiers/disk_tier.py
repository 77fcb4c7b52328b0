"""Records of pages in a file of this rank.

The file has no name: it is made for its owner's eyes only, and its name is taken away at once, so
that it goes with the process that made it, however that ends. It is read by calls that say how much
they found, never through a mapping: touching a page of a mapping that the file has lost kills a
process. A fingerprint of every record, kept in memory, tells what came back from what was written.

Legend: c records, B bytes of a record.
"""

import errno
import os
import tempfile
import weakref
from collections.abc import Callable
from enum import IntEnum
from itertools import pairwise
from pathlib import Path

import torch

from pikv_megatron.cache.pages.free_list import FreeList
from pikv_megatron.cache.pages.widen import widen
from pikv_megatron.cache.tiers.page_records import WORD

SEED = 20250806  # of the fingerprints' weights


class Loss(IntEnum):
    """Why a page cannot be read again."""

    NONE = 0
    CUT = 1
    CHANGED = 2
    FAILED = 3
    FULL = 4

    @property
    def said(self) -> str:
        """For a message about the page."""
        return {
            Loss.CUT: "its file has become shorter",
            Loss.CHANGED: "its file holds other bytes than were written",
            Loss.FAILED: "its file could not be read or written",
            Loss.FULL: "there was no space left for it in retention.directory",
        }[self]


class DiskTier:
    """Rows of records, handed out and taken back.

    Args:
        record_bytes: B.
        directory: where the file lies; None: the system's directory for such files.
        device: torch's meta device where nothing is to be kept.
    """

    def __init__(self, record_bytes: int, directory: Path | None, device: torch.device):
        own = device if device.type == "meta" else torch.device("cpu")
        self.rows = FreeList(own)
        self._record_bytes, self._directory = record_bytes, directory
        # One more, as pools have it.
        self._fingerprints = torch.zeros(1, dtype=torch.int64, device=own)
        generator = torch.Generator().manual_seed(SEED)
        weights = torch.randint(2**62, (record_bytes // WORD,), generator=generator)
        self._weights = weights * 2 + 1
        self._file: int | None = None

    @property
    def num_bytes(self) -> int:
        """Of the file."""
        return self.rows.num_pages * self._record_bytes

    def reserve(self, num_rows: int) -> None:
        """See that there are so many rows, used or not; `hold_space` makes sure of them."""
        missing = num_rows - self.rows.num_pages
        if missing > 0:
            self.rows.add(missing)
            self._fingerprints = widen(self._fingerprints, missing, 0)

    def hold_space(self) -> None:
        """Take the space of all rows now.

        Raises:
            OSError: there is too little, or no file can be made.
        """
        if self.num_bytes:
            os.posix_fallocate(self._opened(), 0, self.num_bytes)

    def shrink(self) -> None:
        """Empty a file that no page lies in; in others free rows stay."""
        if self.rows.num_free == self.rows.num_pages > 0:
            self.rows.compact()
            self._fingerprints = self._fingerprints[-1:].clone()
            os.ftruncate(self._opened(), 0)

    def read(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Records [c, B] of rows [c], and what each of them suffered, `Loss` [c]."""
        records = torch.zeros(len(rows), self._record_bytes, dtype=torch.uint8)
        loss = self._transfer(os.preadv, rows, records)
        changed = self._fingerprint(records) != self._fingerprints[rows]
        return records, torch.where((loss == Loss.NONE) & changed, Loss.CHANGED, loss)

    def write(self, rows: torch.Tensor, records: torch.Tensor) -> torch.Tensor:
        """Keep records [c, B] in rows [c]; what each of them suffered, `Loss` [c]."""
        self._fingerprints[rows] = self._fingerprint(records)
        return self._transfer(os.pwritev, rows, records.contiguous())

    def tensors(self) -> list[torch.Tensor]:
        """What is kept of the file in memory."""
        return [self._fingerprints, *self.rows.tensors()]

    def _opened(self) -> int:
        if self._file is None:
            # Readable and writable by its owner only.
            self._file, name = tempfile.mkstemp(prefix="pikv-", dir=self._directory)
            weakref.finalize(self, os.close, self._file)
            os.unlink(name)
        return self._file

    def _fingerprint(self, records: torch.Tensor) -> torch.Tensor:
        """[c], int64: the words' sum, each times an odd number of its own, modulo 2^64. Records
        that differ in one word have different ones; others by a chance of 2^-63."""
        return (records.view(torch.int64) * self._weights).sum(dim=1)

    def _transfer(
        self, call: Callable[[int, list[memoryview], int], int], rows: torch.Tensor,
        records: torch.Tensor,
    ) -> torch.Tensor:
        """Read or write records, one call for rows that lie one behind the other."""
        loss = torch.zeros(len(rows), dtype=torch.int64)
        for first, end in _runs(rows):
            own = memoryview(records[first:end].numpy()).cast("B")
            done, cause = self._transfer_run(call, own, int(rows[first]) * self._record_bytes)
            loss[first + done // self._record_bytes : end] = cause
        return loss

    def _transfer_run(self, call, own: memoryview, offset: int) -> tuple[int, Loss]:
        """How many bytes were moved, and why no more."""
        done = 0
        while done < len(own):
            try:
                moved = call(self._opened(), [own[done:]], offset + done)
            except OSError as error:
                is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                return done, Loss.FULL if is_full else Loss.FAILED
            if not moved:
                return done, Loss.CUT
            done += moved
        return done, Loss.NONE


def _runs(rows: torch.Tensor) -> list[tuple[int, int]]:
    """Spans of rows [c] that are numbered one by one.

    Example:
        Rows 7, 8, 9, 3: spans 0 to 3 and 3 to 4.
    """
    breaks = ((rows[1:] - rows[:-1]) != 1).nonzero().squeeze(1) + 1
    return list(pairwise([0, *breaks.tolist(), len(rows)])) if len(rows) else []

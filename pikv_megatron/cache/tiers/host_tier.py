"""Records of pages in the host's memory, page-locked where the pages' device is a GPU.

Legend: c records, B bytes of a record.
"""

import torch

from pikv_megatron.cache.pages.free_list import FreeList
from pikv_megatron.cache.pages.widen import narrow, widen

CPU = torch.device("cpu")


class HostTier:
    """Rows of records, handed out and taken back.

    Args:
        record_bytes: B.
        device: of the pages; on torch's meta device nothing takes memory here either.
    """

    def __init__(self, record_bytes: int, device: torch.device):
        self._is_locked = device.type == "cuda"
        own = device if device.type == "meta" else CPU
        self.rows = FreeList(own)
        # One more, as pools have it.
        self._records = torch.zeros(1, record_bytes, dtype=torch.uint8, device=own)

    def reserve(self, num_rows: int) -> None:
        """See that there are so many rows, used or not."""
        missing = num_rows - self.rows.num_pages
        if missing <= 0:
            return
        self.rows.add(missing)
        if self._is_locked:
            # What is locked cannot grow where it lies.
            shape = num_rows + 1, self._records.shape[1]
            moved = torch.zeros(shape, dtype=torch.uint8, pin_memory=True)
            moved[: len(self._records)] = self._records
            self._records = moved
        else:
            self._records = widen(self._records, missing, 0)

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """A copy [c, B] of rows [c], page-locked if they are."""
        shape = len(rows), self._records.shape[1]
        copy = torch.empty(shape, dtype=torch.uint8, pin_memory=self._is_locked)
        return torch.index_select(self._records, 0, rows, out=copy)

    def write(self, rows: torch.Tensor, records: torch.Tensor) -> None:
        """Keep records [c, B] in rows [c]."""
        self._records.index_copy_(0, rows, records)

    def compact(self) -> torch.Tensor:
        """Give back the memory of free rows; the new number of every old one, see `FreeList`."""
        kept, number = self.rows.compact()
        records = narrow(self._records, kept, 0)
        self._records = records.pin_memory() if self._is_locked else records
        return number

    def tensors(self) -> list[torch.Tensor]:
        return [self._records, *self.rows.tensors()]

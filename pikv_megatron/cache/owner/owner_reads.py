"""What queries that came to an owner read of its part.

Legend: n queries' sequences, N shards, k pages read, k' drawn, m columns.
"""

from typing import NamedTuple

import torch


class OwnerReads(NamedTuple):
    """What an owner is asked to read.

    Attributes:
        slots: [n], int64, the sequences.
        num_columns: m, at least the pages that any of them ever filled here.
        key: the slots, where the host knows them.
        visited: [n, N], bool, the visited shards; None for all of them.
        columns: [n, k], int64, pages to read by their columns, -1 for none; None for all of the
            visited shards.
        drawn: [n, k'], int64, further pages by their columns, which stand for others, -1 for none;
            None: no page does.
        log_weight: [n], float32, log of how often each drawn page counts.
        positions: [n], int64, of the queries (of several, the last), where masses are counted.
        ahead: [n, k''], int64, pages by their columns that the next step may read, -1 for none;
            None: nothing is fetched ahead.
    """

    slots: torch.Tensor
    num_columns: int
    key: tuple[int, ...] | None = None
    visited: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    drawn: torch.Tensor | None = None
    log_weight: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    ahead: torch.Tensor | None = None

    @property
    def is_everything(self) -> bool:
        return self.visited is None and self.columns is None

"""Numbers tokens and pages, the same on the rank that stores them and on the one that sends them.

A *group* is what fills one token buffer; a *row* is a run of `groups_per_row` neighbouring groups
whose pages are listed together. The last group takes padding and is never counted.
"""

from typing import NamedTuple

import torch


class Admission(NamedTuple):
    """Where the tokens [t] of a block go, and the pages [c] that it fills.

    Attributes:
        offset: [t], place in the page or in the token buffer.
        buffer: [t], group of a token that stays in its buffer; of others, the padding group.
        page: [t], number of the token's page among those of the block; -1: stays in the buffer.
        page_group: [c], group of each page; of padding, some group.
        page_row: [c], row of each page.
        page_order: [c], place among the row's pages of this block.
        is_page: [c], bool; False marks padding.
        num_tokens: [groups + 1], int64, tokens of each group.
        num_pages: [rows], int64, pages that each row's groups fill.
    """

    offset: torch.Tensor
    buffer: torch.Tensor
    page: torch.Tensor
    page_group: torch.Tensor
    page_row: torch.Tensor
    page_order: torch.Tensor
    is_page: torch.Tensor
    num_tokens: torch.Tensor
    num_pages: torch.Tensor


class PageLedger:
    """Counts tokens by group and pages by row, on the device.

    Args:
        num_rows: rows.
        groups_per_row: groups of a row.
        page_size: S, tokens a page.

    Attributes:
        num_tokens: [num_rows * groups_per_row + 1], int64, tokens ever admitted to a group.
        num_pages: [num_rows], int64, pages ever filled by a row's groups.

    Example:
        S = 4, one row of one group that holds 3 tokens: admitting 6 gives offsets 3, 0, 1, 2, 3, 0
        and pages 0, 1, 1, 1, 1, -1: two pages are full, one token waits in the buffer.
    """

    def __init__(self, num_rows: int, groups_per_row: int, page_size: int, device: torch.device):
        self.page_size = page_size
        self.groups_per_row = groups_per_row
        self.num_tokens = torch.zeros(
            num_rows * groups_per_row + 1, dtype=torch.int64, device=device
        )
        self.num_pages = torch.zeros(num_rows, dtype=torch.int64, device=device)

    @property
    def padding_group(self) -> int:
        return self.num_tokens.numel() - 1

    def admit(self, group: torch.Tensor, num_pages: int | None = None) -> Admission:
        """Number the tokens of `group` [t], those of a group in the order given; `count` counts
        them.

        Args:
            num_pages: that they fill, if the host knows it.
        """
        order = torch.argsort(group, stable=True)
        added = torch.zeros_like(self.num_tokens).scatter_add_(0, group, torch.ones_like(group))
        start = torch.cumsum(added, 0) - added
        ranked = torch.arange(group.numel(), device=group.device) - start[group[order]]
        index = self.num_tokens[group] + torch.empty_like(ranked).scatter_(0, order, ranked)
        added[-1] = 0
        return self._number_pages(group, index, added, num_pages)

    def count(self, admission: Admission) -> None:
        """Count what this ledger, or one that held the same, has numbered."""
        self.num_tokens += admission.num_tokens
        self.num_pages += admission.num_pages

    def clear(self, row: int) -> None:
        """Forget a row's tokens and pages."""
        first = row * self.groups_per_row
        self.num_tokens[first : first + self.groups_per_row] = 0
        self.num_pages[row] = 0

    def tensors(self) -> list[torch.Tensor]:
        return [self.num_tokens, self.num_pages]

    def _number_pages(self, group, index, added, num_pages) -> Admission:
        before = self.num_tokens // self.page_size
        after = (self.num_tokens + added) // self.page_size
        filled = after - before
        last = torch.cumsum(filled, 0)
        first = last - filled
        if num_pages is None:
            num_pages = self._most_pages(last, group.numel())
        number = torch.arange(num_pages, device=group.device)
        is_page = number < last[-1]
        page_group = torch.searchsorted(last, number, right=True).clamp_(max=last.numel() - 2)
        row = page_group // self.groups_per_row
        order = number - first[row * self.groups_per_row]
        page = first[group] + index // self.page_size - before[group]
        in_page = index < after[group] * self.page_size
        return Admission(
            offset=index % self.page_size,
            buffer=torch.where(in_page, self.padding_group, group),
            page=torch.where(in_page, page, -1),
            page_group=page_group,
            page_row=row,
            page_order=order,
            is_page=is_page,
            num_tokens=added,
            num_pages=filled[:-1].view(-1, self.groups_per_row).sum(1),
        )

    def _most_pages(self, last: torch.Tensor, num_tokens: int) -> int:
        """How many pages a block fills: exact where asking is free, else a bound."""
        if last.is_cpu:
            return int(last[-1])
        return num_tokens // self.page_size + min(num_tokens, last.numel())

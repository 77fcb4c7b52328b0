"""Which pages a sequence has: one table for the owner's pages and one for the home's sketches.

Both count along by the same rules and change by the same verdicts, so column j of a row is the same
page on either side.

Legend: r rows, m columns, c pages.
"""

import torch


class PageTable:
    """Rows of page numbers, in columns without holes: a dropped page's column is used again.

    Args:
        num_rows: rows.
        max_pages: most pages that a row can have.

    Attributes:
        page: [num_rows, max_pages + 1], int64; the last column takes writes that are to be lost.
        count: [num_rows], int64, pages of each row.

    Example:
        Pages 7, 3, 5 in a row; dropping the first leaves 3, 5, and the next page has column 2.
    """

    def __init__(self, num_rows: int, max_pages: int, device: torch.device):
        self.page = torch.zeros(num_rows, max_pages + 1, dtype=torch.int64, device=device)
        self.count = torch.zeros(num_rows, dtype=torch.int64, device=device)

    def append(
        self, row: torch.Tensor, order: torch.Tensor, page: torch.Tensor, is_page: torch.Tensor
    ) -> None:
        """List new pages.

        Args:
            row: [c], int64.
            order: [c], int64, place among the new pages of the row.
            page: [c], int64.
            is_page: [c], bool; False marks padding.
        """
        column = torch.where(is_page, self.count[row] + order, self.page.shape[1] - 1)
        self.page[row, column] = page
        self.count.index_add_(0, row, is_page.long())

    def apply(
        self, rows: torch.Tensor, drop: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take pages out, and close the gaps in the order of the columns.

        Args:
            rows: [r], int64, each row once.
            drop: [r, m], bool; m reaches beyond the pages of every row.

        Returns:
            The pages that were listed [r, m], and which of them were taken out, [r, m].
        """
        m = drop.shape[1]
        pages, is_page = self.page[rows, :m], self.is_page(rows, m)
        keep = is_page & ~drop
        order = keep.int().argsort(dim=1, descending=True, stable=True)
        self.page[rows, :m] = pages.gather(1, order)
        self.count[rows] = keep.sum(dim=1)
        return pages, is_page & drop

    def is_page(self, rows: torch.Tensor, num_columns: int) -> torch.Tensor:
        """[..., num_columns], bool, for rows [...]."""
        column = torch.arange(num_columns, device=self.page.device)
        return column < self.count[rows].unsqueeze(-1)

    def renumber(self, number: torch.Tensor) -> None:
        """List every page by its new number [old pages + 1]."""
        self.page = number[self.page.clamp(max=len(number) - 1)]

    def pages_of(self, row: int) -> torch.Tensor:
        """The pages of a row."""
        return self.page[row, : int(self.count[row])]

    def clear(self, row: int) -> None:
        self.count[row] = 0

    def tensors(self) -> list[torch.Tensor]:
        return [self.page, self.count]

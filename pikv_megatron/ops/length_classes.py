"""Classes of sequences of similar length, so that short ones are not padded to the longest.

Legend: n sequences, L page lists.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F

from pikv_megatron.ops.page_blocks import noted, row_columns, token_bytes
from pikv_megatron.types import PageList

MOST_CLASSES = 8
# Of what is read, in padding; less than that is left alone.
MOST_PADDING = 0.2
# Of all lists' padding, in one of them.
MOST_EVEN_PADDING = 1 / 8
# Of the padded keys or values that cost as much as the calls of one more class.
CLASS_BYTES = 512 << 10
# Places between which the search may cut: it takes their number squared.
MOST_PLACES = 128

# Columns that each sequence reads, list by list; and sequences, class by class.
Columns = tuple[tuple[int, ...], ...]
Classes = tuple[tuple[int, ...], ...]


def length_classes(lists: Sequence[PageList], columns: Columns) -> Classes | None:
    """Sequences that are best attended together, the longest first; None: all of them.

    What was found is kept in the notes of the first list that has any, for as long as all lists
    read as many columns of each sequence.

    Args:
        columns: `row_columns` of each list.

    Example:
        One list of pages of 64 tokens, columns 256, 16, 15, 2; a class costs as much as 500 tokens:
        (0,), (1, 2) and (3,). Sequence 2 has one column of padding, which costs less than a class.
    """
    if len(columns[0]) < 2:
        return None
    notes = next((each.notes for each in lists if each.notes is not None), {})
    if notes.get("classes", (None,))[0] != columns:
        sizes = [each.pages.page_size for each in lists]
        overhead = CLASS_BYTES // max(map(token_bytes, lists))
        notes["classes"] = columns, _find_classes(columns, sizes, overhead)
    return notes["classes"][1]


def even_lists(lists: Sequence[PageList], columns: Columns) -> list[bool]:
    """Which lists pad so little that classes would cost more calls than they save.

    Example:
        Padding of 1,000 tokens in a list of pages and of 3 in one of windows: False, True.
    """
    padding = [
        x.pages.page_size * (len(own) * max(own) - sum(own)) for x, own in zip(lists, columns)
    ]
    return [own <= MOST_EVEN_PADDING * sum(padding) for own in padding]


@lru_cache(maxsize=16)
def row_orders(classes: Classes) -> tuple[torch.Tensor, torch.Tensor]:
    """The sequences class by class, [n], and where each is found among them, [n].

    Example:
        (2,), (0, 1): order 2, 0, 1; places 1, 2, 0.
    """
    order = torch.tensor([row for rows in classes for row in rows])
    return order, order.argsort()


def class_lists(page_list: PageList, classes: Classes) -> list[PageList]:
    """The list's rows of each class, without columns that the class does not read.

    They are kept in the list's notes, each with notes of its own, as long as `classes` are the
    same. The pool is this call's, and so would be a bias: see `PageList.notes`.
    """
    notes = {} if page_list.notes is None else page_list.notes
    if notes.get("class lists", (None,))[0] != classes:
        columns = noted(page_list, "row columns", lambda: row_columns(page_list))
        parts = [
            _part(page_list, rows, max(columns[row] for row in rows)) for rows in classes
        ]
        notes["class lists"] = classes, parts
    return [part._replace(pages=page_list.pages) for part in notes["class lists"][1]]


def _part(page_list: PageList, rows: tuple[int, ...], num_columns: int) -> PageList:
    place = torch.tensor(rows)
    table, lens, mask = (
        None if x is None else x[:, :num_columns].index_select(0, place)
        for x in (page_list.table, page_list.lens, page_list.token_mask)
    )
    return PageList(None, table, lens, mask, notes={}, is_finite=page_list.is_finite)


def _find_classes(columns: Columns, sizes: list[int], overhead: int) -> Classes | None:
    """See `length_classes`.

    Args:
        sizes: tokens a page of each list.
        overhead: padded tokens that cost as much as one more class.
    """
    needed = sum(size * sum(own) for size, own in zip(sizes, columns))
    padded = len(columns[0]) * sum(size * max(own) for size, own in zip(sizes, columns))
    if padded - needed <= max(overhead, MOST_PADDING * needed):
        return None
    tokens = torch.tensor(columns) * torch.tensor(sizes).unsqueeze(1)
    order = tokens.sum(dim=0).argsort(descending=True)
    ends = _best_ends(tokens[:, order], overhead)
    if len(ends) == 1:
        return None
    numbers = order.tolist()
    return tuple(tuple(numbers[first:end]) for first, end in zip([0, *ends], ends))


def _best_ends(tokens: torch.Tensor, overhead: int) -> list[int]:
    """Where the parts of the cheapest partition of tokens [L, n] into intervals end.

    Example:
        One list, tokens 9, 4, 4, 1, overhead 2: intervals 9 | 4 4 | 1 cost 11 + 10 + 3 = 24, and
        9 | 4 4 1 cost 11 + 14 = 25: ends 1, 3, 4.
    """
    cost, place_ends = _interval_costs(tokens, overhead)
    best, starts = cost[0], []
    for _ in range(MOST_CLASSES - 1):
        # The interval that ends at j begins where it and the best intervals before it cost least.
        best, start = (F.pad(best[:-1], (1, 0)).unsqueeze(1) + cost).min(dim=0)
        starts.append(start.tolist())
    ends = [len(cost)]
    for start in reversed(starts):
        if start[ends[0] - 1] > 0:
            ends.insert(0, start[ends[0] - 1])
    return [place_ends[end - 1] for end in ends]


def _interval_costs(tokens: torch.Tensor, overhead: int) -> tuple[torch.Tensor, list[int]]:
    """Padded tokens of places i to j, [places, places]; and where each place ends.

    A place is one sequence, or several in a large batch.

    Example:
        One list, tokens 9, 4, overhead 2: 9 alone costs 11, both 20, 4 alone 6.
    """
    n = tokens.shape[1]
    step = -(-n // MOST_PLACES)
    ends = torch.arange(step, n + step, step).clamp_(max=n)
    largest = F.pad(tokens, (0, len(ends) * step - n)).unflatten(1, (-1, step)).amax(dim=2)
    count = ends - F.pad(ends[:-1], (1, 0)).unsqueeze(1)
    longest = torch.where(count > 0, largest.unsqueeze(1), 0).cummax(dim=2).values.sum(dim=0)
    cost = longest * count + overhead
    return cost.masked_fill_(count <= 0, torch.iinfo(torch.int64).max // 2), ends.tolist()

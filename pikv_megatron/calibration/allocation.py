"""A budget of bytes a token, spent where it buys most: over layers, and over keys and values."""

from typing import NamedTuple, Sequence


class Choice(NamedTuple):
    """One way to store the keys, or the values, of one layer.

    Attributes:
        num_bytes: of a token.
        error: that it adds.
        fields: what it is.
    """

    num_bytes: int
    error: float
    fields: dict


def allocate(menus: Sequence[Sequence[Choice]], budget: int) -> list[Choice]:
    """One choice from each menu, of the least summed error that `budget` bytes allow.

    By dynamic programming over the bytes spent: the best of the first menus for every sum.

    Raises:
        ValueError: the smallest choices need more.

    Example:
        Menus (4 bytes, error 0), (2, 1) and (4, 0), (2, 5), 6 bytes: 2 and 4, error 1.
    """
    best: dict[int, tuple[float, list[Choice]]] = {0: (0.0, [])}
    for menu in menus:
        longer: dict[int, tuple[float, list[Choice]]] = {}
        for spent, (error, chosen) in best.items():
            for choice in menu:
                total = spent + choice.num_bytes
                found = error + choice.error
                if total <= budget and (total not in longer or found < longer[total][0]):
                    longer[total] = found, [*chosen, choice]
        best = _undominated(longer)
    if not best:
        least = sum(min(choice.num_bytes for choice in menu) for menu in menus)
        raise ValueError(f"{budget} bytes a token are too few: the smallest codecs need {least}")
    return min(best.values(), key=lambda found: found[0])[1]


def _undominated(
    found: dict[int, tuple[float, list[Choice]]]
) -> dict[int, tuple[float, list[Choice]]]:
    """Without sums that cost more bytes than another and have no smaller error."""
    kept, least = {}, float("inf")
    for total in sorted(found):
        if found[total][0] < least:
            least = found[total][0]
            kept[total] = found[total]
    return kept

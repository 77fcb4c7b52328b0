"""The recall task: key-value pairs hidden in a context, and questions about them at its end.

A pair is four visible bytes, `@K7;`: its key and its value are a letter or a digit each. Asked
`@K`, the model answers with the one byte `7`. Filler is Python text and random printable bytes by
turns; it never holds an `@`, so a pair is a pair wherever it stands.
"""

import random
import string
from dataclasses import dataclass
from typing import Callable, Sequence

import torch
from torch import Tensor

SYMBOLS = (string.ascii_letters + string.digits).encode()
PAIR_LEN = len(b"@K7;")
MARK = ord("@")
_NOISE = bytes(byte for byte in range(0x20, 0x7F) if byte != MARK)
_PIECE_LENS = range(8, 65)

Pair = tuple[int, int]
# Puts a key and its value into a row, the value at the given place.
Write = Callable[[bytearray, int, int, int], None]


@dataclass
class RecallBatch:
    """Sequences and the answers in them.

    Attributes:
        ids: `[b, s]` token ids.
        source: `[b, s]` int64; at the value of a key that was told before, the position where the
            value last stood; -1 elsewhere.
    """

    ids: Tensor
    source: Tensor

    @property
    def is_answer(self) -> Tensor:
        """`[b, s]` true at the tokens that can be recalled."""
        return self.source >= 0


def recall_rng(seed: int, index: int, held_out: bool) -> random.Random:
    """The generator of batch `index`; held-out batches never share a seed with training ones."""
    return random.Random(f"{'held-out' if held_out else 'train'}/{seed}/{index}")


def drill(rng: random.Random, batch_size: int, length: int, num_pairs: int) -> RecallBatch:
    """Bare keys and values side by side, drawn again and again from each sequence's dictionary.

    This dense first lesson is what recall is learned from. With marked pairs in its place, the
    model still guessed among the values that it saw after as many steps.

    Raises:
        ValueError: `length` is odd, or there are more pairs than keys.
    """
    if length % 2 or not 1 <= num_pairs <= len(SYMBOLS):
        raise ValueError(
            f"need an even length and 1 <= num_pairs <= {len(SYMBOLS)}, "
            f"got length {length} and num_pairs {num_pairs}"
        )
    rows = []
    for _ in range(batch_size):
        told = rng.choices(_dictionary(rng, num_pairs), k=length // 2)
        rows.append(_row(bytearray(length), told, range(1, length, 2), _write_bare))
    return _stack(rows)


def needles(
    rng: random.Random,
    batch_size: int,
    length: int,
    num_pairs: int,
    num_queries: int,
    text: bytes,
) -> RecallBatch:
    """Pairs scattered in filler, then questions about `num_queries` of them at the very end.

    Raises:
        ValueError: the pairs and questions do not fit, or there are more pairs than keys.
    """
    if num_pairs > len(SYMBOLS) or not 1 <= num_queries <= num_pairs:
        raise ValueError(
            f"need 1 <= num_queries <= num_pairs <= {len(SYMBOLS)}, "
            f"got num_queries {num_queries} and num_pairs {num_pairs}"
        )
    if (num_pairs + num_queries) * PAIR_LEN > length:
        raise ValueError(
            f"{num_pairs} pairs and {num_queries} questions take "
            f"{(num_pairs + num_queries) * PAIR_LEN} tokens, length is {length}: raise length"
        )
    rows = []
    for _ in range(batch_size):
        pairs = _dictionary(rng, num_pairs)
        told = pairs + rng.sample(pairs, num_queries)
        starts = _scatter(rng, num_pairs, num_queries, length)
        values = [start + PAIR_LEN - 2 for start in starts]
        rows.append(_row(_filler(rng, length, text), told, values, _write_marked))
    return _stack(rows)


def _dictionary(rng: random.Random, num_pairs: int) -> list[Pair]:
    return list(zip(rng.sample(SYMBOLS, num_pairs), rng.choices(SYMBOLS, k=num_pairs)))


def _scatter(rng: random.Random, num_pairs: int, num_queries: int, length: int) -> list[int]:
    first_query = length - num_queries * PAIR_LEN
    gaps = sorted(rng.choices(range(first_query - num_pairs * PAIR_LEN + 1), k=num_pairs))
    pairs = [gap + i * PAIR_LEN for i, gap in enumerate(gaps)]
    return pairs + list(range(first_query, length, PAIR_LEN))


def _filler(rng: random.Random, length: int, text: bytes) -> bytearray:
    filler = bytearray()
    while len(filler) < length:
        piece = rng.choice(_PIECE_LENS)
        start = rng.randrange(len(text) - piece)
        filler += text[start : start + piece].replace(b"@", b" ")
        filler += bytes(rng.choices(_NOISE, k=rng.choice(_PIECE_LENS)))
    return filler[:length]


def _row(
    row: bytearray, told: Sequence[Pair], places: Sequence[int], write: Write
) -> tuple[bytearray, list[int]]:
    source = [-1] * len(row)
    last_told: dict[int, int] = {}
    for (key, value), place in zip(told, places):
        write(row, place, key, value)
        source[place] = last_told.get(key, -1)
        last_told[key] = place
    return row, source


def _write_bare(row: bytearray, place: int, key: int, value: int) -> None:
    row[place - 1 : place + 1] = (key, value)


def _write_marked(row: bytearray, place: int, key: int, value: int) -> None:
    row[place - 2 : place + 2] = (MARK, key, value, ord(";"))


def _stack(rows: list[tuple[bytearray, list]]) -> RecallBatch:
    return RecallBatch(
        ids=torch.tensor([list(row) for row, _ in rows]),
        source=torch.tensor([source for _, source in rows]),
    )

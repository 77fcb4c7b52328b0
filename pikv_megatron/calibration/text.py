"""The windows that are streamed through the model: text, and pairs to recall within it.

A calibration whose text never looks far back knows nothing of what has to be found there.
"""

from pathlib import Path
from typing import Sequence

import torch
from torch import Tensor

from pikv_megatron.checkpoint.tokenizer import Tokenizer
from pikv_megatron.demo.batches import text_bytes
from pikv_megatron.demo.corpus import load_corpus
from pikv_megatron.demo.recall import PAIR_LEN, needles, recall_rng
from pikv_megatron.evaluation.byte_ids import ByteIds
from pikv_megatron.evaluation.tasks.recall import MOST_PAIRS, TOKENS_PER_PAIR


def windows(
    files: Sequence[Path], tokenizer: Tokenizer, count: int, length: int, recall: float
) -> Tensor:
    """[count, length], int64, of which a share `recall`, spread evenly, are pairs to recall.

    Raises:
        ValueError: the text is too short or cannot be read, or recall does not fit.
    """
    number = torch.arange(1, count + 1)
    is_recall = (number * recall).floor() > ((number - 1) * recall).floor()
    num_recall = int(is_recall.sum())
    found = torch.zeros(count, length, dtype=torch.int64)
    if num_recall < count:
        found[~is_recall] = text_windows(files, tokenizer, count - num_recall, length)
    if num_recall:
        found[is_recall] = recall_windows(tokenizer, num_recall, length)
    return found


def recall_windows(tokenizer: Tokenizer, count: int, length: int) -> Tensor:
    """Sequences as the demo model was trained on, which end with a question about every pair.

    Raises:
        ValueError: the tokenizer is not byte-level, or the length is too short for a pair.
    """
    num_pairs = min(MOST_PAIRS, length // TOKENS_PER_PAIR)
    if 2 * num_pairs * PAIR_LEN > length or not num_pairs:
        raise ValueError(f"--length {length} is too short for pairs to recall")
    filler = text_bytes(load_corpus(held_out=False))
    rows = [
        needles(recall_rng(0, i, held_out=False), 1, length, num_pairs, num_pairs, filler).ids
        for i in range(count)
    ]
    return ByteIds(tokenizer).translate(torch.cat(rows))


def text_windows(
    files: Sequence[Path], tokenizer: Tokenizer, count: int, length: int
) -> Tensor:
    """Beginnings of files, one after the other until there are enough.

    Raises:
        ValueError: there are not, or one cannot be read.
    """
    found: list[list[int]] = []
    pending: list[int] = []
    share = 4 * count // max(1, len(files)) + 1  # of a file, so that many are seen
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--text {path}: cannot read it: {error}") from error
        pending += tokenizer.encode(text)[: share * length]
        while len(pending) >= length and len(found) < count:
            found.append(pending[:length])
            pending = pending[length:]
        if len(found) == count:
            return torch.tensor(found)
    raise ValueError(
        f"--windows {count}: the text has {len(found)} windows of {length} tokens only"
    )

"""What the demo model can do, measured on seeds and text that training never saw."""

import math
from dataclasses import dataclass
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pikv_megatron.demo.recall import PAIR_LEN, needles, recall_rng

NUM_BUCKETS = 8
NUM_QUERIES = 8
BATCH_TOKENS = 4096

# Token ids `[b, s]` to logits `[b, s, vocab]`.
Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class RecallResult:
    """Exact recall at one length.

    Attributes:
        length: tokens of a sequence.
        num_pairs: pairs that each told.
        num_queries: questions in all.
        accuracy: share of answers that were the likeliest token.
        by_position: that share by where the pair stood: the first eighth of the context, the
            second, and so on.
    """

    length: int
    num_pairs: int
    num_queries: int
    accuracy: float
    by_position: list[float]


@torch.no_grad()
def evaluate_recall(
    forward: Forward, text: bytes, length: int, num_pairs: int, num_queries: int, seed: int = 0
) -> RecallResult:
    """Ask for single pairs that stand anywhere in a context of filler.

    Args:
        forward: the model.
        text: held-out bytes, part of the filler.
        length: tokens of a sequence.
        num_pairs: pairs in each.
        num_queries: questions in all, at least.
        seed: of the held-out sequences.
    """
    per_sequence = min(NUM_QUERIES, num_pairs)
    batch_size = max(1, BATCH_TOKENS // length)
    is_right, places = [], []
    for index in range(math.ceil(num_queries / (per_sequence * batch_size))):
        rng = recall_rng(seed, index, held_out=True)
        batch = needles(rng, batch_size, length, num_pairs, per_sequence, text)
        answers = batch.is_answer[:, 1:]
        guesses = forward(batch.ids)[:, :-1].argmax(-1)
        is_right.append((guesses == batch.ids[:, 1:])[answers].float())
        places.append(batch.source[:, 1:][answers])
    right = torch.cat(is_right)
    buckets = torch.cat(places) * NUM_BUCKETS // (length - per_sequence * PAIR_LEN)
    by_position = [right[buckets == bucket].mean().item() for bucket in range(NUM_BUCKETS)]
    return RecallResult(length, num_pairs, len(right), right.mean().item(), by_position)


@torch.no_grad()
def text_perplexity(forward: Forward, tokens: Tensor, length: int, max_windows: int) -> float:
    """Perplexity a byte of the second halves of windows, so with half a window of context or more.

    Args:
        forward: the model.
        tokens: token ids `[tokens]` of held-out text.
        length: tokens of a window.
        max_windows: how many windows, spread evenly, are read at most.
    """
    step = max(length // 2, (len(tokens) - length) // max_windows)
    windows = tokens.unfold(0, length, step)[:max_windows]
    half, losses = length // 2, []
    for ids in windows.split(max(1, BATCH_TOKENS // length)):
        logits = forward(ids)[:, half - 1 : -1]
        losses.append(F.cross_entropy(logits.transpose(1, 2), ids[:, half:], reduction="none"))
    return math.exp(torch.cat(losses).mean())

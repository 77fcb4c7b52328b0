"""What is fed and what is judged: recall of hidden pairs, and held-out text.

Legend: b sequences, L tokens of each, P of them its prompt.
"""

import math
from dataclasses import dataclass
from typing import Iterator

import torch
from torch import Tensor

from pikv_megatron.demo.batches import text_bytes
from pikv_megatron.demo.corpus import load_corpus
from pikv_megatron.demo.recall import PAIR_LEN, RecallBatch, needles, recall_rng
from pikv_megatron.evaluation.byte_ids import ByteIds

RECALL, TEXT = "recall", "text"
SEED = 0
# As the demo model was trained, and as its record was measured.
MOST_PAIRS, TOKENS_PER_PAIR, MOST_QUESTIONS = 32, 16, 8


@dataclass(frozen=True)
class Task:
    """Sequences of one length: prompts that are prefilled, and what is fed token by token.

    Attributes:
        ids: [b, L], int64.
        is_judged: [b, L - P], bool, which of the tokens behind the prompt count.
    """

    ids: Tensor
    is_judged: Tensor

    @property
    def prompt_len(self) -> int:
        """P."""
        return self.ids.shape[1] - self.is_judged.shape[1]

    @property
    def num_decode_steps(self) -> int:
        """Of one batch: the last token is judged and not fed."""
        return self.is_judged.shape[1] - 1

    def batches(self, size: int) -> Iterator["Task"]:
        """The same in parts of at most `size` sequences."""
        for part in zip(self.ids.split(size), self.is_judged.split(size)):
            yield Task(*part)


def build_tasks(
    byte_ids: ByteIds, length: int, num_questions: int, num_texts: int
) -> dict[str, Task]:
    """Both tasks, of text and seeds that training never saw.

    Args:
        byte_ids: of the model.
        length: L.
        num_questions: of the recall task, at least: every sequence asks as many.
        num_texts: windows of text, at most.
    """
    corpus = load_corpus(held_out=True)
    return {
        RECALL: _recall(text_bytes(corpus), length, num_questions, byte_ids),
        TEXT: _text(corpus, length, num_texts, byte_ids),
    }


def _recall(text: bytes, length: int, num_questions: int, byte_ids: ByteIds) -> Task:
    """The questions are fed token by token, so that selectors see each of them."""
    num_pairs = min(MOST_PAIRS, length // TOKENS_PER_PAIR)
    per_sequence = min(MOST_QUESTIONS, num_pairs)
    drawn = [
        needles(recall_rng(SEED, i, held_out=True), 1, length, num_pairs, per_sequence, text)
        for i in range(math.ceil(num_questions / per_sequence))
    ]
    batch = RecallBatch(*(torch.cat([getattr(d, f) for d in drawn]) for f in ("ids", "source")))
    prompt_len = length - per_sequence * PAIR_LEN
    return Task(byte_ids.translate(batch.ids), batch.is_answer[:, prompt_len:])


def _text(corpus: Tensor, length: int, num_texts: int, byte_ids: ByteIds) -> Task:
    """Windows as `demo.evaluation.text_perplexity` takes them, of which the second half counts."""
    half = length // 2
    step = max(half, (len(corpus) - length) // num_texts)
    ids = byte_ids.translate(corpus.unfold(0, length, step)[:num_texts])
    return Task(ids, torch.ones(len(ids), length - half, dtype=torch.bool))

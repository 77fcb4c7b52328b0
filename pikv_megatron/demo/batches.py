"""Training batches: rows of the recall task, then rows of text, all of one length."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from pikv_megatron.demo.recall import RecallBatch, drill, needles, recall_rng
from pikv_megatron.demo.settings import Stage
from pikv_megatron.demo.tokenizer import NUM_BYTES


@dataclass
class Batch:
    """Rows to learn from.

    Attributes:
        ids: `[b, s]` token ids.
        is_answer: `[b, s]` true at the answers of the recall task.
        is_text: `[b, s]` true at the tokens of text rows.
    """

    ids: Tensor
    is_answer: Tensor
    is_text: Tensor


class Batches:
    """Makes the batch of every step; the same seed gives the same batches.

    Args:
        corpus: token ids `[tokens]` of the text to learn.
        seed: of all draws.
    """

    def __init__(self, corpus: Tensor, seed: int):
        self.corpus = corpus
        self.filler = text_bytes(corpus)
        self.seed = seed

    def batch(self, stage: Stage, step: int) -> Batch:
        """The batch of one step of a stage; `step` counts over all stages."""
        rng = recall_rng(self.seed, step, held_out=False)
        length = rng.choice(stage.lengths)
        recall = self._recall(rng, stage, length)
        text = random_windows(rng, self.corpus, stage.text_tokens // length, length)
        is_text = torch.zeros(len(recall.ids) + len(text), length, dtype=torch.bool)
        is_text[len(recall.ids) :] = True
        is_answer = torch.cat([recall.is_answer, torch.zeros_like(text, dtype=torch.bool)])
        return Batch(torch.cat([recall.ids, text]), is_answer, is_text)

    def _recall(self, rng: random.Random, stage: Stage, length: int) -> RecallBatch:
        batch_size = stage.recall_tokens // length
        num_pairs = rng.randint(stage.min_pairs, stage.max_pairs)
        if stage.task == "drill":
            return drill(rng, batch_size, length, num_pairs)
        return needles(rng, batch_size, length, num_pairs, max(1, num_pairs // 2), self.filler)


def random_windows(rng: random.Random, corpus: Tensor, count: int, length: int) -> Tensor:
    """`[count, length]` pieces of the corpus, from anywhere in it."""
    starts = torch.tensor([rng.randrange(len(corpus) - length + 1) for _ in range(count)])
    return corpus[starts[:, None] + torch.arange(length)]


def text_bytes(tokens: Tensor) -> bytes:
    """The bytes among token ids `[tokens]`, special tokens left out."""
    return bytes(tokens[tokens < NUM_BYTES].to(torch.uint8).numpy())

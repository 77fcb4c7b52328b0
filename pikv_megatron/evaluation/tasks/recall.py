"""Recall of pairs that are hidden in bytes: what the demo model was trained on."""

import torch

from pikv_megatron.demo.batches import text_bytes
from pikv_megatron.demo.corpus import load_corpus
from pikv_megatron.demo.recall import PAIR_LEN, needles, recall_rng
from pikv_megatron.evaluation.byte_ids import ByteIds
from pikv_megatron.evaluation.task import NOT_JUDGED, Task
from pikv_megatron.evaluation.tasks.base import TaskKind

# As the demo model was trained, and as its record was measured.
MOST_PAIRS, TOKENS_PER_PAIR, MOST_QUESTIONS = 32, 16, 8


class Recall(TaskKind):
    """The value of a key, a byte each; eight questions behind the prompt."""

    name = "recall"
    num_samples = 24

    def unfit(self, source):
        return None if source.is_bytewise else "needs a byte-level tokenizer, as models/demo has"

    def build(self, source, length, num_samples, seed):
        """The questions are fed token by token, so that selectors see each of them."""
        num_pairs = min(MOST_PAIRS, length // TOKENS_PER_PAIR)
        per_sequence = min(MOST_QUESTIONS, num_pairs)
        if not num_pairs:
            raise ValueError(f"--length {length} is too short for the task {self.name}")
        text = text_bytes(load_corpus(held_out=True))
        drawn = [
            needles(recall_rng(seed, i, held_out=True), 1, length, num_pairs, per_sequence, text)
            for i in range(num_samples)
        ]
        ids = ByteIds(source.tokenizer).translate(torch.cat([d.ids for d in drawn]))
        is_answer = torch.cat([d.is_answer for d in drawn])[:, length - per_sequence * PAIR_LEN :]
        answer = torch.where(is_answer, is_answer.cumsum(1) - 1, NOT_JUDGED)
        return [Task(ids, answer)]

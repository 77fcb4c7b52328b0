"""Perplexity of a text, a byte or a token."""

import torch
from torch import Tensor

from pikv_megatron.demo.corpus import load_corpus, stdlib_sources
from pikv_megatron.evaluation.byte_ids import ByteIds
from pikv_megatron.evaluation.task import Task
from pikv_megatron.evaluation.tasks.base import Source, TaskKind

MOST_JUDGED = 512  # tokens of a window


class Text(TaskKind):
    """Windows of a text, whose second half (512 tokens at most) is judged token by token."""

    name = "text"
    num_samples = 16

    def unfit(self, source):
        return None

    def build(self, source, length, num_samples, seed):
        """`seed` shifts the windows."""
        tokens = _tokens(source)
        half = min(length // 2, MOST_JUDGED)
        if len(tokens) < length:
            raise ValueError(f"--text: {len(tokens)} tokens are fewer than --length {length}")
        step = max(half, (len(tokens) - length) // num_samples)
        shift = (seed * half) % max(1, min(step, len(tokens) - length))
        ids = tokens[shift:].unfold(0, length, step)[:num_samples]
        return [Task(ids, torch.arange(half).expand(len(ids), -1))]


def _tokens(source: Source) -> Tensor:
    if source.text is None and source.is_bytewise:
        return ByteIds(source.tokenizer).translate(load_corpus(held_out=True))
    files = stdlib_sources(held_out=True) if source.text is None else [source.text]
    ids: list[int] = []
    for path in files:
        try:
            ids += source.encode(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--text {path}: cannot read it: {error}") from error
        ids.append(source.tokenizer.eod)
    return torch.tensor(ids)

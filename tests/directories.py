"""What routers and selectors are asked with: random pages, for contract tests."""

import torch

from pikv_megatron.relevance import Ask, PageJudge
from pikv_megatron.types import Directory

NUM_HEADS, MOST_COLUMNS = 4, 6


class KnownJudge(PageJudge):
    """Knows what pages have: logits [n, np, M] of pages [n, M]."""

    def __init__(self, logits: torch.Tensor, is_page: torch.Tensor):
        self._logits = logits.masked_fill(~is_page.unsqueeze(1), -torch.inf)
        self._is_page = is_page
        self.margin = 0.3 * torch.rand_like(logits)

    def scores(self):
        return self._logits, self._logits.softmax(2).mean(1).masked_fill(~self._is_page, 0.0)

    def bounds(self):
        return self._logits - self.margin, self._logits + self.margin


class GivenScores(PageJudge):
    """Knows pages' shares of the attention, [n, M], alone."""

    def __init__(self, scores: torch.Tensor):
        self._scores = scores

    def scores(self):
        return None, self._scores

    def bounds(self):
        raise NotImplementedError


def drawn_ask(num_sequences: int, num_ranks: int, num_shards: int, seed: int = 0) -> Ask:
    """Up to six pages a sequence and rank, with random logits; one sequence has none."""
    generator = torch.Generator().manual_seed(seed)
    shape = num_sequences, num_ranks, MOST_COLUMNS
    num_pages = torch.randint(0, MOST_COLUMNS + 1, shape[:2], generator=generator).unsqueeze(2)
    num_pages[-1:] = 0
    is_page = torch.arange(MOST_COLUMNS) < num_pages
    local = torch.randint(0, num_shards // num_ranks, shape, generator=generator)
    shard = local * num_ranks + torch.arange(num_ranks).view(1, -1, 1)
    table = torch.arange(is_page.numel()).view(shape)
    logits = 3 * torch.randn(
        num_sequences, NUM_HEADS, num_ranks * MOST_COLUMNS, generator=generator
    )

    query = torch.randn(num_sequences, NUM_HEADS, 8, generator=generator)
    slots = torch.arange(num_sequences)
    newest = 10 * table % 97
    directory = Directory(table, is_page, shard, num_shards, newest)
    judge = KnownJudge(logits, is_page.flatten(1))
    near = torch.randn(num_sequences, NUM_HEADS, generator=generator)
    return Ask(query, slots, 10 + 7 * slots, directory, judge, near)

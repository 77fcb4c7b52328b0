"""What routers and selectors are asked with: random pages, for contract tests."""

import torch

from pikv_megatron.relevance import Ask
from pikv_megatron.types import Directory

NUM_HEADS, MOST_COLUMNS = 4, 6


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

    def judge(query):
        is_listed = is_page.flatten(1)
        hidden = logits.masked_fill(~is_listed.unsqueeze(1), -torch.inf)
        return hidden, hidden.softmax(2).mean(1).masked_fill(~is_listed, 0.0)

    query = torch.randn(num_sequences, NUM_HEADS, 8, generator=generator)
    slots = torch.arange(num_sequences)
    directory = Directory(table, is_page, shard, num_shards)
    return Ask(query, slots, 10 + 7 * slots, directory, judge)

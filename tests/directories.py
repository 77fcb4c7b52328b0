"""Directories of random pages, for contract tests."""

import torch

from pikv_megatron.types import Directory, MeanKeySketch


def drawn_directory(num_sequences: int, num_ranks: int, num_shards: int) -> Directory:
    """Up to six pages of width 8 a sequence and rank; one sequence has none."""
    generator = torch.Generator().manual_seed(num_sequences)
    num_pages = torch.randint(0, 7, (num_sequences, num_ranks, 1), generator=generator)
    num_pages[-1] = 0
    is_page = torch.arange(6) < num_pages
    table = torch.arange(is_page.numel()).view(is_page.shape)
    rank = torch.arange(num_ranks).view(1, -1, 1)
    local = torch.randint(0, num_shards // num_ranks, is_page.shape, generator=generator)
    shard = torch.where(is_page, local * num_ranks + rank, -1)
    sketch = MeanKeySketch(torch.randn(2, is_page.numel(), 8, generator=generator))
    return Directory(sketch, table, is_page, shard)

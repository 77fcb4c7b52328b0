"""Tells every rank the tokens that the home ranks chose: one small collective a step.

Legend: n sequences of a rank for which a token was chosen.
"""

from collections.abc import Sequence

import deepspeed.comm as dist
import torch

TOKENS_OP = "pikv_tokens"


def exchange_tokens(
    chosen: torch.Tensor, counts: list[int], group: dist.ProcessGroup, told: Sequence[int] = (),
) -> tuple[list[list[list[float]]], list[list[int]]]:
    """Every rank's choices, and what each has to tell besides.

    Args:
        chosen: [n, 2], float64, token and log-probability of this rank's sequences.
        counts: n of each rank; every rank knows all of them.
        group: the expert-parallel group.
        told: numbers of this rank, as many as of any other.

    Returns:
        By rank, n pairs; and by rank, what was told.
    """
    if len(counts) == 1:
        return [chosen.tolist()], [list(told)]
    most, rows = max(counts), -(-len(told) // 2)
    if not most + rows:
        return [[] for _ in counts], [[] for _ in counts]
    padded = chosen.new_zeros(most + rows, 2)
    padded[: chosen.shape[0]] = chosen
    padded[most:].view(-1)[: len(told)] = chosen.new_tensor(told)
    gathered = chosen.new_empty(len(counts) * (most + rows), 2)
    dist.all_gather_into_tensor(gathered, padded, group=group, log_name=TOKENS_OP)
    every = gathered.view(len(counts), most + rows, 2)
    pairs = [own[:count].tolist() for own, count in zip(every, counts)]
    return pairs, every[:, most:].flatten(1)[:, : len(told)].int().tolist()

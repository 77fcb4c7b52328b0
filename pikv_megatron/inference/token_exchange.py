"""Tells every rank the tokens that the home ranks chose: one small collective a step.

Legend: n sequences of a rank for which a token was chosen.
"""

import deepspeed.comm as dist
import torch

TOKENS_OP = "pikv_tokens"


def exchange_tokens(
    chosen: torch.Tensor, counts: list[int], group: dist.ProcessGroup
) -> list[list[list[float]]]:
    """Every rank's choices.

    Args:
        chosen: [n, 2], float64, token and log-probability of this rank's sequences.
        counts: n of each rank; every rank knows all of them.
        group: the expert-parallel group.

    Returns:
        By rank, n pairs.
    """
    if len(counts) == 1:
        return [chosen.tolist()]
    most = max(counts)
    if not most:
        return [[] for _ in counts]
    padded = chosen.new_zeros(most, 2)
    padded[: chosen.shape[0]] = chosen
    gathered = chosen.new_empty(len(counts) * most, 2)
    dist.all_gather_into_tensor(gathered, padded, group=group, log_name=TOKENS_OP)
    every = gathered.view(len(counts), most, 2).tolist()
    return [pairs[:count] for pairs, count in zip(every, counts)]

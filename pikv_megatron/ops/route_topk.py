"""Which shards a query visits: gate, penalty and top-k."""

import torch

from pikv_megatron.ops.backend import kernel_op

MAX_SHARDS = 1024


def route_topk(
    x: torch.Tensor, penalty: torch.Tensor, k: int, gate: torch.Tensor | None = None
) -> torch.Tensor:
    """Mark the k shards with the largest logits less their penalties.

    Serves every router of the paper (arXiv 2508.06526, Table 1) that takes the best of one set of
    logits: they differ in where logits and penalties come from.

    Args:
        x: [n, N] logits, or [n, h] what the gate reads, any floating dtype.
        penalty: [N] or [n, N], subtracted from the logits.
        k: shards to visit, at least 1; N or more visit all.
        gate: [N, h], the logits are x @ gate.T in float32; None: x are the logits.

    Returns:
        [n, N], bool, min(k, N) True in every row. Among equals the lower shard wins; NaN counts
        as -inf, and -inf is taken only where there is nothing else.

    Raises:
        ValueError: k < 1, or N > 1024.

    Example:
        Logits 1, 3, 3, 2, penalties 0, 0, 1, 0, k = 2: 1, 3, 2, 2, so shards 1 and 2.
    """
    num_shards = x.shape[1] if gate is None else gate.shape[0]
    if k < 1:
        raise ValueError(f"k is {k}: a query visits at least one shard, so k must be 1 or more")
    if num_shards > MAX_SHARDS:
        raise ValueError(f"{num_shards} shards: route_topk ranks at most {MAX_SHARDS}")
    kernel = kernel_op("route_topk", x)
    if kernel is not None:
        return kernel(x, penalty, k, gate)
    logits = x.float() if gate is None else x.float() @ gate.float().T
    logits = (logits - penalty).nan_to_num(-torch.inf, torch.inf, -torch.inf)
    best = logits.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, best, True)

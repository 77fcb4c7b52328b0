"""The directions in which keys (or values) of a head differ most.

Legend: ng KV heads, t tokens, w width, r directions.
"""

import torch


def principal_directions(x: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and leading principal directions, head by head.

    x is close to mean + (x - mean) B B^T, and no B with r orthonormal columns leaves a smaller
    squared error (Eckart and Young): it is the sum of the squared singular values beyond the r-th.

    Args:
        x: [ng, t, w], any floating dtype, t at least 1.
        rank: r, at most w.

    Returns:
        mean [ng, w] and B [ng, w, r], float32, the direction with the most variance first.

    Example:
        Points (1, 1), (3, 3) of one head: mean (2, 2), first direction (0.71, 0.71) up to its sign.
    """
    x = x.float()
    mean = x.mean(dim=1)
    centred = x - mean.unsqueeze(1)
    covariance = torch.bmm(centred.transpose(1, 2), centred)
    directions = torch.linalg.eigh(covariance).eigenvectors  # in the order of rising variance
    return mean, directions[:, :, -rank:].flip(2).contiguous()

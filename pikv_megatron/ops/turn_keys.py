"""RoPE (arXiv 2104.09864) for keys that are stored before it.

A table has the cosines and sines of few positions, and those of all others are products: the angle
of position p is that of NEAR * (p // NEAR) and that of p % NEAR.

Legend: w width of a key, w_r channels that turn, its first ones; channel i < w_r / 2 turns with
channel i + w_r / 2.
"""

import torch

from pikv_megatron.types import KeyTurn

NEAR = 64


def angle_table(frequencies: torch.Tensor, num_positions: int) -> torch.Tensor:
    """What `turn_keys` looks up, [positions / NEAR rounded up, and NEAR more, w_r], float32:
    cosines, then sines.

    Args:
        frequencies: [w_r / 2], angles of position 1.
        num_positions: that tokens can have.
    """
    num_far = -(-num_positions // NEAR)
    rows = torch.cat([torch.arange(num_far) * NEAR, torch.arange(NEAR)]).to(frequencies.device)
    angles = rows.double().unsqueeze(1) * frequencies.double()
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


def turn_keys(
    keys: torch.Tensor, position: torch.Tensor, angles: torch.Tensor, back: bool = False
) -> torch.Tensor:
    """Keys [..., w] as they are at their positions.

    Args:
        position: [...], int; negative where nothing is.
        angles: see `angle_table`.
        back: turn keys that are as at their positions to where they were.

    Returns:
        [..., w], float32.

    Example:
        w = w_r = 2, frequency pi / 2, position 1: (1, 0) becomes (0, 1).
    """
    half, place = angles.shape[1] // 2, position.clamp(min=0).long()
    far = angles[place // NEAR].split(half, dim=-1)
    near = angles[len(angles) - NEAR + place % NEAR].split(half, dim=-1)
    cos = far[0] * near[0] - far[1] * near[1]
    sin = far[1] * near[0] + far[0] * near[1]
    if back:
        sin = -sin
    low, high, rest = keys.float().split([half, half, keys.shape[-1] - 2 * half], dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin, rest], dim=-1)


def turn_listed(keys: torch.Tensor, turn: KeyTurn, rows: torch.Tensor) -> torch.Tensor:
    """Keys [..., S, w] of pages whose positions are rows [...] of `turn.position`."""
    return turn_keys(keys, turn.position[rows], turn.angles)

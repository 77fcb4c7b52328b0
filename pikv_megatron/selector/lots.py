"""Random numbers that are functions of what they are for.

A generator's numbers depend on how many were drawn before, and so on who else is in a batch and how
many ranks there are. These do not.
"""

import torch

STEPS = (30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)  # of SplitMix64


def lots(seed: int, *numbers: torch.Tensor) -> torch.Tensor:
    """Uniform in [0, 2^31), int64, in the shape that `numbers`, int64, have together."""
    state = _mixed(torch.full_like(numbers[0], seed))
    for number in numbers:
        state = _mixed(state + number)
    return (state >> 33) & 0x7FFFFFFF


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """A bijection of int64, wrapping round, in which every bit depends on every other."""
    x = x - 0x61C8864680B583EB
    for shift, factor in STEPS:
        x = (x ^ (x >> shift & (1 << (64 - shift)) - 1)) * factor
    return x ^ (x >> 31 & (1 << 33) - 1)

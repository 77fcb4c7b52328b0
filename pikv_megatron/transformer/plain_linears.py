"""Megatron's parallel linear layers without the steps that only training needs.

Each of those is a Python function of autograd: a fifth of what a decode step's attention costs on
one rank. Parameters, state-dict keys and sharded keys are the stock layer's.
"""

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear


class PlainColumnParallelLinear(ColumnParallelLinear):
    """`ColumnParallelLinear` that is one product where it is whole and no gradient is wanted."""

    def forward(self, input_, weight=None, runtime_gather_output=None):
        if not _is_plain(self):
            return super().forward(input_, weight, runtime_gather_output)
        return _output(self, input_, self.weight if weight is None else weight)


class PlainRowParallelLinear(RowParallelLinear):
    """`RowParallelLinear` likewise."""

    def forward(self, input_):
        return _output(self, input_, self.weight) if _is_plain(self) else super().forward(input_)


# What a spec names, and what stands for it.
PLAIN = {
    ColumnParallelLinear: PlainColumnParallelLinear, RowParallelLinear: PlainRowParallelLinear
}


def make_plain(linear: torch.nn.Module) -> None:
    """Turn a stock linear layer, which no spec names, into what stands for it."""
    linear.__class__ = PLAIN.get(type(linear), type(linear))


def _is_plain(linear: ColumnParallelLinear | RowParallelLinear) -> bool:
    return not torch.is_grad_enabled() and linear.tp_group.size() == 1


def _output(
    linear: ColumnParallelLinear | RowParallelLinear, rows: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The output and the bias that is left to the caller."""
    if linear.skip_bias_add:
        return F.linear(rows, weight), linear.bias
    return F.linear(rows, weight, linear.bias), None

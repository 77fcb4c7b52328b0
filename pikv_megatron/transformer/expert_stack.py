"""The weights of a rank's experts one behind the other, so that one product serves all of them.

Megatron keeps each expert's weights as parameters of their own. They stay that, with their names
and their state-dict keys; only their memory is moved into one block.

Legend: n rows, E local experts, h hidden size, f width of an expert (2f where it is gated).
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig

from pikv_megatron.ops.backend import kernel_op

# What `grouped_mm` takes, and what it needs of a row's bytes.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALIGNMENT = 16
# Rows an expert, as a mean, up to which one kernel for all of them is faster than `grouped_mm` on a
# CPU, by up to 11 times: processors have instructions for products of 16-bit numbers.
FEW_ROWS, FEW_NARROW_ROWS = 16, 4


@dataclass
class ExpertStack:
    """
    Attributes:
        config: of the experts.
        parameters: of each linear layer, the experts' own.
        weight1: [E, 2f or f, h].
        weight2: [E, h, f].
        bias1: [E, 2f or f], or None.
        bias2: [E, h], or None.
    """

    config: TransformerConfig
    parameters: list[list[torch.nn.Parameter]]
    weight1: torch.Tensor
    weight2: torch.Tensor
    bias1: torch.Tensor | None
    bias2: torch.Tensor | None

    @classmethod
    def of(cls, experts: SequentialMLP) -> "ExpertStack | None":
        """Move the experts' weights together.

        None where an expert is more than two products and an activation, as one with an adapter is,
        or is of a shape or type that `grouped_mm` does not take.
        """
        local = list(experts.local_experts)
        if not all(map(is_plain, local)) or not _fits(local[0]):
            return None
        parameters = _parameters(local)
        stacks = [_together(own) for own in parameters]
        return cls(local[0].config, parameters, *(stacks + [None, None])[:4])

    @property
    def is_current(self) -> bool:
        """Whether the parameters still lie here: casting or moving a model gives them new memory.

        All are cast or none, so the first and the last are asked.
        """
        return all(
            _lies_in(own[index], stack[index])
            for own, stack in zip(self.parameters, self._stacks) for index in (0, -1)
        )

    def is_of(self, experts: SequentialMLP) -> bool:
        """Whether it is what `of` would make, every expert and every parameter looked at."""
        local = list(experts.local_experts)
        return all(map(is_plain, local)) and all(
            parameter is own and _lies_in(own, place)
            for parameters, owns, stack in zip(_parameters(local), self.parameters, self._stacks)
            for parameter, own, place in zip(parameters, owns, stack)
        )

    def sums_of_few(
        self, tokens: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor | None:
        """Sum each token's experts [t, h]; None where no kernel does, or not faster than `outputs`.

        Args:
            tokens: [t, h].
            experts: [t, k], local numbers; E and above for those of other ranks.
            weights: [t, k], of the experts' outputs.
        """
        few = FEW_ROWS if tokens.dtype == torch.float32 else FEW_NARROW_ROWS
        is_served = self.is_swiglu and tokens.dtype == self.weight1.dtype
        if not is_served or experts.numel() > few * len(self.weight2):
            return None
        kernel = kernel_op("chosen_experts", tokens)
        return kernel and kernel(tokens, experts, weights, self.weight1, self.weight2)

    def outputs(
        self, rows: torch.Tensor, ends: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """What `SequentialMLP` returns, [n, h]; nothing is said of rows behind the last end.

        Args:
            rows: [n, h], one expert's behind the other's.
            ends: [E], int32, where each expert's rows end.
            experts: [n], local numbers; looked at where the experts have biases.
            weights: [n], of each row's output.
        """
        hidden = F.grouped_mm(rows, self.weight1.transpose(1, 2), offs=ends)
        if self.bias1 is not None:
            # Rows of other ranks' experts are computed with nothing and read by nobody.
            experts = experts.clamp(max=len(self.bias1) - 1)
            hidden += self.bias1[experts]
        weights = weights.unsqueeze(1)
        hidden = (activate(hidden, self.config) * weights).to(rows.dtype)
        output = F.grouped_mm(hidden, self.weight2.transpose(1, 2), offs=ends)
        return output if self.bias2 is None else output + self.bias2[experts] * weights

    @cached_property
    def is_swiglu(self) -> bool:
        """Whether an expert is down(silu(gate(x)) * up(x)) and nothing else."""
        config = self.config
        return (
            config.gated_linear_unit and config.activation_func is F.silu
            and config.activation_func_clamp_value is None and not config.glu_linear_offset
            and self.bias1 is None and self.bias2 is None
        )

    @property
    def _stacks(self) -> list[torch.Tensor]:
        every = (self.weight1, self.weight2, self.bias1, self.bias2)
        return [stack for stack in every if stack is not None]


def is_plain(expert: MLP) -> bool:
    """Whether it is two products and an activation.

    Asked again at every prompt, as adapters and quantization replace an expert's linear layers
    later.
    """
    config = expert.config
    return (
        type(expert) is MLP
        and type(expert.linear_fc1) is ColumnParallelLinear
        and type(expert.linear_fc2) is RowParallelLinear
        and not config.use_te_activation_func
    )


def activate(hidden: torch.Tensor, config: TransformerConfig) -> torch.Tensor:
    """[n, f], from [n, 2f] where the unit is gated."""
    if not config.gated_linear_unit:
        return config.activation_func(hidden)
    gate, linear = hidden.chunk(2, dim=1)
    limit = config.activation_func_clamp_value
    if limit is not None:
        gate, linear = gate.clamp(max=limit), linear.clamp(-limit, limit)
    if config.glu_linear_offset:
        linear = linear + config.glu_linear_offset
    return config.activation_func(gate) * linear


def _fits(expert: MLP) -> bool:
    """`grouped_mm` takes it. On CUDA it waits for the host but in bfloat16."""
    weights = expert.linear_fc1.weight, expert.linear_fc2.weight
    return weights[0].dtype in DTYPES and all(
        weight.shape[1] * weight.element_size() % ALIGNMENT == 0 for weight in weights
    )


def _parameters(experts: list[MLP]) -> list[list[torch.nn.Parameter]]:
    """Weights of the first and second products, then biases if there are any."""
    layers = [[getattr(e, name) for e in experts] for name in ("linear_fc1", "linear_fc2")]
    every = [
        [getattr(linear, name) for linear in linears]
        for name in ("weight", "bias") for linears in layers
    ]
    return [own for own in every if own[0] is not None]


def _lies_in(parameter: torch.nn.Parameter, place: torch.Tensor) -> bool:
    return parameter.data_ptr() == place.data_ptr() and parameter.dtype == place.dtype


def _together(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    stack = torch.stack([parameter.data for parameter in parameters])
    for parameter, place in zip(parameters, stack):
        parameter.data = place
    return stack

"""The outputs of the experts that got a token, and of no others.

Megatron's `SequentialMLP` makes the same calls for an expert without tokens as for any other.
Gathering each token's weights into one batched product is no way out: it copies an expert's weights
for every token that chose it, which took 2 to 16 times as long on a CPU as the loop below.

Legend: t tokens, n pairs of a token and a chosen expert, E local experts, h hidden size, f width of
an expert (2f where it is gated).
"""

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig


def chosen_experts_output(
    experts: SequentialMLP, tokens: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor
) -> torch.Tensor:
    """Sum each token's experts, [t, h]; all experts are local.

    Args:
        experts: the layer's.
        tokens: [t, h].
        weights: [t, E], of an expert's output.
        chosen: [t, E], bool, which experts a token goes through.
    """
    by_expert = chosen.t()
    counts = by_expert.sum(1).tolist()
    # Sized by the counts, as it would wait for the device once more to find its own size.
    expert, token = torch.nonzero_static(by_expert, size=sum(counts)).unbind(1)
    rows = sorted_outputs(experts, tokens[token], counts, weights[token, expert])
    return torch.zeros_like(tokens).index_add_(0, token, rows)


def sorted_outputs(
    experts: SequentialMLP, rows: torch.Tensor, counts: list[int], weights: torch.Tensor
) -> torch.Tensor:
    """What `SequentialMLP` returns, [n, h].

    Args:
        experts: the local ones.
        rows: [n, h], one expert's behind the other's.
        counts: rows of each expert, E of them.
        weights: [n], of each row's output.
    """
    parts = zip(experts.local_experts, rows.split(counts), weights.split(counts))
    outputs = [_output(expert, *part) for expert, *part in parts if len(part[0])]
    return torch.cat(outputs) if outputs else rows


def _output(expert: MLP, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """One expert's rows, [n, h]."""
    if not _is_plain(expert):
        return expert(rows, weights)[0]
    fc1, fc2, weights = expert.linear_fc1, expert.linear_fc2, weights.unsqueeze(1)
    hidden = _activate(F.linear(rows, fc1.weight, fc1.bias), expert.config)
    output = F.linear((hidden * weights).to(rows.dtype), fc2.weight)
    return output if fc2.bias is None else output.add_(fc2.bias * weights)


def _is_plain(expert: MLP) -> bool:
    """Whether it is two products and an activation.

    Asked at every step, as adapters and quantization replace an expert's linear layers later.
    """
    config = expert.config
    return (
        type(expert) is MLP
        and type(expert.linear_fc1) is ColumnParallelLinear
        and type(expert.linear_fc2) is RowParallelLinear
        and not config.use_te_activation_func
    )


def _activate(hidden: torch.Tensor, config: TransformerConfig) -> torch.Tensor:
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

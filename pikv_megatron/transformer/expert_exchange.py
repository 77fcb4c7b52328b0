"""Every rank runs its own experts for the tokens of all ranks, for the few tokens of decoding.

Megatron's dispatcher takes four collectives a layer: one tells the counts, which the host then
reads to size the others. In decoding each rank's plan holds the counts of all, so two will do.

Legend: t tokens of this rank, T tokens of the rank that feeds most, E experts on all ranks, h
hidden size.
"""

import deepspeed.comm as dist
import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_layer import MoELayer

from pikv_megatron.parallel.packet import pack_rows, unpack_rows
from pikv_megatron.transformer.lean_experts import chosen_experts_output

GATHER_OP, COMBINE_OP = "moe_gather", "moe_combine"


def exchanged_output(
    layer: MoELayer, tokens: torch.Tensor, probs: torch.Tensor, most: int
) -> torch.Tensor:
    """Sum each token's experts on all ranks, [t, h].

    Args:
        layer: this rank's part.
        tokens: [t, h].
        probs: [t, E], weights of the experts, 0 for those that a token does not go through.
        most: T, the same on every rank.
    """
    packed = F.pad(pack_rows([tokens, probs]), (0, 0, 0, most - len(tokens)))
    gathered = packed.new_empty(layer.ep_group.size() * most, packed.shape[1])
    dist.all_gather_into_tensor(gathered, packed, group=layer.ep_group, log_name=GATHER_OP)
    rows, weights = unpack_rows(gathered, [tokens, probs])
    first = layer.local_expert_indices[0]
    own = weights[:, first : first + layer.num_local_experts]
    parts = chosen_experts_output(layer.experts, rows, own, own != 0)
    home = torch.empty_like(parts)
    dist.all_to_all_single(home, parts, group=layer.ep_group, log_name=COMBINE_OP)
    return home.view(-1, most, tokens.shape[1])[:, : len(tokens)].sum(dim=0)

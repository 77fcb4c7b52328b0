"""Every rank runs its own experts for the tokens of all ranks, for the few tokens of decoding.

Megatron's dispatcher takes four collectives a layer: one tells the counts, which the host then
reads to size the others. In decoding each rank's plan holds the counts of all, so two will do.

Legend: t tokens of this rank, T tokens of the rank that feeds most, h hidden size.
"""

import deepspeed.comm as dist
import torch
import torch.nn.functional as F

from pikv_megatron.parallel.packet import pack_rows, unpack_rows
from pikv_megatron.transformer.expert_choice import ExpertChoice
from pikv_megatron.transformer.lean_experts import LeanExperts

GATHER_OP, COMBINE_OP = "moe_gather", "moe_combine"


def exchanged_output(
    experts: LeanExperts, tokens: torch.Tensor, choice: ExpertChoice, most: int,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """Sum each token's experts on all ranks, [t, h].

    Args:
        experts: of this rank.
        tokens: [t, h].
        choice: of these tokens.
        most: T, the same on every rank.
        group: the expert-parallel one.
    """
    fields = [tokens, choice.weights, choice.experts.int()]
    packed = F.pad(pack_rows(fields), (0, 0, 0, most - len(tokens)))
    gathered = packed.new_empty(group.size() * most, packed.shape[1])
    dist.all_gather_into_tensor(gathered, packed, group=group, log_name=GATHER_OP)
    rows, weights, chosen = unpack_rows(gathered, fields)
    parts = experts.chosen_outputs(rows, ExpertChoice(chosen.long(), weights))
    home = torch.empty_like(parts)
    dist.all_to_all_single(home, parts, group=group, log_name=COMBINE_OP)
    return home.view(-1, most, tokens.shape[1])[:, : len(tokens)].sum(dim=0)

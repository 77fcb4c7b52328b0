"""Megatron's MoE layer, whose experts cost little where few tokens come: in decoding.

Legend: sq tokens of a row, b rows of the batch, t = sq * b, E experts on all ranks, h hidden size.
"""

from typing import Protocol

import deepspeed.comm as dist
import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter

from pikv_megatron.transformer.expert_choice import ExpertChoice, choose_experts
from pikv_megatron.transformer.expert_exchange import exchanged_output
from pikv_megatron.transformer.lean_experts import LeanExperts

# Options that change what reaches the experts, or that work between Megatron's own steps.
UNSUPPORTED = (
    "fp8",
    "fp4",
    "moe_latent_size",
    "moe_shared_expert_overlap",
    "moe_apply_probs_on_input",
)

# Tokens of all ranks, padding included: with more, each rank had better get only its own.
MOST_EXCHANGED = 512


class LeanContext(Protocol):
    """What a cache tells of a step.

    Attributes:
        decode_counts: tokens that each rank of `ep_group` feeds, where all of them only decode;
            None where some rank feeds a prompt.
        ep_group: the ranks; None for one.
    """

    decode_counts: list[int] | None
    ep_group: dist.ProcessGroup | None


class LeanMoELayer(MoELayer):
    """`MoELayer` that, given a cache, runs only experts with tokens; see `make_lean`.

    Experts are chosen as Megatron does, and tokens travel by its dispatcher, but between ranks that
    only decode. Without a cache it is the stock layer.

    Attributes:
        choice: the experts of the last tokens that were fed with a cache.
    """

    choice: ExpertChoice | None = None

    def forward(
        self, hidden_states, *args, context: LeanContext | None = None, **kwargs
    ):
        if context is None:
            return super().forward(hidden_states, *args, **kwargs)
        if context.decode_counts is None:
            self.lean_experts.check()
        shared = self.shared_experts_compute(hidden_states)
        is_alone = self.token_dispatcher.ep_size * self.token_dispatcher.tp_size == 1
        most = 0 if is_alone else self._most_exchanged(context)
        if not (is_alone or most):
            return self._dispatched(hidden_states, shared), None
        self.choice = choose_experts(self.router, hidden_states)
        tokens = hidden_states.flatten(0, 1)
        if is_alone:
            output = self.lean_experts.chosen_outputs(tokens, self.choice)
        else:
            output = exchanged_output(self.lean_experts, tokens, self.choice, most, self.ep_group)
        output = output.view(hidden_states.shape)
        return (output if shared is None else output + shared), None

    def _most_exchanged(self, context: LeanContext) -> int:
        """Tokens of the rank that feeds most, 0 if Megatron's dispatcher is to be taken."""
        dispatcher = self.token_dispatcher
        is_split = self.tp_group.size() * dispatcher.tp_size > 1
        if context.decode_counts is None or is_split or context.ep_group is not self.ep_group:
            return 0
        most = max(1, *context.decode_counts)
        return most if most * dispatcher.ep_size <= MOST_EXCHANGED else 0

    def _dispatched(
        self, hidden_states: torch.Tensor, shared: torch.Tensor | None
    ) -> torch.Tensor:
        """`MoELayer.forward`, [sq, b, h], but for the experts."""
        probs, routing_map = self.route(hidden_states)
        self.choice = ExpertChoice.of(probs, self.router.topk)
        tokens, probs = self.dispatch(*self.preprocess(hidden_states, probs, routing_map))
        rows, counts, weights = self.token_dispatcher.dispatch_postprocess(tokens, probs)
        output = self.lean_experts.sorted_outputs(rows, counts, weights)
        output = self.combine(self.token_dispatcher.combine_preprocess(output))
        return self.postprocess(output, shared)


def make_lean(mlp: torch.nn.Module) -> None:
    """Turn a stock MoE layer into a `LeanMoELayer`; its parameters and submodules stay.

    Somebody else's MoE layer, router or experts are left alone, and so is a layer whose
    configuration asks for something that a lean one would pass over.
    """
    if type(mlp) is not MoELayer or any(getattr(mlp.config, name, None) for name in UNSUPPORTED):
        return
    if type(mlp.router) is TopKRouter and type(mlp.experts) is SequentialMLP:
        mlp.__class__ = LeanMoELayer
        mlp.lean_experts = LeanExperts(mlp.experts, mlp.local_expert_indices[0])

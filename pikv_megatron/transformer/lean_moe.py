"""Megatron's MoE layer, whose experts cost little where few tokens come: in decoding.

Legend: sq tokens of a row, b rows of the batch, t = sq * b, E experts on all ranks, h hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter

from pikv_megatron.transformer.context import PiKVInferenceContext
from pikv_megatron.transformer.expert_exchange import exchanged_output
from pikv_megatron.transformer.lean_experts import chosen_experts_output, sorted_outputs

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


class LeanMoELayer(MoELayer):
    """`MoELayer` that inside `lean_step` runs only experts with tokens; see `make_lean`.

    Routing is Megatron's, and so is the dispatcher, but between ranks that only decode. Outside
    `lean_step` it is the stock layer.
    """

    _context: PiKVInferenceContext | None = None

    @contextmanager
    def lean_step(self, context: PiKVInferenceContext) -> Iterator[None]:
        """What is fed meanwhile runs lean; `context` plans the step before it gets here."""
        self._context = context
        try:
            yield
        finally:
            self._context = None

    def forward(self, hidden_states, intermediate_tensors=None, padding_mask=None):
        is_whole = intermediate_tensors is None and padding_mask is None
        if self._context is None or not is_whole:
            return super().forward(hidden_states, intermediate_tensors, padding_mask)
        shared = self.shared_experts_compute(hidden_states)
        probs, routing_map = self.route(hidden_states)
        tokens = hidden_states.flatten(0, 1)
        if self.token_dispatcher.ep_size * self.token_dispatcher.tp_size == 1:
            output = chosen_experts_output(self.experts, tokens, probs, routing_map)
        elif most := self._most_exchanged():
            output = exchanged_output(self, tokens, probs, most)
        else:
            return self._dispatched(hidden_states, probs, routing_map, shared), None
        output = output.view(hidden_states.shape)
        return (output if shared is None else output + shared), None

    def _most_exchanged(self) -> int:
        """Tokens of the rank that feeds most, 0 if Megatron's dispatcher is to be taken."""
        plan, dispatcher = self._context.plan, self.token_dispatcher
        is_split = self.tp_group.size() * dispatcher.tp_size > 1
        is_fed_in_parts = self.config.mlp_chunks_for_prefill > 1
        # The plan counts the tokens of one forward pass, by the ranks of the context's group.
        if plan.prefill.is_anywhere or is_split or is_fed_in_parts:
            return 0
        most = max(1, *plan.decode.counts)
        fits = most * dispatcher.ep_size <= MOST_EXCHANGED
        return most if fits and self._context.ep_group is self.ep_group else 0

    def _dispatched(
        self, hidden_states: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor,
        shared: torch.Tensor | None,
    ) -> torch.Tensor:
        """`MoELayer.forward` behind the router, [sq, b, h]; probs and routing_map [t, E]."""
        tokens, probs = self.dispatch(*self.preprocess(hidden_states, probs, routing_map))
        rows, counts, weights = self.token_dispatcher.dispatch_postprocess(tokens, probs)
        output = sorted_outputs(self.experts, rows, counts.tolist(), weights)
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

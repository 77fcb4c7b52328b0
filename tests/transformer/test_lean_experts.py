"""Which experts a lean MoE layer runs, and when it is the stock layer."""

import pytest
import torch
from lean_pairs import PIKV, begin_step, moe_pair
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from parity_models import build, cached_logits

from pikv_megatron import PiKVConfig, PiKVInferenceContext
from pikv_megatron.transformer.lean_moe import LeanMoELayer, make_lean


def lean_pair(pg, **changes) -> tuple[MoELayer, LeanMoELayer, PiKVInferenceContext]:
    """A pair in the middle of a step that feeds a prompt."""
    stock, lean, context = moe_pair(pg, **changes)
    begin_step(context, [[50]])
    return stock, lean, context


def experts_that_ran(layer: LeanMoELayer, context: PiKVInferenceContext, rows: int) -> int:
    ran = []
    handles = [
        expert.register_forward_hook(lambda *_, j=j: ran.append(j))
        for j, expert in enumerate(layer.experts.local_experts)
    ]
    with torch.no_grad():
        layer(torch.randn(rows, 1, 32), context=context)
    for handle in handles:
        handle.remove()
    return len(set(ran))


def test_experts_without_a_token_are_left_out(one_rank, monkeypatch):
    _, *lean = lean_pair(one_rank)
    assert experts_that_ran(*lean, 1) == 0  # their weights are read, past their modules
    monkeypatch.setattr("pikv_megatron.transformer.expert_stack.is_plain", lambda expert: False)
    assert experts_that_ran(*lean, 1) == 2 and experts_that_ran(*lean, 300) == 8


class Doubled(torch.nn.Module):
    """A linear layer in an adapter that shows the weight of what it wraps."""

    def __init__(self, linear: torch.nn.Module):
        super().__init__()
        self.linear = linear
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x):
        output, bias = self.linear(x)
        return 2 * output, bias


class ScaledMLP(MLP):
    """An expert of somebody else's."""

    def forward(self, *args, **kwargs):
        output, bias = super().forward(*args, **kwargs)
        return 3 * output, bias


@pytest.mark.parametrize(
    "change", [
        lambda expert: setattr(expert, "linear_fc1", Doubled(expert.linear_fc1)),
        lambda expert: setattr(expert, "linear_fc2", Doubled(expert.linear_fc2)),
        lambda expert: setattr(expert, "__class__", ScaledMLP),
    ],
)
@torch.no_grad()
def test_experts_that_somebody_changed_are_called_themselves(one_rank, change):
    stock, lean, context = lean_pair(one_rank)
    for layer in (stock, lean):
        change(layer.experts.local_experts[3])
    hidden_states = torch.randn(40, 1, 32)
    output = lean(hidden_states, context=context)[0]
    torch.testing.assert_close(output, stock(hidden_states)[0])


@pytest.mark.parametrize(
    "changes", [
        {"activation_func_clamp_value": 0.1},
        {"glu_linear_offset": 1.0},
        {"bias_activation_fusion": True},
        {"moe_router_dtype": "fp64"},
        {"moe_router_num_groups": 4, "moe_router_group_topk": 2},
        {"moe_router_topk_scaling_factor": 2.5},
        {"moe_router_load_balancing_type": "sinkhorn"},
        {"moe_token_dispatcher_type": "allgather"},
        {"moe_expert_capacity_factor": 0.5},
        {"moe_pad_expert_input_to_capacity": True, "moe_expert_capacity_factor": 0.5},
    ],
    ids=lambda changes: next(iter(changes)),
)
@torch.no_grad()
def test_other_options_change_nothing(one_rank, changes):
    stock, lean, context = lean_pair(one_rank, **changes)
    for rows in (1, 50):
        hidden_states = torch.randn(rows, 1, 32)
        output = lean(hidden_states, context=context)[0]
        torch.testing.assert_close(output, stock(hidden_states)[0])


@torch.no_grad()
def test_sixteen_bit_experts_are_as_exact_as_stock_ones(one_rank):
    """They round at other places, and not more often."""
    changes = {"params_dtype": torch.bfloat16, "bf16": True}
    stock, lean, context = lean_pair(one_rank, **changes)
    inputs = [torch.randn(rows, 1, 32, dtype=torch.bfloat16) for rows in (1, 50)]
    outputs = [[layer(x, **given)[0].double() for x in inputs]
               for layer, given in ((stock, {}), (lean, {"context": context}))]
    exact = [stock.double()(x.double())[0] for x in inputs]
    for of_stock, of_lean, wanted in zip(*outputs, exact):
        assert (of_lean - wanted).norm() <= 1.05 * (of_stock - wanted).norm()


@pytest.mark.parametrize(
    "changes", [
        {"moe_apply_probs_on_input": True, "moe_router_topk": 1, "moe_router_pre_softmax": True},
        {"moe_shared_expert_intermediate_size": 24, "moe_shared_expert_overlap": True},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_layers_that_are_not_covered_stay_stock(one_rank, changes):
    assert type(moe_pair(one_rank, **changes)[1]) is MoELayer


@torch.no_grad()
def test_the_weights_of_the_moment_are_read(one_rank):
    """After loading, assigning and casting, which a copy of the weights would miss."""
    stock, lean, context = lean_pair(one_rank)
    other = build(one_rank, None, seed=2).decoder.layers[0].mlp
    hidden_states = torch.randn(9, 1, 32)
    for assign, layer in ((False, other), (True, stock)):
        lean.load_state_dict(layer.state_dict(), strict=True, assign=assign)
        output = lean(hidden_states, context=context)[0]
        torch.testing.assert_close(output, layer(hidden_states)[0])
    stock.load_state_dict(lean.state_dict(), strict=True)
    stock, lean = stock.double(), lean.double()
    hidden_states = hidden_states.double()
    output = lean(hidden_states, context=context)[0]
    torch.testing.assert_close(output, stock(hidden_states)[0])


def test_without_a_cache_the_layer_is_stock_bit_for_bit(one_rank):
    stock, lean, context = lean_pair(one_rank)
    hidden_states = torch.randn(40, 1, 32, requires_grad=True)
    with torch.no_grad():
        lean(hidden_states, context=context)
    outputs = [layer(hidden_states)[0] for layer in (stock, lean)]
    assert torch.equal(*outputs)
    gradients = [torch.autograd.grad(output.sum(), hidden_states)[0] for output in outputs]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("is_on", [True, False])
def test_the_switch(one_rank, is_on):
    pikv = PiKVConfig(**PIKV.model_dump(exclude_unset=True), lean_experts=is_on)
    model = build(one_rank, pikv)
    assert {type(layer.mlp) for layer in model.decoder.layers} == {
        LeanMoELayer if is_on else MoELayer
    }


@pytest.mark.parametrize("is_training", [False, True])
def test_only_a_pikv_context_makes_a_step_lean(one_rank, monkeypatch, is_training):
    lean_steps = []
    monkeypatch.setattr(
        "pikv_megatron.transformer.lean_experts.LeanExperts.chosen_outputs",
        lambda experts, tokens, *_: lean_steps.append(1) or tokens,
    )
    model = build(one_rank, PIKV)
    model.train(is_training)(torch.arange(9)[None], torch.arange(9)[None], None)
    assert not lean_steps
    context = PiKVInferenceContext.for_model(model, PIKV, 1, 64)
    cached_logits(model.eval(), context, [list(range(12))], [10], chunk=9)
    assert len(lean_steps) == 2 * 4  # layers, steps


class OwnMoELayer(MoELayer):
    """Somebody else's."""


def test_layers_of_somebody_else_are_left_alone(one_rank):
    layer = moe_pair(one_rank)[0]
    layer.__class__ = OwnMoELayer
    make_lean(layer)
    assert type(layer) is OwnMoELayer

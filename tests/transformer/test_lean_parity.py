"""Lean MoE layers compute what stock ones do, on one rank and between several."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from lean_pairs import begin_step, moe_pair
from megatron.core.transformer.moe.moe_layer import MoELayer
from ranks import run_ranks

from pikv_megatron import process_groups
from pikv_megatron.inference.traffic import TrafficMeter
from pikv_megatron.transformer import lean_moe
from pikv_megatron.transformer.expert_exchange import GATHER_OP
from pikv_megatron.transformer.lean_moe import LeanMoELayer


def relu_squared(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x).square()


@st.composite
def layers(draw, may_have_biases: bool):
    """Changes of the configuration that make an MoE layer."""
    num_experts = draw(st.sampled_from([4, 8, 32]))
    router = {}
    if draw(st.booleans()):
        router = dict(moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True)
    topk = draw(st.integers(1, 4))
    shared = draw(st.sampled_from([None, 24]))
    return dict(
        num_moe_experts=num_experts, moe_router_topk=topk,
        moe_router_pre_softmax=topk == 1 and not router,
        gated_linear_unit=draw(st.booleans()),
        activation_func=draw(st.sampled_from([F.silu, F.gelu, relu_squared])),
        add_bias_linear=may_have_biases and shared is None and draw(st.booleans()),
        moe_shared_expert_intermediate_size=shared,
        moe_shared_expert_gate=shared is not None and draw(st.booleans()),
        moe_expert_capacity_factor=draw(st.sampled_from([None, None, 0.5])), **router,
    )


@st.composite
def steps(draw, num_ranks: int):
    """Tokens of each row on each rank; a rank without rows feeds a token of padding."""
    if draw(st.booleans()):
        return [[1] * draw(st.sampled_from([0, 1, 2, 3, 7, 40])) for _ in range(num_ranks)]
    return [[draw(st.integers(1, 300))] for _ in range(num_ranks)]


def check_parity(pg, changes: dict, counts: list[list[int]], seed: int) -> None:
    stock, lean, context = moe_pair(pg, **changes)
    assert type(stock) is MoELayer and type(lean) is LeanMoELayer
    begin_step(context, counts)
    generator = torch.Generator().manual_seed(seed + pg.ep.rank())
    shape = (context.plan.num_padded, 1, 32)
    hidden_states = torch.randn(shape, generator=generator)
    with torch.no_grad():
        expected = stock(hidden_states)[0]
        output, bias = lean(hidden_states, context=context)
    assert bias is None and output.shape == shape
    torch.testing.assert_close(output, expected, atol=2e-5, rtol=2e-5)


def run_parity(expert_parallel: int, tensor_parallel: int, num_examples: int) -> None:
    with process_groups(expert_parallel, tensor_parallel, timeout_seconds=60) as pg:
        # Every rank draws the same cases: derandomized, and never shrunk on one rank alone.
        @settings(
            max_examples=num_examples, deadline=None, derandomize=True, database=None,
            phases=[Phase.generate], suppress_health_check=list(HealthCheck),
        )
        # Megatron refuses biases of experts that tensor parallelism splits.
        @given(layers(tensor_parallel == 1), steps(expert_parallel), st.integers(0, 1000))
        def check(changes, counts, seed):
            check_parity(pg, changes, counts, seed)

        check()


@pytest.mark.parametrize(
    "expert_parallel, tensor_parallel, num_examples",
    [(1, 1, 60), (2, 1, 25), (4, 1, 12), (1, 2, 12), (2, 2, 8)],
)
def test_outputs_equal_those_of_the_stock_layer(expert_parallel, tensor_parallel, num_examples):
    num_ranks = expert_parallel * tensor_parallel
    run_ranks(run_parity, num_ranks, expert_parallel, tensor_parallel, num_examples, timeout=280)


def gathered_rows(pg, counts: list[list[int]], **changes) -> int:
    """Rows that this rank sent to be gathered by all."""
    _, lean, context = moe_pair(pg, **changes)
    begin_step(context, counts)
    row_bytes = (32 + 2 * 2) * 4  # a token, its experts and their weights
    meter = TrafficMeter((GATHER_OP,))
    meter.start()
    with torch.no_grad():
        lean(torch.randn(context.plan.num_padded, 1, 32), context=context)
    meter.stop()
    return meter.bytes_by_op()[GATHER_OP] // row_bytes


def exchanges() -> list[int]:
    with process_groups(2, timeout_seconds=60) as pg:
        decoding, prompt = [[1, 1, 1], []], [[1, 1, 1], [2]]
        rows = [gathered_rows(pg, counts) for counts in (decoding, [[], []], prompt)]
        lean_moe.MOST_EXCHANGED = 5
        return rows + [gathered_rows(pg, decoding)]


def test_ranks_that_only_decode_gather_their_tokens():
    """Not those that feed a prompt, or have too many tokens."""
    assert run_ranks(exchanges, 2) == [[3, 1, 0, 0]] * 2

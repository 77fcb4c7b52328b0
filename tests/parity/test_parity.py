"""Logits through the cache equal those of the same model without one, whatever the layout."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from parity_models import VOCAB, build, cached_logits, plain_logits
from ranks import run_ranks

from pikv_megatron import PiKVConfig, PiKVInferenceContext, process_groups


@st.composite
def cases(draw, num_ranks: int):
    has_xor = num_ranks & (num_ranks - 1) == 0
    expert_shards = draw(st.sampled_from([1, 2, 4, 8] if has_xor else [1]))
    powers = [None] + [s for s in (1, 2, 4, 8) if s >= num_ranks]
    multiples = [None, num_ranks, 3 * num_ranks, 8 * num_ranks]
    token_shards = draw(st.sampled_from(powers if expert_shards > 1 else multiples))
    pikv = PiKVConfig(
        shard_after=draw(st.sampled_from([0, 0, 3, 20])),
        page_size=draw(st.sampled_from([1, 2, 3, 8, 64])),
        token_shards=token_shards,
        expert_shards=expert_shards,
        hash_block=draw(st.sampled_from([None, 1, 5])),
        replicas=draw(st.integers(1, 2)) if expert_shards > 1 else 1,
        num_sinks=draw(st.integers(0, 3)),
        window=draw(st.sampled_from([0, 1, 7, 32])),
        flush_interval=draw(st.sampled_from([1, 2, 5])),
        dispatcher=draw(st.sampled_from(["alltoall", "allgather"])),
    )
    batch = draw(st.integers(1, 5))
    longest = draw(st.sampled_from([3, 40, 120, 300]))
    prompt_lens = [draw(st.integers(1, longest)) for _ in range(batch)]
    chunk = draw(st.sampled_from([7, 64, 1000])) if longest > 3 else 1000
    return pikv, prompt_lens, chunk, draw(st.integers(1, 12))


def check_case(pg, model, case) -> None:
    pikv, prompt_lens, chunk, num_new = case
    generator = torch.Generator().manual_seed(sum(prompt_lens))
    sequences = [
        torch.randint(0, VOCAB, (length + num_new,), generator=generator).tolist()
        for length in prompt_lens
    ]
    context = PiKVInferenceContext.for_model(model, pikv, 5, 512)
    cached = cached_logits(model, context, sequences, prompt_lens, chunk)
    for index, sequence in enumerate(sequences):
        plain = plain_logits(model, sequence)
        if index in cached:
            assert (cached[index] - plain).abs().max() < 1e-4, (index, case)
            assert torch.equal(cached[index].argmax(-1), plain.argmax(-1))
    context.reset()
    context.check_integrity()


def run_cases(expert_parallel_size: int, num_examples: int) -> None:
    with process_groups(expert_parallel_size=expert_parallel_size, timeout_seconds=60) as pg:
        experts = 8 if 8 % expert_parallel_size == 0 else 2 * expert_parallel_size
        model = build(pg, PiKVConfig(), num_moe_experts=experts)

        # Every rank draws the same cases: derandomized, and never shrunk on one rank alone.
        @settings(
            max_examples=num_examples, deadline=None, derandomize=True, database=None,
            phases=[Phase.generate], suppress_health_check=list(HealthCheck),
        )
        @given(cases(expert_parallel_size))
        def check(case):
            check_case(pg, model, case)

        check()


@pytest.mark.parametrize("num_ranks, num_examples", [(1, 40), (2, 30), (3, 10), (4, 15)])
def test_logits_equal_the_model_without_a_cache(num_ranks, num_examples):
    run_ranks(run_cases, num_ranks, num_ranks, num_examples, timeout=280)

"""Sampling against a plain loop, against transformers' logits processors, and by counting."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pikv_megatron.inference.sampling import (
    SamplingParams,
    filtered_distribution,
    sample,
    uniform_numbers,
)

params_drawn = st.builds(
    SamplingParams,
    temperature=st.floats(0.05, 5.0),
    top_k=st.integers(0, 12),
    top_p=st.floats(0.01, 1.0),
    repetition_penalty=st.floats(0.5, 2.0),
)
seeds = st.integers(0, 2**31)


def drawn_case(seed: int, n: int, vocab: int, decimals: int | None = None):
    """Logits [n, vocab] (rounded, so that some are equal), uniform [n], counts [n, vocab]."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, vocab, generator=generator) * 3
    if decimals is not None:
        logits = logits.round(decimals=decimals)
    uniform = torch.rand(n, generator=generator, dtype=torch.float64)
    return logits, uniform, torch.randint(0, 3, (n, vocab), generator=generator)


def plain_sample(logits: list, params: SamplingParams, uniform: float, seen: list) -> int:
    """One row, by the definition; scores in float32, where rounding makes its own ties."""
    penalty = np.float32(params.repetition_penalty)
    scores = [
        float((x * penalty if x < 0 else x / penalty) if count else x)
        for x, count in zip(np.float32(logits), seen)
    ]
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    order = order[: params.top_k or len(order)]
    weights = [math.exp((scores[t] - scores[order[0]]) / params.temperature) for t in order]
    total, kept, before = sum(weights), [], 0.0
    for weight in weights:
        if kept and before / total >= params.top_p:
            break
        kept.append(weight)
        before += weight
    target, reached = uniform * sum(kept), 0.0
    for token, weight in zip(order, kept):
        reached += weight
        if reached > target:
            return token
    return order[len(kept) - 1]


@settings(max_examples=150, deadline=None)
@given(seeds, st.integers(1, 5), st.integers(1, 40), st.sampled_from([0, 4]), params_drawn)
def test_equals_the_plain_loop(seed, n, vocab, decimals, params):
    logits, uniform, counts = drawn_case(seed, n, vocab, decimals)
    tokens, logprobs = sample(logits, params, uniform, counts)
    rows = zip(logits.double().tolist(), uniform.tolist(), counts.tolist())
    assert tokens.tolist() == [plain_sample(row, params, u, seen) for row, u, seen in rows]
    expected = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    assert logprobs.dtype == torch.float32 and torch.equal(logprobs, expected)


@settings(max_examples=100, deadline=None)
@given(seeds, st.integers(1, 4), st.integers(2, 60), params_drawn)
def test_keeps_what_transformers_keeps(seed, n, vocab, params):
    logits, _, _ = drawn_case(seed, n, vocab)
    theirs = TemperatureLogitsWarper(params.temperature)(None, logits)
    if params.top_k:
        theirs = TopKLogitsWarper(params.top_k)(None, theirs)
    theirs = TopPLogitsWarper(params.top_p)(None, theirs)
    probabilities, order = filtered_distribution(logits, params)
    ours = torch.zeros(n, vocab, dtype=torch.float64).scatter(1, order, probabilities)
    ours = ours / ours.sum(-1, keepdim=True)
    torch.testing.assert_close(ours, theirs.double().softmax(-1), atol=1e-5, rtol=1e-4)
    assert torch.equal(ours > 0, theirs.double().softmax(-1) > 0)


@settings(max_examples=50, deadline=None)
@given(seeds, st.integers(1, 4), st.integers(2, 30), st.floats(0.5, 2.0))
def test_penalises_as_transformers_does(seed, n, vocab, penalty):
    logits, _, _ = drawn_case(seed, n, vocab)
    ids = torch.randint(0, vocab, (n, 7), generator=torch.Generator().manual_seed(seed))
    seen = torch.zeros(n, vocab, dtype=torch.bool).scatter(1, ids, True)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone()).argmax(-1)
    tokens, _ = sample(logits, SamplingParams(repetition_penalty=penalty), previous=seen)
    assert torch.equal(tokens, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_is_argmax_and_takes_the_lowest_of_equals(dtype):
    logits, _, _ = drawn_case(3, 50, 200, decimals=0)
    tokens, _ = sample(logits.to(dtype), SamplingParams())
    highest = logits == logits.max(dim=-1, keepdim=True).values
    assert torch.equal(tokens, logits.argmax(dim=-1))
    assert torch.equal(tokens, highest.int().argmax(dim=-1))


@given(seeds, st.floats(0.0, 1.0, exclude_max=True))
@settings(max_examples=50, deadline=None)
def test_top_k_of_one_and_a_tiny_temperature_are_greedy(seed, u):
    logits, _, _ = drawn_case(seed, 3, 50, decimals=1)
    uniform = torch.full((3,), u, dtype=torch.float64)
    for params in (
        SamplingParams(temperature=1.0, top_k=1),
        SamplingParams(temperature=1.0, top_p=1e-9),
    ):
        assert torch.equal(sample(logits, params, uniform)[0], logits.argmax(-1))
    distinct = drawn_case(seed, 3, 50)[0]
    tiny = SamplingParams(temperature=5e-324)
    assert torch.equal(sample(distinct, tiny, uniform)[0], distinct.argmax(-1))


@pytest.mark.parametrize("u", [0.0, 0.5, 1.0 - 2.0**-53])
def test_never_draws_an_impossible_token(u):
    logits = torch.full((2, 9), -torch.inf)
    logits[:, [2, 5]] = torch.tensor([1.0, 0.5])
    tokens, logprobs = sample(
        logits, SamplingParams(temperature=1.0), torch.full((2,), u, dtype=torch.float64)
    )
    assert set(tokens.tolist()) <= {2, 5} and logprobs.isfinite().all()


def test_draws_with_the_right_frequencies():
    logits = torch.tensor([2.0, 0.0, 1.0, -3.0]).expand(200_000, 4)
    uniform = uniform_numbers(11, torch.arange(200_000), 0)
    tokens, _ = sample(logits, SamplingParams(temperature=0.7, top_k=3), uniform)
    frequencies = tokens.bincount(minlength=4) / 200_000
    expected = torch.softmax(torch.tensor([2.0, 0.0, 1.0, -torch.inf]) / 0.7, -1)
    torch.testing.assert_close(frequencies, expected, atol=4e-3, rtol=0)


@given(seeds, st.permutations(range(6)), st.integers(1, 5), params_drawn)
@settings(max_examples=50, deadline=None)
def test_rows_do_not_depend_on_their_neighbours(seed, permutation, split, params):
    logits, uniform, counts = drawn_case(seed, 6, 30)
    whole, _ = sample(logits, params, uniform, counts)
    rows = torch.tensor(permutation)
    for part in (rows[:split], rows[split:]):
        tokens, _ = sample(logits[part], params, uniform[part], counts[part])
        assert torch.equal(tokens, whole[part])


def test_inputs_are_left_alone():
    logits, uniform, counts = drawn_case(0, 4, 20)
    copies = logits.clone(), uniform.clone(), counts.clone()
    params = SamplingParams(temperature=1.0, top_k=3, top_p=0.5, repetition_penalty=1.3)
    sample(logits, params, uniform, counts)
    assert all(torch.equal(x, y) for x, y in zip((logits, uniform, counts), copies))


def test_uniform_numbers_depend_on_seed_sequence_and_step_only():
    sequences = torch.arange(5)
    numbers = uniform_numbers(7, sequences, 3)
    assert torch.equal(uniform_numbers(7, sequences[2:], torch.tensor(3)), numbers[2:])
    assert torch.equal(uniform_numbers(7, sequences, torch.full((5,), 3)), numbers)
    assert not torch.equal(uniform_numbers(8, sequences, 3), numbers)
    grid = torch.stack([uniform_numbers(7, torch.arange(64), step) for step in range(64)])
    assert grid.unique().numel() == 64 * 64 and 0 <= grid.min() and grid.max() < 1


def test_uniform_numbers_are_uniform_along_steps_and_sequences():
    along_sequences = uniform_numbers(0, torch.arange(50_000), 1)
    along_steps = uniform_numbers(0, torch.zeros(50_000, dtype=torch.int64), torch.arange(50_000))
    for numbers in (along_sequences, along_steps):
        counts = torch.histc(numbers, bins=20, min=0.0, max=1.0)
        assert ((counts - 2500) ** 2 / 2500).sum() < 50  # chi-square, 19 degrees of freedom
        assert torch.corrcoef(torch.stack([numbers[1:], numbers[:-1]]))[0, 1].abs() < 0.02


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_k": -1},
        {"top_p": 0.0}, {"top_p": 1.1}, {"repetition_penalty": 0.0}, {"seed": -1},
        {"seed": 2**63}, {"top_n": 3},
    ],
)
def test_refuses_wrong_parameters_by_name(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        SamplingParams(**wrong)


def test_parameters_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        SamplingParams().temperature = 1.0


def test_says_what_is_missing():
    logits = torch.zeros(1, 4)
    with pytest.raises(ValueError, match="uniform"):
        sample(logits, SamplingParams(temperature=1.0))
    with pytest.raises(ValueError, match="repetition_penalty 1.5"):
        sample(logits, SamplingParams(repetition_penalty=1.5))

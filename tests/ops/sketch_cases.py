"""Drawn inputs of `score_pages`, and its scores in float64 from the exact keys."""

from typing import NamedTuple

import hypothesis.strategies as st
import torch
from guarded_pools import SKETCHES, empty_sketch, poisoned
from oracle import expand

from pikv_megatron.ops.make_sketch import make_sketch
from pikv_megatron.types import KVPages, PageScores, PageSketch


class ScoreSpec(NamedTuple):
    """Shapes of a case; its numbers follow from the seed."""

    sketch: str
    n: int
    num_columns: int
    num_groups: int
    group: int
    width: int
    page_size: int
    k: int
    statistic: str
    bound: bool
    dtype: torch.dtype
    is_run: bool
    seed: int


class ScoreCase(NamedTuple):
    """Arguments of `score_pages`, and the keys [ng, p, S, w] that the sketch is of."""

    arguments: tuple
    keys: torch.Tensor
    residual: torch.Tensor


@st.composite
def score_specs(draw, max_columns: int) -> ScoreSpec:
    sketch, group = draw(st.sampled_from(SKETCHES)), draw(st.integers(1, 16))
    return ScoreSpec(
        sketch, draw(st.integers(0, 3)), draw(st.integers(0, max_columns)),
        draw(st.integers(1, 4)), group,
        draw(st.sampled_from([16, 33, 64, 80, 128, 256])),
        draw(st.sampled_from([4, 12, 16, 64, 500] if sketch[:3] == "low" else [1, 63])),
        draw(st.sampled_from([0, 1, 2, 7, 63, 500])), draw(st.sampled_from(["mass", "best"])),
        sketch != "mean" and draw(st.booleans()),
        draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16])),
        draw(st.booleans()), draw(st.integers(0, 10**6)),
    )


def build(spec: ScoreSpec, device="cpu") -> ScoreCase:
    """Pages that nothing lists stay poisoned, and are named where `lens` is 0."""
    rng = torch.Generator().manual_seed(spec.seed)
    num_pages = spec.num_columns + 3
    keys = torch.randn(spec.num_groups, num_pages, spec.page_size, spec.width, generator=rng)
    keys = (keys + torch.randn(spec.width, generator=rng) * 3).to(device, spec.dtype)
    query = torch.randn(spec.n, spec.num_groups * spec.group, spec.width, generator=rng)
    table = torch.stack([
        torch.arange(spec.num_columns) if spec.is_run
        else torch.randperm(num_pages - 2, generator=rng)[: spec.num_columns]
        for _ in range(spec.n)
    ]) if spec.n else torch.zeros(0, spec.num_columns, dtype=torch.int64)
    lens = torch.randint(0, spec.page_size + 1, table.shape, generator=rng).int()
    lens[torch.rand(lens.shape, generator=rng) < 0.5] = spec.page_size
    if spec.n > 1:
        lens[-1] = 0
    table[lens == 0] = num_pages - 2
    residual = torch.rand(spec.num_groups, num_pages, generator=rng).to(device)
    sketch = _sketch(spec, keys, residual, torch.arange(num_pages - 2, device=device), device)
    query_residual = torch.rand(query.shape[:2], generator=rng).to(device)
    arguments = (
        poisoned(query.to(device, spec.dtype)), sketch, table.to(device), lens.to(device), spec.k,
        spec.width**-0.5, spec.statistic, query_residual, spec.bound,
    )
    return ScoreCase(arguments, keys, residual)


def _sketch(spec: ScoreSpec, keys, residual, pages, device) -> PageSketch:
    sketch, _ = empty_sketch(
        spec.sketch, spec.num_groups, keys.shape[1], spec.page_size, spec.width, spec.dtype, device
    )
    make_sketch(keys[:, pages], sketch, pages, residual[:, pages])
    return sketch


def sketched_tokens(sketch: PageSketch) -> torch.Tensor:
    """What a sketch makes of every token, [ng, p, S, w], float64."""
    if hasattr(sketch, "mean"):
        return sketch.mean.double().unsqueeze(2)
    size = sketch.page_size
    as_pages = KVPages(sketch.codes, sketch.codes, None, None, torch.empty(1, 1, size, 1))
    return expand(sketch.codes, sketch.scale.unsqueeze(2), sketch.zero.unsqueeze(2), as_pages,
                  (size, 1))


def expected_logit(case: ScoreCase) -> torch.Tensor:
    """[n, np, m], float64: logits that are estimates, page by page; boxes corner by corner."""
    query, sketch, table, lens, _, scale, statistic, _, _ = case.arguments
    n, num_heads, _ = query.shape
    num_groups = case.keys.shape[0]
    is_box = hasattr(sketch, "low")
    tokens = None if is_box else sketched_tokens(sketch)
    logit = torch.full((n, num_heads, table.shape[1]), -torch.inf, dtype=torch.float64)
    for row, column in (lens > 0).nonzero().tolist():
        page, length = int(table[row, column]), int(lens[row, column])
        for head in range(num_heads):
            q, group = query[row, head].double(), head // (num_heads // num_groups)
            if is_box:
                corners = [q * end[group, page].double() for end in (sketch.low, sketch.high)]
                each = torch.maximum(*corners).sum().expand(length)
            else:
                each = tokens[group, page] @ q
                each = each.expand(length) if each.numel() == 1 else each[:length]
            each = each * scale
            logit[row, head, column] = each.max() if statistic == "best" else each.logsumexp(0)
    return logit


def exact_logit(case: ScoreCase) -> torch.Tensor:
    """[n, np, m], float64, of the keys themselves, each with the worst residual there can be."""
    query, _, table, lens, _, scale, statistic, query_residual, _ = case.arguments
    group = query.shape[1] // case.keys.shape[0]
    keys = case.keys.repeat_interleave(group, 0).double()
    residual = case.residual.repeat_interleave(group, 0).double()
    logit = torch.full((*query.shape[:2], table.shape[1]), -torch.inf, dtype=torch.float64)
    for row, column in (lens > 0).nonzero().tolist():
        page = int(table[row, column])
        each = torch.einsum("htw,hw->ht", keys[:, page, : lens[row, column]], query[row].double())
        if hasattr(case.arguments[1], "codes"):
            each = each + (residual[:, page] * query_residual[row].double()).unsqueeze(1)
        each = each * scale
        best = each.amax(1) if statistic == "best" else each.logsumexp(1)
        logit[row, :, column] = best
    return logit


def check_choice(scores: PageScores, lens: torch.Tensor, k: int) -> None:
    """`score` follows from `logit`, and `chosen` from `score`, tuple by tuple."""
    is_listed = lens > 0
    assert torch.equal(scores.logit == -torch.inf, ~is_listed.unsqueeze(1).expand_as(scores.logit))
    right = scores.logit.double().softmax(2).mean(1).masked_fill(~is_listed, 0.0)
    torch.testing.assert_close(scores.score.double(), right, atol=1e-6, rtol=1e-4)
    assert scores.chosen.shape == (lens.shape[0], k) and scores.chosen.dtype == torch.int64
    for row, values in enumerate(scores.score.tolist()):
        listed = [c for c, length in enumerate(lens[row].tolist()) if length]
        best = sorted(sorted(listed, key=lambda column: (-values[column], column))[:k])
        assert scores.chosen[row].tolist() == best + [-1] * (k - len(best))

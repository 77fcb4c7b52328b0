"""Drawn inputs of `attend_means`, and its result in float64."""

from typing import NamedTuple

import hypothesis.strategies as st
import torch
from guarded_pools import poisoned


class MeanCase(NamedTuple):
    """Arguments of `attend_means`."""

    logit: torch.Tensor
    is_tail: torch.Tensor
    mean_value: torch.Tensor
    table: torch.Tensor


@st.composite
def mean_cases(draw, max_columns: int) -> MeanCase:
    return mean_case(
        draw(st.integers(0, 4)), draw(st.integers(0, max_columns)), draw(st.integers(1, 3)),
        draw(st.integers(1, 20)), draw(st.sampled_from([1, 16, 33, 64, 128])),
        draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        draw(st.booleans()), draw(st.sampled_from([0.0, 0.5, 0.9, 1.0])),
        draw(st.integers(0, 10**6)),
    )


def mean_case(
    n: int, num_columns: int, num_groups: int, group: int, width: int, dtype: torch.dtype,
    is_run: bool, tail_share: float, seed: int, device="cpu",
) -> MeanCase:
    """Rows of pages that are in no tail are NaN, and their logits too; the last sequence of a batch
    has no tail."""
    rng = torch.Generator().manual_seed(seed)
    num_rows = n * num_columns + 3
    is_tail = torch.rand(n, num_columns, generator=rng) < tail_share
    if n > 1:
        is_tail[-1] = False
    order = torch.arange(num_rows) if is_run else torch.randperm(num_rows, generator=rng)
    table = order[: n * num_columns].view(n, num_columns)
    mean_value = torch.randn(num_groups, num_rows, width, generator=rng)
    is_used = torch.zeros(num_rows, dtype=torch.bool)
    is_used[table[is_tail]] = True
    mean_value[:, ~is_used] = torch.nan
    logit = torch.randn(n, num_groups * group, num_columns, generator=rng) * 20
    logit.masked_fill_(~is_tail.unsqueeze(1), torch.nan)
    return MeanCase(
        poisoned(logit.to(device)), is_tail.to(device), poisoned(mean_value.to(device, dtype)),
        table.to(device),
    )


def expected_means(case: MeanCase) -> tuple[torch.Tensor, torch.Tensor]:
    """out [n, 1, np, w] and lse [n, 1, np], float64, sequence by sequence."""
    n, num_heads, _ = case.logit.shape
    group = num_heads // case.mean_value.shape[0]
    out = torch.zeros(n, 1, num_heads, case.mean_value.shape[2], dtype=torch.float64)
    lse = torch.full((n, 1, num_heads), -torch.inf, dtype=torch.float64)
    for row, own in enumerate(case.is_tail):
        if own.any():
            logit = case.logit[row][:, own].double()
            values = case.mean_value[:, case.table[row, own]].double()
            values = values.repeat_interleave(group, dim=0)
            out[row, 0] = torch.einsum("hm,hmw->hw", logit.softmax(dim=1), values)
            lse[row, 0] = logit.logsumexp(dim=1)
    return out, lse

"""Cases of the operations that write a cache, route and project; and the list of all of them.

Legend: n sequences, np query heads, ng KV heads, p pages, S tokens a page, c full buffers.
"""

from typing import Callable, Iterator

import torch

from pikv_megatron.benchmarks.ops.attention_cases import (
    decode_attention_cases,
    score_and_attend_cases,
    score_pages_cases,
)
from pikv_megatron.benchmarks.ops.op_case import Grid, OpCase, name_of, rms_error, storage_bytes
from pikv_megatron.benchmarks.ops.random_pages import (
    HEAD_WIDTH,
    NUM_GROUPS,
    NUM_HEADS,
    PAYLOADS,
    PLAIN,
    plain_numbers,
    scaled_pages,
)
from pikv_megatron.ops.append_kv import append_kv
from pikv_megatron.ops.merge_states import merge_states
from pikv_megatron.ops.project import project
from pikv_megatron.ops.route_topk import route_topk
from pikv_megatron.ops.seal_page import seal_page
from pikv_megatron.types import AttentionState, KVPages

NUM_SEQUENCES, NUM_PARTS, NUM_BUFFERS = 64, 8, 64
NUM_SHARDS, NUM_VISITED, HIDDEN, RANK = 64, 8, 4096, 32


def merge_states_cases(grid: Grid) -> Iterator[OpCase]:
    """Eight parts of every sequence."""
    for dtype in grid.dtypes:
        shape = (NUM_PARTS, NUM_SEQUENCES, 1, NUM_HEADS)
        out = grid.randn(*shape, HEAD_WIDTH, dtype=dtype, key=1)
        lse = grid.randn(*shape, key=2)

        def error(state: AttentionState) -> float:
            weights = lse.double().softmax(dim=0).unsqueeze(-1)
            return rms_error(state.out, (out.double() * weights).sum(dim=0))

        num_bytes = storage_bytes(out, lse, out[0], lse[0])
        title = f"{NUM_PARTS} parts of {NUM_SEQUENCES} sequences"
        yield OpCase("merge_states", name_of(dtype), title, lambda: merge_states(out, lse), error,
                     num_bytes)


def seal_page_cases(grid: Grid) -> Iterator[OpCase]:
    """Sixty-four full buffers to every payload."""
    for page_size in grid.page_sizes:
        for payload in PAYLOADS:
            shape = (NUM_GROUPS, NUM_BUFFERS, page_size, HEAD_WIDTH)
            keys, values = (grid.randn(*shape, dtype=grid.dtypes[0], key=key) for key in (1, 2))
            pages = _empty_pages(grid, payload, page_size)
            page = torch.arange(NUM_BUFFERS, device=grid.device)

            def run() -> KVPages:
                seal_page(keys, values, pages, page)
                return pages

            written = sum(storage_bytes(x[:, :-1]) for x in pages if x is not None)
            title = f"{NUM_BUFFERS} buffers, S = {page_size}"
            yield OpCase("seal_page", payload, title, run,
                         lambda sealed: _seal_error(keys, values, sealed),
                         storage_bytes(keys, values) + written)


def append_kv_cases(grid: Grid) -> Iterator[OpCase]:
    """A token of every sequence to its open page."""
    for dtype in grid.dtypes:
        page_size = grid.page_sizes[0]
        keys, values = (
            grid.randn(NUM_GROUPS, NUM_SEQUENCES, HEAD_WIDTH, dtype=dtype, key=k) for k in (1, 2)
        )
        pools = keys.new_zeros(2, NUM_GROUPS, NUM_SEQUENCES + 1, page_size, HEAD_WIDTH)
        page = torch.arange(NUM_SEQUENCES, device=grid.device)
        offset = grid.integers(page_size, NUM_SEQUENCES, key=3)

        def run() -> torch.Tensor:
            append_kv(keys, values, pools[0], pools[1], page, offset)
            return pools

        def error(written: torch.Tensor) -> float:
            right = torch.zeros_like(written)
            for token, (at, place) in enumerate(zip(page.tolist(), offset.tolist())):
                right[0, :, at, place], right[1, :, at, place] = keys[:, token], values[:, token]
            return 0.0 if torch.equal(written, right) else float("inf")

        yield OpCase("append_kv", name_of(dtype), f"{NUM_SEQUENCES} tokens", run, error,
                     2 * storage_bytes(keys, values))


def route_topk_cases(grid: Grid) -> Iterator[OpCase]:
    """A gate over hidden states."""
    for dtype in grid.dtypes:
        x = grid.randn(NUM_SEQUENCES, HIDDEN, dtype=dtype, key=1)
        gate = grid.randn(NUM_SHARDS, HIDDEN, dtype=dtype, key=2)
        penalty = grid.randn(NUM_SHARDS, key=3)

        def error(visited: torch.Tensor) -> float:
            logits = x.double() @ gate.double().T - penalty.double()
            if not (visited.sum(dim=1) == NUM_VISITED).all():
                return float("inf")
            # Of two shards that float32 cannot tell apart, either will do.
            missed = logits.masked_fill(visited, -torch.inf).amax(dim=1)
            worst = logits.masked_fill(~visited, torch.inf).amin(dim=1)
            return float(((missed - worst) / logits.abs().amax()).amax()) / 1e-5

        title = f"{NUM_VISITED} of {NUM_SHARDS} shards, {NUM_SEQUENCES} x {HIDDEN}"
        yield OpCase("route_topk", name_of(dtype), title,
                     lambda: route_topk(x, penalty, NUM_VISITED, gate), error,
                     storage_bytes(x, gate, penalty) + NUM_SEQUENCES * NUM_SHARDS)


def project_cases(grid: Grid) -> Iterator[OpCase]:
    """Queries of every sequence into the directions of a linear codec."""
    for dtype in grid.dtypes:
        x = grid.randn(NUM_SEQUENCES, NUM_HEADS, HEAD_WIDTH, dtype=dtype, key=1)
        basis = grid.randn(NUM_GROUPS, HEAD_WIDTH, RANK, dtype=dtype, key=2)

        def error(out: torch.Tensor) -> float:
            grouped = x.double().unflatten(1, (NUM_GROUPS, -1))
            return rms_error(out, torch.einsum("nhgw,hwr->nhgr", grouped, basis.double())
                             .flatten(1, 2))

        num_bytes = storage_bytes(x, basis, x[..., :RANK])
        title = f"{NUM_SEQUENCES} x {NUM_HEADS} heads, {HEAD_WIDTH} to {RANK}"
        yield OpCase("project", name_of(dtype), title, lambda: project(x, basis), error, num_bytes)


def _empty_pages(grid: Grid, payload: str, page_size: int) -> KVPages:
    """A pool for the buffers, and its null page."""
    if payload in PLAIN:
        shape = (2, NUM_GROUPS, NUM_BUFFERS + 1, page_size, HEAD_WIDTH)
        return KVPages(*torch.zeros(shape, dtype=getattr(torch, payload), device=grid.device))
    return scaled_pages(grid, payload, NUM_BUFFERS + 1, page_size)


def _seal_error(keys: torch.Tensor, values: torch.Tensor, pages: KVPages) -> float:
    """The largest error as a share of what the payload allows: half a scale, or half a place; of
    fewer than 8 bits, whose codes may cut off a group's ends, the root of the mean square."""
    listed, worst = torch.arange(NUM_BUFFERS, device=keys.device), 0.0
    for group in range(NUM_GROUPS):
        kept = plain_numbers(pages, group, listed)
        for x, stored, scale in zip(
            (keys, values), kept, (pages.key_scale, pages.value_scale), strict=True
        ):
            exact = x[group].double()
            allowed = exact.abs() * _relative(pages.keys.dtype) + 1e-5
            if scale is not None:
                allowed = allowed + scale[group, listed].double() * (
                    0.501 if pages.value_zero is not None else 2.0**-10
                )
            error = (stored.view_as(exact) - exact).abs()
            if pages.value_zero is not None and pages.key_bits < 8:
                share = (error.square().mean() / allowed.square().mean()).sqrt()
            else:
                share = (error / allowed).amax()
            worst = max(worst, float(share.nan_to_num(torch.inf)))
    return worst


def _relative(dtype: torch.dtype) -> float:
    return 0.0 if dtype == torch.uint8 else torch.finfo(dtype).eps * 0.51


# A case is valid until the next one is drawn.
CASES: dict[str, Callable[[Grid], Iterator[OpCase]]] = {
    "decode_attention": decode_attention_cases,
    "score_pages": score_pages_cases,
    "score_and_attend": score_and_attend_cases,
    "merge_states": merge_states_cases,
    "seal_page": seal_page_cases,
    "append_kv": append_kv_cases,
    "route_topk": route_topk_cases,
    "project": project_cases,
}

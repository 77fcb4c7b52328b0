"""Cases of the operations that read a cache: attention, page scores, and the two together.

Legend: np query heads, ng KV heads, g = np / ng, p pages, S tokens a page, r directions.
"""

from typing import Callable, Iterator

import torch

from pikv_megatron.benchmarks.ops.op_case import (
    Grid,
    OpCase,
    in_turn,
    name_of,
    rms_error,
    storage_bytes,
)
from pikv_megatron.benchmarks.ops.peers import dense_peers
from pikv_megatron.benchmarks.ops.random_pages import (
    HEAD_WIDTH,
    NUM_GROUPS,
    PAYLOADS,
    PLAIN,
    DenseCache,
    dense_cache,
    plain_numbers,
    scaled_pages,
)
from pikv_megatron.benchmarks.ops.random_sketches import SKETCHES, exact_logits, sketch_of
from pikv_megatron.ops.decode_attention import decode_attention
from pikv_megatron.ops.score_pages import score_pages
from pikv_megatron.types import AttentionState, KVPages, PageList, PageScores, PageSketch

# Of the pages, those that are read.
READ_SHARE = 8
# Scores, and steps with scores, go over as many layers' caches as a decode step would, in turn, so
# that pages come from memory while the program stays in the processor's cache: the eighth that is
# read of all of them exceeds a CPU's last-level cache.
LAYERS_BYTES = 8 * (96 << 20)
MOST_LAYERS = 8
SCALE = HEAD_WIDTH**-0.5


def decode_attention_cases(grid: Grid) -> Iterator[OpCase]:
    """Every payload, the whole cache and 1/8 of its pages."""
    for num_tokens, page_size in _sizes(grid):
        for payload in PAYLOADS:
            dtype = getattr(torch, payload) if payload in PLAIN else grid.dtypes[0]
            cache, num_pages = dense_cache(grid, num_tokens, dtype), num_tokens // page_size
            is_plain = payload in PLAIN
            pages = cache.pages(page_size) if is_plain else scaled_pages(
                grid, payload, num_pages, page_size
            )
            for share in (1, READ_SHARE):
                listed = _some_pages(grid, num_pages, share)
                yield OpCase(
                    "decode_attention", payload, _title(num_tokens, page_size, share),
                    lambda: _attend(cache.query, pages, listed),
                    lambda state: _attention_error(cache.query, pages, listed, state),
                    storage_bytes(*pages) // share + 2 * storage_bytes(cache.query),
                    dense_peers(*cache),
                )


def score_pages_cases(grid: Grid) -> Iterator[OpCase]:
    """Every sketch."""
    for caches, page_size, kind, sketches in _sketches(grid):
        scorers = [_scorer(*each, page_size) for each in zip(caches, sketches)]
        query = _sketch_query(caches[0], sketches[0])
        yield OpCase(
            "score_pages", name_of(query.dtype),
            f"{kind}, {_title(caches[0].keys.shape[1], page_size)}",
            in_turn(scorers), lambda scores: _score_error(query, sketches[0], scores),
            _sketch_bytes(sketches[0]) + storage_bytes(query), calls=len(caches),
        )


def score_and_attend_cases(grid: Grid) -> Iterator[OpCase]:
    """What a decode step does instead of dense attention: choose 1/8 of the pages, read them."""
    for caches, page_size, kind, sketches in _sketches(grid):
        steps = [_step(*each, page_size) for each in zip(caches, sketches)]
        dense = [dense_peers(*cache) for cache in caches]
        pages = caches[0].pages(page_size)

        def error(result: tuple[PageScores, AttentionState]) -> float:
            scores, state = result
            scored = _score_error(_sketch_query(caches[0], sketches[0]), sketches[0], scores)
            return max(
                scored, _attention_error(caches[0].query, pages, scores.chosen[0], state)
            )

        yield OpCase(
            "score_and_attend", name_of(caches[0].query.dtype),
            f"{kind}, {_title(caches[0].keys.shape[1], page_size, READ_SHARE)}",
            in_turn(steps), error,
            _sketch_bytes(sketches[0]) + storage_bytes(*pages) // READ_SHARE,
            {name: in_turn([peers[name] for peers in dense]) for name in dense[0]}, len(caches),
        )


def _sizes(grid: Grid) -> Iterator[tuple[int, int]]:
    return ((t, s) for t in grid.tokens for s in grid.page_sizes)


def _title(num_tokens: int, page_size: int, share: int | None = None) -> str:
    part = {None: "", 1: ", all"}.get(share, f", 1/{share}")
    return f"{num_tokens:,} tokens, S = {page_size}{part}"


def _some_pages(grid: Grid, num_pages: int, share: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(grid.seed)
    chosen = torch.randperm(num_pages, generator=rng)[: num_pages // share].sort().values
    return chosen.to(grid.device)


def _attend(query: torch.Tensor, pages: KVPages, listed: torch.Tensor) -> AttentionState:
    table = listed.unsqueeze(0)
    lens = torch.full_like(table, pages.page_size, dtype=torch.int32)
    return decode_attention(query[None, None], [PageList(pages, table, lens)], SCALE)[0]


def _attention_error(
    query: torch.Tensor, pages: KVPages, listed: torch.Tensor, state: AttentionState
) -> float:
    """Against softmax in float64, one KV head at a time."""
    out = []
    for group, rows in enumerate(query.unflatten(0, (NUM_GROUPS, -1)).double()):
        keys, values = plain_numbers(pages, group, listed)
        out.append(torch.softmax(rows @ keys.T * SCALE, dim=1) @ values)
    return rms_error(state.out[0, 0], torch.cat(out))


def _sketches(
    grid: Grid,
) -> Iterator[tuple[list[DenseCache], int, str, list[PageSketch]]]:
    for num_tokens, page_size in _sizes(grid):
        for dtype in grid.dtypes:
            first = dense_cache(grid, num_tokens, dtype)
            num_layers = min(MOST_LAYERS, LAYERS_BYTES // storage_bytes(*first[1:]) + 1)
            more = [dense_cache(grid, num_tokens, dtype, x) for x in range(1, num_layers)]
            caches = [first, *more]
            for kind in SKETCHES:
                sketches = [sketch_of(kind, cache.pages(page_size).keys) for cache in caches]
                yield caches, page_size, kind, sketches


def _sketch_query(cache: DenseCache, sketch: PageSketch) -> torch.Tensor:
    """The query in the sketch's directions."""
    return cache.query[:, : sketch[0].shape[-1]].contiguous()


def _scorer(
    cache: DenseCache, sketch: PageSketch, page_size: int
) -> Callable[[], PageScores]:
    """Chooses 1/8 of the pages."""
    query = _sketch_query(cache, sketch)
    table = torch.arange(cache.keys.shape[1] // page_size, device=query.device).unsqueeze(0)
    lens = torch.full_like(table, page_size, dtype=torch.int32)
    k = table.shape[1] // READ_SHARE
    return lambda: score_pages(query[None], sketch, table, lens, k, SCALE, "best")


def _step(
    cache: DenseCache, sketch: PageSketch, page_size: int
) -> Callable[[], tuple[PageScores, AttentionState]]:
    """Chooses pages and attends to them."""
    score, pages = _scorer(cache, sketch, page_size), cache.pages(page_size)

    def run() -> tuple[PageScores, AttentionState]:
        scores = score()
        return scores, _attend(cache.query, pages, scores.chosen[0])

    return run


def _score_error(query: torch.Tensor, sketch: PageSketch, scores: PageScores) -> float:
    """Logits against float64, of the largest's size; and no better page may be left out."""
    logit = exact_logits(query, sketch) * SCALE
    difference = float((scores.logit[0] - logit).abs().amax() / logit.abs().amax())
    score = logit.softmax(dim=1).mean(dim=0)
    left_out = score.index_fill(0, scores.chosen[0], 0.0).amax()
    missed = float(left_out / score[scores.chosen[0]].amin()) - 1.0
    worst = max(difference / 1e-5, missed / 1e-3)
    return worst if difference >= 0 and missed == missed else float("inf")


def _sketch_bytes(sketch: PageSketch) -> int:
    """Of what is read; residuals serve bounds only."""
    names = [name for name in sketch._fields if name not in ("residual", "page_size")]
    return storage_bytes(*[getattr(sketch, name) for name in names])

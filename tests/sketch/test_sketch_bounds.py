"""What a page has lies between a sketch's bounds, whatever its keys are."""

import pytest
import torch

from pikv_megatron.sketch.bounding_box import BoundingBoxOptions
from pikv_megatron.sketch.low_rank import LowRankOptions
from pikv_megatron.types import KVShape

NG, GROUP, HN, S, PAGES, SCALE = 2, 3, 8, 12, 5, 0.3
SKETCHES = {
    "boxes": BoundingBoxOptions(), "boxes of 4": BoundingBoxOptions(tokens=5),
    "half rank, 2 bits": LowRankOptions(),
    "all ranks, 4 bits": LowRankOptions(rank=HN, bits=4), "one rank": LowRankOptions(rank=1),
}


def drawn_keys(kind: str, rng: torch.Generator) -> torch.Tensor:
    """[ng, pages, S, hn]."""
    keys = torch.randn(NG, PAGES, S, HN, generator=rng)
    if kind == "an outlier":
        keys[:, 1, 3] *= 1e3
    if kind == "beyond float16":
        keys[:, 2, 5, 1] = 3e5
    if kind == "zeros":
        keys[:, :3] = 0.0
    if kind == "constant channels":
        keys[..., 2:5], keys[..., 5] = 7.0, -4e3
    if kind == "across the basis":
        # Later pages differ in a channel in which the first, which is learned from, does not.
        keys[:, 0, :, -1] = 0.0
        keys[:, 1:, :, :-1] *= 0.1
    return keys


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [
    "drawn", "an outlier", "beyond float16", "zeros", "constant channels", "across the basis",
])
@pytest.mark.parametrize("name", SKETCHES)
def test_bounds_hold_for_any_keys(name, kind, dtype):
    rng = torch.Generator().manual_seed(0)
    kv = KVShape(NG, HN, HN, dtype, torch.device("cpu"))
    sketcher = SKETCHES[name].build(kv, S, 1, bounds=True)
    for _ in range(8):
        keys = drawn_keys(kind, rng).to(dtype)
        if sketcher.learns:
            sketcher.fit(0, keys[:, :1].flatten(1, 2))
        sketch, place = sketcher.allocate(7), torch.tensor([6, 0, 3, 2, 5])
        sketcher.write(keys, sketch, place, torch.zeros_like(place))
        # Aimed at a token, away from one, and nowhere.
        query = torch.randn(4, NG * GROUP, HN, generator=rng).to(dtype)
        query[1] = 3 * keys[:, 1, 3].repeat_interleave(GROUP, 0) / (1 + keys[:, 1, 3].norm())
        query[2], query[3] = -query[1], 0.0
        lens = torch.tensor([[S, S, S, S, 0], [S, 5, 1, S, 0]] * 2).int()
        table, slots = place.expand(4, -1), torch.zeros(4, dtype=torch.int64)
        lower, upper = sketcher.bounds(query, sketch, table, lens, slots, SCALE)
        by_head = keys.repeat_interleave(GROUP, 0).double()
        logits = torch.einsum("nhw,hptw->nhpt", query.double(), by_head) * SCALE
        hidden = torch.arange(S) >= lens.view(4, 1, PAGES, 1)
        true = logits.masked_fill(hidden, -torch.inf).logsumexp(3)
        rounding = 1e-5 + 2.0**-18 * SCALE * torch.einsum(
            "nhw,hpw->nhp", query.double().abs(), by_head.abs().amax(2)
        )
        assert (lower <= true + rounding).all() and (true <= upper + rounding).all()
        assert (lower[..., 4] == -torch.inf).all() and (upper[..., 4] == -torch.inf).all()
        if name == "all ranks, 4 bits" and kind == "drawn":
            assert (upper - lower)[0, :, :4].mean() < 1.5


def test_bounds_cost_a_number_a_token():
    kv = KVShape(NG, 32, 32, torch.float32, torch.device("cpu"))
    options = LowRankOptions(rank=32, bits=4)
    plain, bounding = (options.build(kv, S, 1, bounds).allocate(9) for bounds in (False, True))
    assert bounding.codes.nbytes * 32 == plain.codes.nbytes * 33

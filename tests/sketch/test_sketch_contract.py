"""What every sketch promises, and what each one says of a page."""

import pytest
import torch

from pikv_megatron.options import members
from pikv_megatron.sketch.low_rank import LowRankOptions
from pikv_megatron.sketch.registry import Sketch
from pikv_megatron.types import KVShape

SKETCHES = {name: kind for name, kind in members(Sketch).items() if name not in ("none", "keys")}
NG, HN, S = 2, 8, 12
KV = KVShape(NG, HN, HN, torch.float32, torch.device("cpu"))
KEYS = torch.randn(NG, 5, S, HN, generator=torch.Generator().manual_seed(0))
SLOTS = torch.tensor([0, 2, 0, 2, 2])


def sketched(sketcher, keys: torch.Tensor, page: list[int], slots: torch.Tensor):
    """Sketches of pages [ng, c, S, hn] at their places of eight."""
    sketch = sketcher.allocate(8)
    sketcher.write(keys, sketch, torch.tensor(page), slots)
    return sketch


def fitted(name: str, **fields):
    sketcher = SKETCHES[name](**fields).build(KV, S, 3)
    if sketcher.learns:
        for slot in (0, 2):
            assert not sketcher.is_fitted(slot)
            sketcher.fit(slot, KEYS[:, SLOTS == slot].flatten(1, 2))
            assert sketcher.is_fitted(slot)
    return sketcher


def tensors(sketch) -> list[torch.Tensor]:
    return [field for field in sketch if isinstance(field, torch.Tensor)]


@pytest.mark.parametrize("name", SKETCHES)
def test_pages_are_sketched_one_by_one_into_their_places(name):
    sketcher, page = fitted(name), [6, 0, 3, 2, 5]
    together = tensors(sketched(sketcher, KEYS, page, SLOTS))
    for index, place in enumerate(page):
        one = slice(index, index + 1)
        alone = tensors(sketched(sketcher, KEYS[:, one], [1], SLOTS[one]))
        for whole, single in zip(together, alone):
            torch.testing.assert_close(whole[:, place], single[:, 1])
    for whole in together:
        assert whole.shape[:2] == (NG, 8) and not whole[:, 1].any()


@pytest.mark.parametrize("name", SKETCHES)
def test_scores_are_shares_over_listed_pages(name):
    sketcher = fitted(name)
    sketch = sketched(sketcher, KEYS, [0, 1, 2, 3, 4], SLOTS)
    table = torch.tensor([[0, 2, 7], [1, 3, 4], [7, 7, 7]])
    is_page = torch.tensor([[True, True, False], [True] * 3, [False] * 3])
    query = torch.randn(3, 2 * NG, HN)
    lens = is_page.int() * S
    logit, score = sketcher.logits(query, sketch, table, lens, torch.tensor([0, 2, 1]), 0.5)
    assert torch.equal(logit == -torch.inf, ~is_page.unsqueeze(1).expand_as(logit))
    assert not score[~is_page].any()
    torch.testing.assert_close(score[:2].sum(1), torch.ones(2))


def page_masses(query: torch.Tensor, pages: list[int], scale: float) -> torch.Tensor:
    """[np, pages]: log of the summed exponentials of each page."""
    keys = KEYS[:, pages].repeat_interleave(len(query) // NG, dim=0)
    return (torch.einsum("hw,hptw->hpt", query, keys) * scale).logsumexp(2)


@pytest.mark.parametrize("bits", [4, 2])
def test_a_full_rank_sketch_is_off_by_its_quantisation_at_most(bits):
    """Half a step a channel, and a log-sum-exp moves no further than its terms."""
    sketcher = fitted("low_rank", rank=HN, bits=bits)
    sketch = sketched(sketcher, KEYS, [0, 1, 2, 3, 4], SLOTS)
    query, pages = torch.randn(1, 2 * NG, HN), [1, 3, 4]
    lens = torch.full((1, 3), S, dtype=torch.int32)
    logit, _ = sketcher.logits(
        query, sketch, torch.tensor([pages]), lens, torch.tensor([2]), 0.3
    )
    projected = query[0].unflatten(0, (NG, 2)) @ sketcher._basis[2]
    steps = sketch.scale[:, pages].float()
    most = 0.3 * 0.5 * torch.einsum("agr,apr->agp", projected.abs(), steps).flatten(0, 1)
    assert ((logit[0] - page_masses(query[0], pages, 0.3)).abs() <= most + 1e-3).all()


def test_boxes_are_of_neighbours():
    sketcher = fitted("bounding_box", tokens=5)  # 12 tokens, three boxes of 4
    sketch = sketched(sketcher, KEYS, [0, 1, 2, 3, 4], SLOTS)
    parts = KEYS.unflatten(2, (3, 4))
    assert torch.equal(sketch.low[:, :5].unflatten(2, (3, HN)), parts.amin(3))
    assert torch.equal(sketch.high[:, :5].unflatten(2, (3, HN)), parts.amax(3))
    query, pages = torch.randn(1, 2 * NG, HN), torch.tensor([[0, 2]])
    lens, slots = torch.full((1, 2), S, dtype=torch.int32), torch.tensor([0])
    whole = fitted("bounding_box", tokens=S)
    wide = sketched(whole, KEYS, [0, 1, 2, 3, 4], SLOTS)
    fine, _ = sketcher.logits(query, sketch, pages, lens, slots, 0.3)
    coarse, _ = whole.logits(query, wide, pages, lens, slots, 0.3)
    true = page_masses(query[0], [0, 2], 0.3)
    assert (true <= fine[0] + 1e-5).all() and (fine <= coarse + 1e-5).all()
    assert sum(t.nbytes for t in sketch) == 3 * sum(t.nbytes for t in wide)


def test_a_bounding_box_never_underestimates_and_a_mean_key_never_overestimates():
    query, pages = torch.randn(1, 2 * NG, HN), [0, 2]
    lens, slots = torch.full((1, 2), S, dtype=torch.int32), torch.tensor([0])
    true = page_masses(query[0], pages, 0.3)
    for name, sign in (("bounding_box", 1), ("mean_key", -1)):
        sketcher = fitted(name)
        sketch = sketched(sketcher, KEYS, [0, 1, 2, 3, 4], SLOTS)
        logit, _ = sketcher.logits(query, sketch, torch.tensor([pages]), lens, slots, 0.3)
        assert ((logit[0] - true) * sign >= -1e-5).all()


@pytest.mark.parametrize("fields, page_size, named", [
    ({"rank": 9}, 12, "sketch.rank 9"), ({"bits": 2}, 6, "make page_size a multiple of 4"),
])
def test_what_does_not_fit_is_refused(fields, page_size, named):
    with pytest.raises(ValueError, match=named):
        LowRankOptions(**fields).build(KV, page_size, 1)

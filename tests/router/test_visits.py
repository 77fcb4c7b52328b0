"""What any shard gives of the attention is learned offline, and from visits for the next run."""

import torch
from directories import GivenScores
from layer_caches import SHAPE
from torch import nn

from pikv_megatron.calibration.fits.visits import PAGE, SHARDS, VisitsFit
from pikv_megatron.calibration.window import NEAR, SINKS, LayerWindow
from pikv_megatron.relevance import Ask
from pikv_megatron.router.reinforced import ReinforcedOptions
from pikv_megatron.router.visits import visit_features
from pikv_megatron.types import Directory

CPU, COST = torch.device("cpu"), 0.05


def drawn_query(seed: int, slot: int) -> tuple[Ask, torch.Tensor]:
    """One page in each of 6 shards; far tokens have a tenth of the attention, nine tenths where one
    page promises nearly all, and the shard of the newest page has some besides: mass [1, 6]."""
    generator = torch.Generator().manual_seed(seed)
    sharpness = 8.0 if seed % 3 == 0 else 0.5
    promise = (sharpness * torch.rand(1, 6, generator=generator)).softmax(1)
    newest = torch.randperm(6, generator=generator)
    page = torch.arange(6).view(1, 1, 6)
    directory = Directory(page, page >= 0, newest.view(1, 1, 6), 6)
    where = torch.tensor([slot])
    mass = promise * (0.9 if seed % 3 == 0 else 0.1)
    mass[0, newest.argmax()] += 0.08
    return Ask(torch.zeros(1, 1, 8), where, where, directory, GivenScores(promise)), mass


def reward(router, seeds: range) -> float:
    """Each query of a sequence of its own, of which nothing was learned yet."""
    total = 0.0
    for seed in seeds:
        ask, mass = drawn_query(seed, 0)
        shards = router.visit(ask)
        router.learn(ask.slots, shards, mass)
        router.release(0)
        total += float((shards * (mass - COST)).sum())
    return total


def new_router(online: bool = True):
    return ReinforcedOptions(k=3, cost=COST, online=online).build(1, 6, CPU)


def test_what_visits_taught_serves_the_next_run():
    first = new_router()
    untaught = reward(first, range(300))
    assert reward(first, range(300)) == untaught, "what a run teaches changes nothing in it"
    second, third = new_router(online=False), new_router()
    sums = {name: first.visits.known[name] + part for name, part in first.visits.taught.items()}
    second.visits.recall(sums)
    assert not second.learns and reward(second, range(300, 400)) > reward(third, range(300, 400))
    third.visits.recall({"visits.moe.squares": torch.ones(4, 4)})
    assert not third.visits.known["visits.relevance.squares"].any()


def test_a_calibration_says_what_a_visit_gives():
    """Queries look at their neighbours, or find one far token that has their direction."""
    generator = torch.Generator().manual_seed(0)
    num_tokens = SINKS + NEAR + SHARDS * PAGE + 400
    query, key = torch.randn(2, num_tokens, 4, 16, generator=generator)
    key = key[:, :2]
    asked = torch.arange(SINKS + NEAR + SHARDS * PAGE, num_tokens, 16)
    query[asked] = 3 * key[asked - 150].repeat_interleave(2, dim=1)
    window = LayerWindow(0, SHAPE.kv, query, key, key, 0.25, None, False, query.flatten(1), None)
    fit = VisitsFit(nn.Identity(), num_windows=1)
    learned = fit.finish(fit.of(window))
    router = new_router()
    router.visits.recall(learned)
    sharp, even = torch.full((2, 1, 6), 0.1 / 5), torch.full((2, 1, 6), 1 / 6)
    sharp[..., 0] = 0.9
    newest = torch.zeros(1, dtype=torch.int64)
    found, spread = (
        router.visits.expect(visit_features(promise[0], newest))[0] for promise in (sharp, even)
    )
    assert found[0] > 0.6 and (found[1:] < 0.1).all()
    # Of all tokens that a query sees, those of a shard are an eighth at most.
    assert (spread > 0).all() and (spread < 1 / 6).all()
    short = (x[: SINKS + NEAR + SHARDS * PAGE] for x in (query, key, key))
    assert not fit.of(LayerWindow(0, SHAPE.kv, *short, 0.25, None, False, query, None))

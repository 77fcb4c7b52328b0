"""What every router promises, and what each one does."""

import pytest
import torch
from directories import GivenScores, drawn_ask

from pikv_megatron.options import members
from pikv_megatron.relevance import Ask
from pikv_megatron.router.cache_aware import CacheAwareOptions
from pikv_megatron.router.eplb import EPLBOptions
from pikv_megatron.router.hash import HashOptions
from pikv_megatron.router.hierarchical import HierarchicalOptions
from pikv_megatron.router.load_balanced import LoadBalancedOptions
from pikv_megatron.router.registry import Router
from pikv_megatron.router.reinforced import ReinforcedOptions
from pikv_megatron.router.round_robin import RoundRobinOptions
from pikv_megatron.router.top_k import TopKOptions
from pikv_megatron.types import Directory

ROUTERS = members(Router)
CPU = torch.device("cpu")


def built(options, num_slots: int = 3, num_shards: int = 4):
    return options.build(num_slots, num_shards, CPU)


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("num_sequences", [0, 3])
def test_every_sequence_visits_some_shard_and_no_more_than_k(name, num_sequences):
    router = built(ROUTERS[name]())
    if router is None:
        return
    for seed in range(4):
        ask = drawn_ask(num_sequences, num_ranks=2, num_shards=4, seed=seed)
        shards = router.visit(ask)
        assert shards.dtype == torch.bool and shards.shape == (num_sequences, 4)
        assert ((shards.sum(1) >= 1) & (shards.sum(1) <= 2)).all()
        router.learn(ask.slots, shards, torch.rand(num_sequences, 4))


@pytest.mark.parametrize("name", ROUTERS)
def test_what_is_learned_belongs_to_one_sequence_and_ends_with_it(name):
    """A sequence visits the same shards with others beside it, and in a slot that was used."""
    if built(ROUTERS[name]()) is None:
        return

    def visits(router, rows: list[int]) -> torch.Tensor:
        every = []
        for seed in range(12):
            ask = skewed_ask(3, 4, seed).of(rows)
            every.append(router.visit(ask))
            router.learn(ask.slots, every[-1], mass=torch.full((len(rows), 4), 0.004) * (seed % 4))
        return torch.stack(every)

    used = built(ROUTERS[name]())
    together = visits(used, [0, 1, 2])
    for row in range(3):
        alone = visits(built(ROUTERS[name]()), [row])
        assert torch.equal(together[:, row], alone[:, 0])
    for slot in range(3):
        used.release(slot)
    assert torch.equal(visits(used, [0, 1, 2]), together)
    assert all(t.shape[0] == 3 for t in used.tensors())


class SkewedAsk(Ask):
    """One page a shard, whose relevance is given."""

    def __init__(self, slots: torch.Tensor, scores: torch.Tensor, position: int):
        n, num_shards = scores.shape
        page = torch.arange(num_shards).expand(n, 1, num_shards)
        directory = Directory(page, page >= 0, page, num_shards, page)
        positions = torch.full_like(slots, position)
        query = torch.zeros(n, 1, 8)
        super().__init__(query, slots, positions, directory, GivenScores(scores))
        self._scores_given, self._position = scores, position

    def of(self, rows: list[int]) -> "SkewedAsk":
        return SkewedAsk(self.slots[rows], self._scores_given[rows], self._position)


def skewed_ask(num_sequences: int, num_shards: int, seed: int) -> SkewedAsk:
    """The first shards promise the most, on average: e^0.5 from each to the next."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num_sequences, num_shards, generator=generator)
    logits = noise - 0.5 * torch.arange(num_shards)
    return SkewedAsk(torch.arange(num_sequences), logits.softmax(1), seed)


def loads(options, num_shards: int = 8, steps: int = 200) -> torch.Tensor:
    """[N]: share of the visits of one sequence."""
    router = built(options, 1, num_shards)
    visits = sum(router.visit(skewed_ask(1, num_shards, seed))[0].float() for seed in range(steps))
    return visits / visits.sum()


def test_top_k_visits_the_shards_with_the_most_of_the_attention():
    ask = drawn_ask(3, num_ranks=2, num_shards=8)
    visited = built(TopKOptions(k=3), 3, 8).visit(ask)
    for row, (shards, shares) in enumerate(zip(visited, ask.page_scores)):
        by_shard = torch.zeros(8).index_add_(0, ask.directory.shard[row].flatten(), shares)
        assert int(shards.sum()) == 3
        assert by_shard[shards].min() >= by_shard[~shards].max()


@pytest.mark.parametrize("options", [
    LoadBalancedOptions(k=2, alpha=0), EPLBOptions(k=2, beta=0), CacheAwareOptions(k=2, penalty=0),
    HierarchicalOptions(k=2, groups=4, visited_groups=4),
], ids=lambda options: options.name)
def test_without_its_penalty_a_router_is_top_k(options):
    assert torch.equal(loads(options), loads(TopKOptions(k=2)))


@pytest.mark.parametrize("milder, stronger", [
    (LoadBalancedOptions(k=3), LoadBalancedOptions(k=3, alpha=4.0)),
    (EPLBOptions(k=3), EPLBOptions(k=3, beta=40.0)),
], ids=["load_balanced", "eplb"])
def test_a_balancing_router_evens_out_skewed_loads(milder, stronger):
    skewed = loads(TopKOptions(k=3))
    assert loads(stronger).std() < 0.5 * skewed.std()
    assert loads(stronger).std() < loads(milder).std() < 0.95 * skewed.std()
    assert loads(stronger).min() > skewed.min()


def test_a_visit_to_a_shard_with_more_pages_is_more_load():
    router = built(LoadBalancedOptions(k=2), 1, 3)
    shard = torch.tensor([[[0, 0, 0, 1, 2]]])
    directory = Directory(shard, shard >= 0, shard, 3)
    scores = torch.tensor([[0.2, 0.2, 0.2, 0.3, 0.1]])
    where = torch.zeros(1, dtype=torch.int64)
    router.visit(Ask(torch.zeros(1, 1, 8), where, where, directory, GivenScores(scores)))
    torch.testing.assert_close(router.tensors()[0], torch.tensor([[1.8, 0.6, 0.0]]))


def test_a_cache_aware_router_leaves_shards_that_gave_nothing():
    """The first shard promises the most and gives nothing; the second gives what it promises."""
    router = built(CacheAwareOptions(k=1, tau=0.1), 1, 3)
    scores = torch.tensor([[0.5, 0.3, 0.2]])
    visited = []
    for position in range(6):
        ask = SkewedAsk(torch.tensor([0]), scores, position)
        shards = router.visit(ask)
        visited.append(int(shards[0].nonzero()))
        router.learn(ask.slots, shards, torch.tensor([[0.0, 0.3, 0.0]]))
    # 0.5 / sqrt(1 + misses) falls below 0.3 with the second miss.
    assert visited == [0, 0, 1, 1, 1, 1]
    assert router.tensors()[0].tolist() == [[2.0, 0.0, 0.0]]


def rewards(options, cost: float) -> list[float]:
    """Of 200 queries to 6 shards; every other shard gives a fifth of what those beside it give."""
    router, found = built(options, 1, 6), []
    for seed in range(200):
        ask = skewed_ask(1, 6, seed)
        shards, mass = router.visit(ask), ask.page_scores * torch.tensor([0.1, 0.5] * 3)
        router.learn(ask.slots, shards, mass)
        found.append(float((shards * (mass - cost)).sum()))
    return found


@pytest.mark.parametrize("cost", [0.01, 0.05, 0.1])
def test_a_reinforced_router_earns_more_than_top_k(cost):
    """Once it has learned, whatever fixed number of shards is compared; and more than at first."""
    learned = rewards(ReinforcedOptions(k=3, cost=cost), cost)
    for k in (1, 2, 3):
        assert sum(learned[100:]) > sum(rewards(TopKOptions(k=k), cost)[100:])
    assert sum(learned[100:]) > sum(learned[:100])


def test_a_reinforced_router_visits_one_shard_where_none_is_worth_its_cost():
    router = built(ReinforcedOptions(k=3, cost=1.0), 1, 6)
    assert [int(router.visit(skewed_ask(1, 6, seed)).sum()) for seed in range(9)] == [1] * 9


def test_a_hierarchical_router_stays_in_the_best_groups():
    scores = torch.tensor([[0.3, 0.05, 0.1, 0.25, 0.0, 0.3]])  # groups 0.4, 0.6 of even and odd
    ask = SkewedAsk(torch.tensor([0]), scores, 0)
    router = built(HierarchicalOptions(k=2, groups=2, visited_groups=1), 1, 6)
    assert router.visit(ask)[0].nonzero().flatten().tolist() == [3, 5]
    # A group that has fewer than k shards is visited whole.
    router = built(HierarchicalOptions(k=3, groups=3, visited_groups=1), 1, 6)
    assert router.visit(ask)[0].nonzero().flatten().tolist() == [0, 3]


def test_the_base_routers_go_by_position_alone():
    def visited(options, position: int) -> list[int]:
        where = torch.tensor([0]), torch.tensor([position])
        shards = built(options, 1, 5).visit(Ask(torch.zeros(1, 1, 8), *where))
        return shards[0].nonzero().flatten().tolist()

    turns = [visited(RoundRobinOptions(k=2), position) for position in range(5)]
    assert turns == [[0, 1], [2, 3], [0, 4], [1, 2], [3, 4]]
    hashed = HashOptions(k=2, block=4)
    found = [visited(hashed, position) for position in (0, 3, 4, 17)]
    assert found == [[0, 1], [0, 1], [1, 2], [0, 4]]

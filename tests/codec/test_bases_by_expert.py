"""Each expert shard's pages have a basis of their own, and one softmax goes over all of them."""

import pytest
import torch
from layer_caches import SCALE, SHAPE

from pikv_megatron import PiKVConfig
from pikv_megatron.cache.owner.owner_reads import OwnerReads
from pikv_megatron.cache.owner.shard_store import ShardStore
from pikv_megatron.cache.placement import Placement
from pikv_megatron.cache.tokens import TokenBlock
from pikv_megatron.codec.transform.moments import KVMoments, Moments
from pikv_megatron.ops.dense_attention import dense_attention

EXPERTS, PAGE_SIZE, WIDTH, NG = 4, 8, 8, 2
SIZES = {"token_shards": 1, "expert_shards": EXPERTS, "page_size": PAGE_SIZE, "shard_after": 0}
SLOTS = torch.tensor([0, 1])


def filled_store(transform: dict, moments=None) -> tuple[ShardStore, TokenBlock]:
    """Of rank 1 of 2, two sequences; keys and values of an expert lie in two directions of theirs.
    """
    (spec,) = PiKVConfig(**SIZES, codec={"transform": transform}).resolve([SHAPE])
    spec = spec._replace(moments=moments)
    placement = Placement(**{k: v for k, v in SIZES.items() if k != "page_size"},
                          hash_block=PAGE_SIZE, num_ranks=2, rank=1)
    store = ShardStore(spec, placement, PAGE_SIZE, 2, 100, False)
    rng = torch.Generator().manual_seed(0)
    count = 2 * EXPERTS * (2 * PAGE_SIZE + 3)
    number = torch.arange(count)
    slot, expert = number % 2, number // 2 % EXPERTS
    directions = torch.randn(2, 2, EXPERTS, 2, WIDTH, generator=rng)  # by slot, of K and V
    picked = directions[slot].transpose(0, 1)[:, number, expert]  # [2, t, 2, w]
    mixed = torch.randn(2, NG, count, 2, generator=rng)
    keys, values = torch.einsum("xgtr,xtrw->xgtw", mixed, picked)
    shard = placement.shard(number // 2, expert)
    block = TokenBlock(keys, values, slot, shard, number // 2, torch.zeros_like(slot))
    store.insert(block, store.admit(block))
    return store, block


@pytest.mark.parametrize("method", ["svd", "lora", "distillation"])
def test_two_directions_hold_the_tokens_of_an_expert_and_not_those_of_all(method):
    slots = SLOTS[:1] if method == "lora" else SLOTS  # its bases are those of the first sequence
    for per_expert in (True, False):
        store, block = filled_store({"name": method, "rank": 2, "per_expert": per_expert})
        lost = 0.0
        for slot in slots.tolist():
            pages = store.table.pages_of(slot)
            assert len(pages) == 2 * EXPERTS // 2
            keys, values = store.restore(pages, torch.full_like(pages, slot))
            token = store.pool.position[pages].flatten() * 2 + slot
            for stored, exact in ((keys, block.keys), (values, block.values)):
                lost = max(lost, float((stored.flatten(1, 2) - exact[:, token]).abs().max()))
        assert lost < 1e-3 if per_expert else lost > 0.1


def test_pages_are_judged_in_the_basis_of_their_expert():
    store, block = filled_store({"name": "svd", "rank": 2, "per_expert": True})
    query = torch.randn(2, 4, WIDTH)
    found = store.page_logits(query, OwnerReads(SLOTS, 100, (0, 1)))
    for slot in SLOTS.tolist():
        pages = store.table.pages_of(slot)
        token = store.pool.position[pages] * 2 + slot
        keys = block.keys[:, token].repeat_interleave(4 // NG, 0)  # [np, pages, S, w]
        right = torch.einsum("hw,hptw->hpt", query[slot], keys).mul(SCALE).logsumexp(2)
        torch.testing.assert_close(found[slot, :, : len(pages)], right, atol=1e-3, rtol=1e-3)
        assert (found[slot, :, len(pages) :] == -torch.inf).all()


def test_attention_merges_the_parts_of_a_sequence():
    store, block = filled_store({"name": "svd", "rank": 2, "per_expert": True})
    query = torch.randn(2, 3, 4, WIDTH)
    reads = OwnerReads(SLOTS, 100, (0, 1))
    state, shares = store.attend_decoding(query[:, :1], reads, [], None, True)
    whole = store.attend(query, reads, [])
    mine = store.placement.owner(block.shard) == 1
    for slot in (0, 1):
        own = mine & (block.slot == slot)
        dense = dense_attention(
            query[slot : slot + 1], block.keys[:, None, own], block.values[:, None, own],
            torch.ones(1, int(own.sum()), dtype=torch.bool), SCALE,
        )
        torch.testing.assert_close(whole.out[slot], dense.out[0], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(whole.lse[slot], dense.lse[0], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(state.out, whole.out[:, :1])
    torch.testing.assert_close(shares.sum(3), torch.ones(2, 1, 4))
    store.release(0)
    assert not store._codec.is_fitted(0) and store._codec.is_fitted(2)


@pytest.mark.parametrize("name", ["svd", "lora"])
def test_an_owner_takes_the_calibrated_bases_of_its_shards(name):
    transform = {"name": name, "rank": 2, "per_expert": True}
    _, block = filled_store(transform)
    own = block.slot == 0  # sequences differ in their directions, and a calibration knows one text
    chosen = [own & (block.shard == shard) for shard in range(EXPERTS)]
    moments = tuple(
        KVMoments(Moments.of(block.keys[:, own]), Moments.of(block.values[:, own]))
        for own in chosen
    )
    store, _ = filled_store(transform, moments)
    pages = store.table.pages_of(0)
    keys, values = store.restore(pages, torch.zeros_like(pages))
    token = store.pool.position[pages].flatten() * 2
    for stored, exact in ((keys, block.keys), (values, block.values)):
        torch.testing.assert_close(stored.flatten(1, 2), exact[:, token], atol=1e-3, rtol=1e-3)
    # They are all sequences', and stay when one ends.
    store.release(0)
    assert len(store.parts()["codecs"][0]) == EXPERTS // 2 and store._codec.is_fitted(0)


@pytest.mark.parametrize(
    "sizes", [
        {"token_shards": 1}, {"expert_shards": 4},
        {"token_shards": 1, "expert_shards": 4, "shard_after": 64},
    ]
)
def test_pages_of_several_experts_are_refused(sizes):
    codec = {"transform": {"name": "svd", "per_expert": True}}
    with pytest.raises(ValueError, match="per_expert.*token_shards.*expert_shards.*shard_after"):
        PiKVConfig(codec=codec, **sizes).resolve([SHAPE])


def test_keys_and_values_of_other_parts_are_refused():
    svd = {"name": "svd", "per_expert": True}
    with pytest.raises(ValueError, match="per_expert"):
        PiKVConfig(codec={"transform": {"keys": "svd", "values": svd}})
    codec = PiKVConfig(codec={"transform": {"keys": "identity", "values": svd}}).codec
    assert codec.transform.is_by_expert

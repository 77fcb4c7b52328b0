"""Batches whose sequences differ much in length: what they give, and what is padded."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import relative_rms
from paged_cases import CaseSpec, ListSpec, build

from pikv_megatron.ops import decode_attention as module
from pikv_megatron.ops import length_classes as classes_module
from pikv_megatron.ops.decode_attention import decode_attention
from pikv_megatron.ops.length_classes import length_classes
from pikv_megatron.types import KVPages, PageList

SCALE = 0.2


@pytest.fixture
def attended(monkeypatch) -> list[int]:
    """Tokens, padding too, that each call of the padded attention goes through."""
    sizes, attend = [], module._attend

    def counting(query, lists, *args):
        sizes.append(sum(each.lens.numel() * each.pages.page_size for each in lists))
        return attend(query, lists, *args)

    monkeypatch.setattr(module, "_attend", counting)
    return sizes


@pytest.fixture
def cheap_classes(monkeypatch) -> None:
    monkeypatch.setattr(classes_module, "CLASS_BYTES", 1)


def ragged(columns: list[int], page_size=8, seed=0, width=16) -> PageList:
    """A list of plain pages in any order, of two KV heads; unread columns name a page of NaN."""
    rng = torch.Generator().manual_seed(seed)
    shape = (2, sum(columns) + 1, page_size, width)
    pages = KVPages(*(torch.randn(shape, generator=rng) for _ in range(2)))
    for pool in pages[:2]:
        pool[:, -1] = torch.nan
    table = torch.full((len(columns), max(columns) + 1), sum(columns))
    order = iter(torch.randperm(sum(columns), generator=rng).split(columns))
    for row, (count, own) in enumerate(zip(columns, order)):
        table[row, :count] = own
    lens = (table != sum(columns)).int() * page_size
    return PageList(pages, table, lens, notes={})


def one_by_one(query, lists, scale):
    """Every sequence on its own."""
    results = []
    for row in range(len(query)):
        own = slice(row, row + 1)
        results.append(decode_attention(query[own], [
            x._replace(
                table=x.table[own], lens=x.lens[own], notes=None,
                token_mask=None if x.token_mask is None else x.token_mask[own],
                logit_bias=None if x.logit_bias is None else x.logit_bias[own],
            ) for x in lists
        ], scale, with_mass=True))
    states, masses = zip(*results)
    return *(torch.cat(part) for part in zip(*states)), [torch.cat(part) for part in zip(*masses)]


def assert_same(query, lists, scale=SCALE) -> None:
    state, masses = decode_attention(query, lists, scale, with_mass=True)
    out, lse, right_masses = one_by_one(query, lists, scale)
    tolerance = 3e-6 if query.dtype == torch.float32 else 4e-3
    assert state.out.dtype == out.dtype and relative_rms(state.out, out) < tolerance
    torch.testing.assert_close(state.lse, lse, atol=1e-5, rtol=1e-5)
    for mass, right in zip(masses, right_masses, strict=True):
        assert torch.equal(mass == 0, right == 0)
        torch.testing.assert_close(mass, right, atol=1e-6, rtol=1e-4)
    bare = decode_attention(query, lists, scale)
    assert bare[1] is None and torch.equal(bare[0].out, state.out)


LISTS = (
    ListSpec("int8", 8, 60, 1, 1, True, True, True), ListSpec("float32", 3, 30, 1, 1, True),
    ListSpec("float16", 16, 1, 1, 1),
)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from([0, 0, 1, 2, 3, 20, 60]), min_size=1, max_size=12),
       st.integers(0, 99), st.sampled_from([torch.float32, torch.bfloat16]),
       st.lists(st.booleans(), min_size=3, max_size=3))
def test_a_batch_gives_what_its_sequences_give(columns, seed, dtype, has_notes):
    """Masks, biases, several lists with holes, each with notes of its own or none."""
    case = build(CaseSpec(len(columns), 2, 2, 3, 48, 64, dtype, LISTS, seed))
    lists = []
    for each, noted, shift in zip(case.lists, has_notes, (0, 1, 2)):
        own = torch.tensor(columns).roll(shift)[:, None]
        is_read = torch.arange(each.lens.shape[1]) < own
        lists.append(each._replace(lens=each.lens * is_read, notes={} if noted else None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classes_module, "CLASS_BYTES", 1)
        for _ in range(2):
            assert_same(case.query, lists)


@pytest.mark.parametrize("columns", [[256] + [16] * 15, [100, 3, 50, 3, 90, 0, 3, 26, 1]])
def test_little_is_padded(columns, attended, cheap_classes):
    query = torch.randn(len(columns), 1, 4, 16)
    page_list = ragged(columns)
    decode_attention(query, [page_list], SCALE)
    assert len(attended) <= classes_module.MOST_CLASSES
    assert sum(attended) <= 1.05 * 8 * sum(columns)
    assert_same(query, [page_list])


@pytest.mark.parametrize("columns", [[20] * 6, [20, 19, 17, 20], [5]])
def test_an_even_batch_is_attended_at_once(columns, attended, cheap_classes):
    decode_attention(torch.randn(len(columns), 1, 4, 16), [ragged(columns)], SCALE)
    assert attended == [8 * len(columns) * max(columns)]


def test_a_class_must_be_worth_its_calls(attended):
    decode_attention(torch.randn(2, 1, 4, 16), [ragged([20, 1])], SCALE)
    assert len(attended) == 1


def test_a_list_is_searched_once_for_all_layers(monkeypatch, cheap_classes):
    """Layers have pools of their own, and share the notes; so do the blocks of each class."""
    searches = {"_find_classes": 0, "_part": 0}
    for name in searches:
        def counting(*args, name=name, find=getattr(classes_module, name)):
            searches[name] += 1
            return find(*args)

        monkeypatch.setattr(classes_module, name, counting)
    first, query = ragged([40, 2, 2, 1]), torch.randn(4, 1, 4, 16)
    for seed in range(3):
        layer = first._replace(pages=ragged([40, 2, 2, 1], seed=seed).pages)
        decode_attention(query, [layer], SCALE)
    assert searches == {"_find_classes": 1, "_part": 3}  # 40 | 2 2 | 1
    for seed in range(3):
        assert_same(query, [first._replace(pages=ragged([40, 2, 2, 1], seed=seed).pages)])


def test_a_new_list_beside_an_old_one(cheap_classes):
    """The old list's notes outlive the classes that were found with another list."""
    old, query = ragged([30, 1, 1, 1]), torch.randn(4, 1, 4, 16)
    for seed, columns in enumerate(([1, 1, 40, 2], [2, 2, 2, 2], [1, 1, 40, 2], [9, 50, 1, 1])):
        for lists in ([old, ragged(columns, 4, seed)], [ragged(columns, 4, seed), old]):
            assert_same(query, lists)
            assert_same(query, lists)


def cost(tokens: torch.Tensor, ends: list[int], overhead: int) -> int:
    """Padded tokens of these classes, and what the classes cost."""
    parts = zip([0, *ends], ends)
    return sum(overhead + (j - i) * int(tokens[:, i:j].amax(1).sum()) for i, j in parts)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)), min_size=1, max_size=7),
       st.integers(1, 40))
def test_no_partition_of_the_order_is_cheaper(columns, overhead):
    tokens, n = torch.tensor(columns).T, len(columns)
    ends = classes_module._best_ends(tokens, overhead)
    assert ends == sorted(set(ends)) and ends[-1] == n
    cuts = ([i + 1 for i in range(n - 1) if bits >> i & 1] for bits in range(2 ** (n - 1)))
    assert cost(tokens, ends, overhead) == min(cost(tokens, [*x, n], overhead) for x in cuts)


def test_a_large_batch_is_cut_nearly_as_well(monkeypatch):
    """Places of 8 sequences against places of one."""
    tokens = torch.randint(0, 5000, (2, 1000), generator=torch.Generator().manual_seed(0))
    tokens = tokens.sort(dim=1, descending=True).values
    coarse = classes_module._best_ends(tokens, 500)
    assert coarse[-1] == 1000 and all(end % 8 == 0 for end in coarse)
    monkeypatch.setattr(classes_module, "MOST_PLACES", 1000)
    fine = classes_module._best_ends(tokens, 500)
    assert cost(tokens, coarse, 500) <= 1.01 * cost(tokens, fine, 500)


def test_the_example_of_the_docstring(monkeypatch):
    page_list = ragged([1] * 4, page_size=64)
    monkeypatch.setattr(classes_module, "CLASS_BYTES", 500 * 4 * 2 * 16)
    assert length_classes([page_list], ((256, 16, 15, 2),)) == ((0,), (1, 2), (3,))
    assert classes_module._best_ends(torch.tensor([[9, 4, 4, 1]]), 2) == [1, 3, 4]

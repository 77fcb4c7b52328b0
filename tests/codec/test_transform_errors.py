"""The squared error of every transform on drawn data is what Table 2 of the paper says."""

import pytest
import torch

from pikv_megatron.codec.registry import CodecOptions
from pikv_megatron.codec.transform.moments import KVMoments, Moments, plane_order
from pikv_megatron.types import KVShape

NG, TOKENS, S = 2, 96, 8
PAGE = torch.arange(TOKENS // S)
SLOTS = torch.zeros(TOKENS // S, dtype=torch.int64)


def drawn(width: int, seed: int = 0) -> torch.Tensor:
    """[ng, t, w], correlated channels about a mean."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=rng) * torch.logspace(0, -2, width)
    return torch.randn(NG, TOKENS, width, generator=rng) @ mix + torch.randn(width, generator=rng)


def restored(transform: dict, keys: torch.Tensor, values: torch.Tensor, moments=None):
    """What pages of these tokens stand for, [ng, t, w]."""
    kv = KVShape(NG, keys.shape[2], values.shape[2], torch.float32, torch.device("cpu"))
    codec = CodecOptions(transform=transform).build(kv, S, 1, moments)
    if codec.learns and moments is None:
        codec.fit(0, keys, values)
    pool = codec.allocate(len(PAGE))
    pages = (x.unflatten(1, (-1, S)) for x in (keys, values))
    codec.seal(*pages, pool, PAGE, SLOTS)
    return [x.flatten(1, 2) for x in codec.restore(pool, PAGE, SLOTS)]


def errors(transform: dict, width: int, value_width: int) -> list[tuple[torch.Tensor, ...]]:
    """Keys and values with their squared errors by head, [ng]."""
    keys, values = drawn(width), drawn(value_width, seed=1)
    stored = restored(transform, keys, values)
    return [(x, (y - x).square().sum((1, 2))) for x, y in zip((keys, values), stored)]


def dropped(x: torch.Tensor, rank: int) -> torch.Tensor:
    """Squared singular values of [ng, t, w] beyond the rank, summed."""
    return torch.linalg.svdvals(x)[:, rank:].square().sum(1)


def assert_equal(found: torch.Tensor, formula: torch.Tensor) -> None:
    torch.testing.assert_close(found, formula, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rank", [1, 5, 15])
@pytest.mark.parametrize("name", ["svd", "lora", "lora++", "distillation"])
def test_low_rank_drops_the_small_singular_values(name, rank):
    for x, found in errors({"name": name, "rank": rank}, 15, 16):
        centred = x if name == "lora" else x - x.mean(1, keepdim=True)
        assert_equal(found, dropped(centred, rank))


@pytest.mark.parametrize("block, rank", [(2, 5), (4, 8), (16, 3)])
def test_block_pca_drops_the_small_singular_values_of_all_blocks(block, rank):
    orders = plane_order(16), torch.arange(16)
    for (x, found), order in zip(errors({"name": "chunkkv", "rank": rank, "block": block}, 16, 16),
                                 orders):
        parts = (x - x.mean(1, keepdim=True))[:, :, order].split(block, dim=2)
        energy = torch.cat([torch.linalg.svdvals(part).square() for part in parts], dim=1)
        assert_equal(found, energy.sum(1) - energy.topk(rank, dim=1).values.sum(1))


@pytest.mark.parametrize("width, rank", [(16, 6), (16, 5), (15, 4)])
def test_crops_and_pruning_drop_the_energy_of_channels(width, rank):
    for name in ("fastv", "pruning"):
        for (x, found), is_key in zip(errors({"name": name, "rank": rank}, width, 16), (1, 0)):
            energy = x.square().sum(1)
            if name == "fastv":
                order = plane_order(width).flip(0) if is_key else torch.arange(16)
                right = energy[:, order[rank:]].sum(1)
            else:
                in_planes = is_key and width % 2 == rank % 2 == 0
                units = energy.unflatten(1, (2, -1)).sum(1) if in_planes else energy
                kept = units.topk(rank // 2 if in_planes else rank, dim=1).values.sum(1)
                right = energy.sum(1) - kept
            assert_equal(found, right)


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_pooling_drops_what_neighbours_differ_by(level):
    for x, found in errors({"name": "pyramidkv", "level": level}, 16, 15):
        groups = x.unflatten(1, (-1, 2**level))
        right = (groups - groups.mean(2, keepdim=True)).square().sum((1, 2, 3))
        assert_equal(found, right)


@pytest.mark.parametrize("rank", [2, 7])
def test_distillation_loses_least_of_logits_and_output(rank):
    """Its error in the metrics of the teacher is the sum of what the metric makes of singular
    values, and no larger than that of directions of the keys and values alone."""
    keys, values = drawn(12), drawn(12, seed=1)
    metrics = [drawn(12, seed) for seed in (2, 3)]
    metrics = [x.transpose(1, 2) @ x / TOKENS for x in metrics]
    moments = [KVMoments(
        *(Moments.of(x)._replace(metric=m) for x, m in zip((keys, values), metrics))
    )]
    students = restored({"name": "distillation", "rank": rank}, keys, values, moments)
    others = restored({"name": "svd", "rank": rank}, keys, values, moments)
    for x, student, other, metric in zip((keys, values), students, others, metrics):
        ours, theirs = (
            torch.einsum("ntv,nvw,ntw->n", y - x, metric, y - x) for y in (student, other)
        )
        vectors = torch.linalg.cholesky(metric + 1e-6 * torch.eye(12))
        formula = dropped((x - x.mean(1, keepdim=True)) @ vectors, rank)
        torch.testing.assert_close(ours, formula, rtol=0.05, atol=1e-2)
        assert (ours <= theirs * 1.001).all()

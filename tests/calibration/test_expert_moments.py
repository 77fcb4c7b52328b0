"""Moments by expert are those of the tokens that chose it, however text came and shards divide."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from pikv_megatron.calibration.fits.expert_moments import ExpertMomentsFit
from pikv_megatron.calibration.window import LayerWindow
from pikv_megatron.codec.calibration import read_shard_moments
from pikv_megatron.codec.transform.moments import KVMoments, Moments
from pikv_megatron.types import KVShape

NG, WIDTH, VALUE_WIDTH, TOKENS = 2, 6, 4, 200
KV = KVShape(NG, WIDTH, VALUE_WIDTH, torch.float32, torch.device("cpu"))


def window(number: int, experts: torch.Tensor | None, per_expert: bool = True) -> LayerWindow:
    rng = torch.Generator().manual_seed(number)
    query, key, value = (
        torch.randn(TOKENS, heads, width, generator=rng) + 2.0
        for heads, width in ((4, WIDTH), (NG, WIDTH), (NG, VALUE_WIDTH))
    )
    return LayerWindow(
        number, KV, query, key, value, 1.0, None, False, torch.empty(0), experts, per_expert
    )


def fit_of(num_experts: int | None) -> ExpertMomentsFit:
    attention = SimpleNamespace(config=SimpleNamespace(num_moe_experts=num_experts))
    return ExpertMomentsFit(attention, 2)


@pytest.mark.parametrize("num_experts, num_shards", [(6, 2), (6, 8), (40, 4)])
def test_a_shard_has_the_moments_of_its_tokens(num_experts, num_shards):
    fit = fit_of(num_experts)
    rng = torch.Generator().manual_seed(9)
    # The last expert is chosen by nobody.
    windows = [
        window(i, F.one_hot(
            torch.randint(num_experts - 1, (TOKENS,), generator=rng), num_experts
        ).float())
        for i in range(2)
    ]
    parts = [fit.of(each) for each in windows]
    fitted = fit.finish({name: parts[0][name] + parts[1][name] for name in parts[0]})
    assert len(fitted["experts.keys.count"]) == min(num_experts, 32)
    shard = torch.cat([each.experts.argmax(dim=1) for each in windows]) % num_shards
    keys, values = (
        torch.cat([getattr(each, name) for each in windows]).transpose(0, 1)
        for name in ("key", "value")
    )
    whole = KVMoments(*(
        Moments.of(x)._replace(metric=torch.eye(x.shape[2]).expand(NG, -1, -1))
        for x in (keys, values)
    ))
    found = read_shard_moments("file", 0, fitted, whole, num_shards)
    assert len(found) == num_shards
    for number, (own, few) in enumerate(zip(found, torch.bincount(shard, minlength=8) < WIDTH)):
        assert few == (num_shards == 8 and number >= 5)
        for side, x, every in zip(own, (keys, values), whole):
            right = every if few else Moments.of(x[:, shard == number])
            assert side.count == right.count and side.metric is every.metric
            torch.testing.assert_close(side.mean, right.mean)
            torch.testing.assert_close(side.scatter, right.scatter, rtol=1e-4, atol=1e-3)


def test_a_layer_without_experts_has_one_for_all_and_nobody_has_to_ask():
    fit = fit_of(None)
    assert fit.of(window(0, None, per_expert=False)) == {}
    fitted = fit.finish(fit.of(window(0, None)))
    assert fitted["experts.values.count"].tolist() == [TOKENS]


def test_a_calibration_of_all_experts_together_is_refused():
    whole = KVMoments(*(Moments.of(torch.randn(NG, 9, width)) for width in (WIDTH, VALUE_WIDTH)))
    with pytest.raises(ValueError, match="calibration F: layer 3 .*per_expert.*--per-expert"):
        read_shard_moments("F", 3, {"keys.mean": whole.keys.mean}, whole, 4)

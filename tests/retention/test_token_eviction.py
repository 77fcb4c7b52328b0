"""Older pages become fewer, of the tokens that each KV head keeps."""

import pytest
import torch
from calibrations import drawn_calibration
from test_packaging import ROOT

from pikv_megatron import PiKVConfig
from pikv_megatron.layer_spec import LayerShape
from pikv_megatron.retention.expected_attention import ExpectedAttentionOptions
from pikv_megatron.retention.token_eviction import TokenEvictionOptions
from pikv_megatron.types import KVShape

FITTED = drawn_calibration()
S, PAGES = 4, 3
DEMO = ROOT / "models/demo/calibration.safetensors"
LAYERS = [LayerShape(KVShape(2, 32, 32, torch.float32, torch.device("cpu")), 4, 32**-0.5)] * 3


def test_each_head_keeps_the_tokens_that_it_is_expected_to_look_for():
    """Those of the largest share of its query heads' attention, in their order, with their
    values."""
    policy = TokenEvictionOptions(pages=PAGES).build(FITTED)
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2, 5, PAGES * S, 8, generator=generator)
    positions = torch.arange(5 * PAGES * S).view(5, -1)
    kept_keys, kept_values = policy.merge(keys, values, positions)
    assert kept_keys.shape == kept_values.shape == (2, 5, S, 8)
    one_by_one = ExpectedAttentionOptions().build(FITTED)
    differ = 0
    for group in range(5):
        own = keys[:, group].unsqueeze(2), values[:, group].unsqueeze(2)  # pages of one token
        logits = one_by_one.score_pages(*own, positions[group].unsqueeze(1))
        shares = logits.softmax(dim=0).unflatten(1, (2, -1)).mean(dim=2)
        best = shares.topk(S, dim=0).indices.sort(dim=0).values
        differ += int(not torch.equal(best[:, 0], best[:, 1]))
        for head in range(2):
            torch.testing.assert_close(kept_keys[head, group], keys[head, group, best[:, head]])
            torch.testing.assert_close(
                kept_values[head, group], values[head, group, best[:, head]]
            )
    assert differ > 0


@pytest.mark.parametrize("fields, message", [
    ({"budget": "share"}, "retention is token_eviction"),
    ({"codec": {"transform": "pyramidkv"}}, "pools tokens"),
    ({"codec": {"keys": "before_rope"}}, "before_rope"),
    ({"codec": {"format": "aged"}}, "packs older pages"),
    ({"pinned": 20}, "pinned 20"),
    ({"selector": "mass"}, "sketch low_rank is of the pages as they were"),
])
def test_what_does_not_go_with_it_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        PiKVConfig(retention="token_eviction", calibration=DEMO, **fields).resolve(LAYERS)


def test_it_goes_with_keys_as_their_own_sketch():
    config = PiKVConfig(
        retention="token_eviction", calibration=DEMO, selector="mass", sketch="keys",
        codec={"format": "int4"},
    )
    spec, *_ = config.resolve(LAYERS)
    assert spec.options.retention.build(spec.fitted).ageing.most(100, 1) < 40

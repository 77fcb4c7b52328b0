"""The calibrated gate finds what the attention's input says of the experts that are attended to."""

from dataclasses import replace

import pytest
import torch
from layer_caches import SHAPE
from torch import nn

from pikv_megatron import PiKVConfig
from pikv_megatron.calibration.fits.gate import GateFit
from pikv_megatron.calibration.window import NEAR, SINKS, LayerWindow
from pikv_megatron.router.linear_gate import LinearGate

NUM_EXPERTS = 4


def window(number: int, num_tokens: int = 400) -> LayerWindow:
    """Queries that find the tokens of one expert, which their hidden state names."""
    generator = torch.Generator().manual_seed(number)
    wanted, own = torch.randint(NUM_EXPERTS, (2, num_tokens), generator=generator)
    directions = torch.eye(8)
    hidden = directions[wanted] + 0.1 * torch.randn(num_tokens, 8, generator=generator)
    query, key = directions[wanted].unsqueeze(1), directions[own].unsqueeze(1)
    experts = torch.eye(NUM_EXPERTS)[own]
    return LayerWindow(number, SHAPE.kv, query, key, key, 9.0, None, False, hidden, experts)


def test_the_gate_names_the_expert_that_is_attended_to():
    fit = GateFit(nn.Identity(), num_windows=3)
    parts = [fit.of(window(number)) for number in range(3)]
    sums = {name: sum(part[name] for part in parts) for name in parts[0]}
    gate = LinearGate(fit.finish(sums))
    fresh = window(7)
    # Behind few tokens there may be none of an expert.
    shares, mass = (x[150:] for x in (gate(fresh.hidden), fresh.far.by_expert))
    torch.testing.assert_close(shares.sum(1), torch.ones(len(shares)))
    assert (shares.argmax(1) == mass.argmax(1)).float().mean() > 0.99
    assert shares.amax(1).median() > 0.8


def test_windows_too_short_to_look_far_say_nothing():
    fit = GateFit(nn.Identity(), num_windows=1)
    gate = LinearGate(fit.finish(fit.of(window(0, num_tokens=SINKS + NEAR))))
    assert (gate(torch.randn(3, 8)) == 1 / NUM_EXPERTS).all()


def test_a_layer_without_experts_has_no_gate():
    assert not GateFit(nn.Identity(), 1).of(replace(window(0), experts=None))


def test_what_is_missing_is_named():
    fields = {"router": {"name": "top_k", "source": "gate"}, "token_shards": 1}
    with pytest.raises(ValueError, match="router.source gate needs a calibration: set calibrat"):
        PiKVConfig(**fields, expert_shards=4).resolve([SHAPE])
    with pytest.raises(ValueError, match="router.source gate visits the shards of experts"):
        PiKVConfig(**fields).resolve([SHAPE])
    with pytest.raises(ValueError, match="router.source gate needs the section 'gate'"):
        LinearGate({"keys.mean": torch.zeros(1)})

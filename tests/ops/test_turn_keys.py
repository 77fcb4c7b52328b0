"""Keys turn as RoPE turns them, and back."""

import math

import torch

from pikv_megatron.ops.rotation import Rotation
from pikv_megatron.ops.turn_keys import angle_table, turn_keys


def test_the_example():
    angles = angle_table(torch.tensor([math.pi / 2]), 100)
    turned = turn_keys(torch.tensor([[1.0, 0.0]]), torch.tensor([1]), angles)
    torch.testing.assert_close(turned, torch.tensor([[0.0, 1.0]]))


def test_it_turns_as_the_model_does_and_leaves_other_channels():
    frequencies = 10000.0 ** -(torch.arange(6) / 6)
    position = torch.tensor([0, 1, 63, 64, 777, 2999])
    keys = torch.randn(6, 1, 2, 16)
    phase = position[:, None] * frequencies
    model = Rotation(torch.cat([phase, phase], dim=1).unsqueeze(1), 1.0, False, torch.float32)
    angles = angle_table(frequencies, 3000)
    ours = turn_keys(keys[:, 0], position.unsqueeze(1), angles)
    torch.testing.assert_close(ours, model.apply(keys)[:, 0], atol=2e-4, rtol=1e-4)
    again = turn_keys(ours, position.unsqueeze(1), angles, back=True)
    torch.testing.assert_close(again, keys[:, 0], atol=1e-5, rtol=1e-5)

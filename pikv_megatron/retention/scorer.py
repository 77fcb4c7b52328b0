"""A small MLP for each KV head, from a token's key and value to the attention that it will have.

Legend: ng KV heads, t tokens, w and w_v widths of keys and values, f = w + w_v, h hidden numbers.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

HIDDEN = 64
STEPS, BATCH, RATE = 2000, 512, 1e-2
# Shares are learned as logarithms, and less than this is all the same.
FLOOR = 1e-3


class Scorer(NamedTuple):
    """Weights, all float32.

    Attributes:
        shift: [ng, 1, f], taken from the inputs.
        scale: [ng, 1, f], what they are divided by then.
        first: [ng, f, h].
        first_bias: [ng, 1, h].
        second: [ng, h, 1].
        second_bias: [ng, 1, 1].
    """

    shift: Tensor
    scale: Tensor
    first: Tensor
    first_bias: Tensor
    second: Tensor
    second_bias: Tensor

    def predict(self, inputs: Tensor) -> Tensor:
        """Largest share of a far query's attention, natural log, [ng, t] of inputs [ng, t, f]."""
        return self.raw(inputs).clamp(max=0.0)

    def raw(self, inputs: Tensor) -> Tensor:
        """The same before it is held to what a share can be."""
        hidden = torch.baddbmm(self.first_bias, (inputs - self.shift) / self.scale, self.first)
        return torch.baddbmm(self.second_bias, F.gelu(hidden), self.second).squeeze(2)


def features(key: Tensor, value: Tensor) -> Tensor:
    """Keys before RoPE [..., w] and values [..., w_v] -> [..., f], float32."""
    return torch.cat([key.float(), value.float()], dim=-1)


def train(inputs: Tensor, targets: Tensor) -> Scorer:
    """Learn shares [ng, t] from inputs [ng, t, f]; the same from the same, whatever was drawn
    before."""
    inputs, wanted = inputs.float(), targets.float().clamp(min=FLOOR).log()
    ng, count, width = inputs.shape
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(inputs.device) / math.sqrt(shape[1])

    scale = inputs.std(dim=1, keepdim=True).clamp(min=1e-6)
    weights = [
        drawn(ng, width, HIDDEN), inputs.new_zeros(ng, 1, HIDDEN),
        drawn(ng, HIDDEN, 1), inputs.new_zeros(ng, 1, 1) + wanted.mean(),
    ]
    scorer = Scorer(inputs.mean(dim=1, keepdim=True), scale, *weights)
    with torch.enable_grad():
        for weight in weights:
            weight.requires_grad_()
        optimizer = torch.optim.AdamW(weights, RATE, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for _ in range(STEPS):
            picked = torch.randint(count, (BATCH,), generator=generator).to(inputs.device)
            loss = F.mse_loss(scorer.raw(inputs[:, picked]), wanted[:, picked])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return Scorer(*(part.detach() for part in scorer))

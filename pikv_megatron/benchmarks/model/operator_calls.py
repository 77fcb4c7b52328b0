"""Counts what the attention layers call: on a small model, calls cost more than arithmetic."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pikv_megatron.benchmarks.model.decoding import Contestant
from pikv_megatron.benchmarks.model.timing import around_attention


class OperatorCounter(TorchDispatchMode):
    """Counts the torch operators that are called while it `is_counting`, views included.

    An operator made of others, as a matrix product that is reshaped first, counts as its parts.
    """

    def __init__(self):
        super().__init__()
        self.num_calls = 0
        self.is_counting = False

    def start(self) -> None:
        self.is_counting = True

    def stop(self) -> None:
        self.is_counting = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num_calls += self.is_counting
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def attention_calls(contestant: Contestant, tokens: torch.Tensor) -> float:
    """Torch operators that a layer's attention calls in a step, from RoPE to its output:
    the mean over the layers, as the first one also does what is done once a step.

    Args:
        tokens: [batch_size], what the sequences are fed.
    """
    counter = OperatorCounter()
    with around_attention(contestant, counter.start, counter.stop), counter:
        contestant.step(tokens)
    return counter.num_calls / len(list(contestant.attention_bounds()))

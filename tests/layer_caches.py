"""A context of one layer, without a model."""

import torch

from pikv_megatron import PiKVConfig, PiKVInferenceContext
from pikv_megatron.layer_spec import LayerShape
from pikv_megatron.types import KVShape

NUM_GROUPS, WIDTH, HEADS, SCALE = 2, 8, 4, 0.3
SHAPE = LayerShape(
    KVShape(NUM_GROUPS, WIDTH, WIDTH, torch.float32, torch.device("cpu")), HEADS, SCALE
)


def check_same_steps(found: list, right: list, case: object) -> None:
    """Outputs of steps, as lists, are the same on other numbers of ranks."""
    for one, other in zip(found, right, strict=True):
        pair = torch.tensor(one), torch.tensor(other)
        torch.testing.assert_close(*pair, atol=1e-5, rtol=1e-4, msg=str(case))


def new_context(
    config: PiKVConfig, max_batch_size: int, max_sequence_length: int, ep_group=None
) -> PiKVInferenceContext:
    """Its only layer is number 1."""
    return PiKVInferenceContext(
        max_batch_size, max_sequence_length, config, config.resolve([SHAPE]), ep_group
    )

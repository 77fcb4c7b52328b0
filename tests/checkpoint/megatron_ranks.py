"""What the checkpoint tests run on every rank."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from deepspeed.utils import groups as deepspeed_groups
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection

from pikv_megatron.runtime.process_groups import init_process_groups


@contextmanager
def layout(expert_parallel: int = 1, tensor_parallel: int = 1) -> Iterator[ProcessGroupCollection]:
    """Process groups of one layout, within a job that goes through several."""
    yield init_process_groups(expert_parallel, tensor_parallel)
    parallel_state.destroy_model_parallel()
    deepspeed_groups._EXPERT_PARALLEL_GROUP.clear()
    deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP.clear()


@torch.no_grad()
def forward(model: GPTModel, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of a plain forward pass over `[b, sq]`. `[b, sq, padded vocab]`"""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return model(tokens, positions, attention_mask=None, runtime_gather_output=True)


def error_of(function, *args, **kwargs) -> str:
    """The message of the `ValueError` that a call raises."""
    try:
        function(*args, **kwargs)
    except ValueError as error:
        return str(error)
    raise AssertionError("no ValueError")

"""Process groups: DeepSpeed's expert-parallel group, shared by Megatron's MoE layers and the cache.

DeepSpeed and Megatron-Core each build an expert-parallel (EP) group. The product uses one: the
group made by `deepspeed.utils.groups`, put into Megatron's state, so that expert traffic and KV
traffic run on one communicator and DeepSpeed's communication logger counts the latter.
"""

import os
from contextlib import contextmanager
from datetime import timedelta
from typing import Iterator

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import groups as deepspeed_groups
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import distributed_c10d

from pikv_megatron.runtime.cpu_fallback import apply_cpu_fallback
from pikv_megatron.runtime.extension_lock import await_extension_lock

DEFAULT_TIMEOUT_SECONDS = 300.0
# A process that has one of these was started by torchrun or deepspeed, MPI, or Slurm.
LAUNCHER_VARIABLES = {"RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"}
# What a launcher would tell a process that is alone; port 0 takes a free one.
ONE_RANK = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")


def init_process_groups(
    expert_parallel_size: int = 1,
    tensor_parallel_size: int = 1,
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
) -> ProcessGroupCollection:
    """Start torch.distributed through DeepSpeed and build one set of groups for both libraries.

    A process that no launcher started is a single rank.

    Args:
        expert_parallel_size: ranks that share the experts and the KV cache of a sequence.
        tensor_parallel_size: ranks that share the attention heads.
        timeout_seconds: every collective that waits longer ends the job with an error.

    Returns:
        Megatron's `ProcessGroupCollection`; its `ep` is DeepSpeed's expert-parallel group.

    Raises:
        ValueError: a size is not positive, or their product does not divide the world size.
        RuntimeError: a killed process left its lock on DeepSpeed's collectives.
    """
    apply_cpu_fallback()
    if not dist.is_initialized():
        if not LAUNCHER_VARIABLES & os.environ.keys():
            os.environ.update(ONE_RANK)
        has_cuda = torch.cuda.is_available()
        if not has_cuda:
            await_extension_lock()
        deepspeed.init_distributed(
            dist_backend="nccl" if has_cuda else "gloo",
            timeout=timedelta(seconds=timeout_seconds),
            verbose=False,
        )
    world_size = dist.get_world_size()
    _check_sizes(expert_parallel_size, tensor_parallel_size, world_size)
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor_parallel_size,
            expert_model_parallel_size=expert_parallel_size,
            expert_tensor_parallel_size=tensor_parallel_size,
        )
    ep_group = deepspeed_expert_parallel_group(
        parallel_state.get_expert_model_parallel_group(), tensor_parallel_size
    )
    _set_timeouts(timedelta(seconds=timeout_seconds))
    parallel_state._EXPERT_MODEL_PARALLEL_GROUP = ep_group
    if tensor_parallel_size == 1:
        parallel_state._EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP = ep_group
    return ProcessGroupCollection.use_mpu_process_groups()


def deepspeed_expert_parallel_group(
    megatron_ep_group: dist.ProcessGroup, tensor_parallel_size: int = 1
) -> dist.ProcessGroup:
    """DeepSpeed's expert-parallel group over the ranks of Megatron's, made where it is missing.

    Raises:
        ValueError: DeepSpeed's group of that size has other ranks than Megatron's.
    """
    size = dist.get_world_size(megatron_ep_group)
    name = f"ep_size_{size}"
    if name not in deepspeed_groups._get_expert_parallel_group_dict():
        mp_size = tensor_parallel_size if tensor_parallel_size > 1 else None
        deepspeed_groups._create_expert_and_data_parallel(size, mp_size=mp_size)
    group = deepspeed_groups._get_expert_parallel_group(name)
    ours, megatrons = (dist.get_process_group_ranks(g) for g in (group, megatron_ep_group))
    if ours != megatrons:
        raise ValueError(
            f"DeepSpeed's expert-parallel group has ranks {ours}, Megatron's has {megatrons}: "
            "set expert_tensor_parallel_size equal to tensor_model_parallel_size"
        )
    return group


def _set_timeouts(timeout: timedelta) -> None:
    """Give every group of this rank the timeout: DeepSpeed's would have torch's half an hour."""
    for group in distributed_c10d._world.pg_map:
        distributed_c10d._set_pg_timeout(timeout, group)


def destroy_process_groups() -> None:
    """End every group; a gloo job that exits with live groups aborts now and then."""
    parallel_state.destroy_model_parallel()
    deepspeed_groups._EXPERT_PARALLEL_GROUP.clear()
    deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def process_groups(*args, **kwargs) -> Iterator[ProcessGroupCollection]:
    """`init_process_groups` for the length of a `with` block."""
    try:
        yield init_process_groups(*args, **kwargs)
    finally:
        destroy_process_groups()


def _check_sizes(expert_parallel_size: int, tensor_parallel_size: int, world_size: int) -> None:
    for field, size in (
        ("expert_parallel_size", expert_parallel_size),
        ("tensor_parallel_size", tensor_parallel_size),
    ):
        if size < 1:
            raise ValueError(f"{field} must be at least 1, got {size}")
    if world_size % (expert_parallel_size * tensor_parallel_size):
        raise ValueError(
            f"expert_parallel_size {expert_parallel_size} x tensor_parallel_size "
            f"{tensor_parallel_size} must divide the {world_size} ranks that were launched"
        )

"""Ranks that were called differently would wait for each other: they are told so instead."""

import zlib
from collections.abc import Callable
from typing import TypeVar

import deepspeed.comm as dist
import torch

AGREEMENT_OP = "pikv_agreement"

Call = TypeVar("Call")


def same_on_all_ranks(
    read: Callable[[], Call], group: dist.ProcessGroup, device: torch.device
) -> Call:
    """What `generate` was asked, read on every rank of a group and compared by its text.

    Raises:
        ValueError: on every rank, where it differs, or where some rank cannot read it.
    """
    call, error = None, None
    try:
        call = read()
    except ValueError as refused:
        error = refused
    if group.size() > 1:
        _compare(call, error, group, device)
    if error is not None:
        raise error
    return call


def _compare(
    call: object, error: ValueError | None, group: dist.ProcessGroup, device: torch.device
) -> None:
    mine = [zlib.crc32(repr(call).encode()), int(error is not None)]
    own = torch.tensor(mine, dtype=torch.int64, device=device)
    every = own.new_empty(group.size() * len(mine))
    dist.all_gather_into_tensor(every, own, group=group, log_name=AGREEMENT_OP)
    calls, refusals = every.view(-1, len(mine)).t().tolist()
    if any(refusals):
        messages: list[str | None] = [None] * group.size()
        dist.all_gather_object(messages, error and str(error), group=group)
        if error is None:
            rank = refusals.index(1)
            raise ValueError(f"{messages[rank]} (on rank {rank} of those that decode together)")
    elif len(set(calls)) > 1:
        raise ValueError("input_ids: every rank must be given the same prompts and settings")

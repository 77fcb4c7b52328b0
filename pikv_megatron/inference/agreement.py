"""Ranks that were called differently would wait for each other: they are told so instead."""

import zlib

import deepspeed.comm as dist
import torch

AGREEMENT_OP = "pikv_agreement"


def check_same_on_all_ranks(
    call: object, group: dist.ProcessGroup, device: torch.device
) -> None:
    """Compare the text of `call`, what `generate` was asked, over the ranks of a group.

    Raises:
        ValueError: on every rank, where it differs.
    """
    if group.size() == 1:
        return
    mine = torch.tensor([zlib.crc32(repr(call).encode())], dtype=torch.int64, device=device)
    every = mine.new_empty(group.size())
    dist.all_gather_into_tensor(every, mine, group=group, log_name=AGREEMENT_OP)
    if len(set(every.tolist())) > 1:
        raise ValueError("input_ids: every rank must be given the same prompts and settings")

"""The one rule that picks a kernel, Triton's or C++'s, or torch for an operation."""

import importlib.util
import os
from functools import lru_cache
from importlib import import_module
from typing import Callable

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
# What a CPU has C++ kernels for; the rest is a call or two of torch.
CPU_KERNELS = (
    "attend_means", "chosen_experts", "decode_attention", "merge_states", "quantise", "score_pages",
)
# Those without one in Triton; pages are quantised there as they are sealed.
CPU_ONLY = ("chosen_experts", "quantise")


def kernel_op(name: str, tensor: torch.Tensor) -> Callable | None:
    """The kernel of an operation for where a tensor lies.

    Returns:
        `pikv_kernels.NAME.NAME`, in Triton, on CUDA, and on a CPU under TRITON_INTERPRET=1;
        `pikv_kernels.cpu.NAME.NAME`, in C++, on a CPU with a compiler; None: use torch.
    """
    if HAS_TRITON and name not in CPU_ONLY and (tensor.is_cuda or INTERPRETS):
        return _imported("pikv_kernels", name)
    if tensor.is_cpu and name in CPU_KERNELS and _has_cpu_kernels():
        return _imported("pikv_kernels.cpu", name)
    return None


@lru_cache(maxsize=None)
def _imported(package: str, name: str) -> Callable:
    return getattr(import_module(f"{package}.{name}"), name)


@lru_cache(maxsize=1)
def _has_cpu_kernels() -> bool:
    return import_module("pikv_kernels.cpu.compiled").is_available()

"""The one rule that picks Triton or torch for an operation."""

import importlib.util
import os
from importlib import import_module
from typing import Callable

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"


def triton_op(name: str, tensor: torch.Tensor) -> Callable | None:
    """`pikv_kernels.NAME.NAME` on CUDA, and on a CPU under TRITON_INTERPRET=1; None: use torch."""
    if not HAS_TRITON or not (tensor.is_cuda or INTERPRETS):
        return None
    return getattr(import_module(f"pikv_kernels.{name}"), name)

"""Runs the Triton source of the kernels: on a GPU where there is one, else in the interpreter.

Triton decides between its compiler and its interpreter by an environment variable, for every kernel
of the process and of its children. Here only the calls of the wrapped ops are interpreted, so that
the other tests, and the ranks that they start, are not.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime.interpreter import (  # noqa: E402
    InterpretedFunction,
    InterpreterBuilder,
    _patch_lang,
)
from triton.runtime.jit import JITFunction  # noqa: E402

# The oracle and the cases of the torch versions serve here, too.
sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))


@contextmanager
def interpreted() -> Iterator[None]:
    """Every jitted function that is launched or called inside is interpreted."""

    def run(function, *args, **kwargs):
        return InterpretedFunction(function.fn).run(*args, **kwargs)

    def call(function, *args, **kwargs):
        # As InterpretedFunction does, but undone: else nothing compiles in this process any more.
        patched_language = _patch_lang(function.fn)
        try:
            return InterpretedFunction(function.fn).rewrite()(*args, **kwargs)
        finally:
            patched_language.restore()

    create_dot = InterpreterBuilder.create_dot

    def dot(builder, a, b, *args):
        # Triton 3.9 multiplies the bit patterns of bfloat16 numbers.
        a, b = (builder.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x
                for x in (a, b))
        return create_dot(builder, a, b, *args)

    # Poisoned numbers are multiplied on purpose, before they are masked.
    quiet = np.errstate(invalid="ignore", over="ignore")
    with pytest.MonkeyPatch.context() as patch, triton.knobs.runtime.scope(), quiet:
        patch.setattr(JITFunction, "run", run)
        patch.setattr(JITFunction, "__call__", call)
        patch.setattr(InterpreterBuilder, "create_dot", dot)
        triton.knobs.runtime.interpret = True
        yield


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the inputs of kernels lie."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def triton_kernel(device) -> Callable[[str], Callable]:
    """`triton_kernel("op")` is the Triton version of an op: `pikv_kernels.op.op`."""

    def load(name: str) -> Callable:
        op = getattr(import_module(f"pikv_kernels.{name}"), name)
        if device.type == "cuda":
            return op

        @wraps(op)
        def interpreted_op(*args, **kwargs):
            with interpreted():
                return op(*args, **kwargs)

        return interpreted_op

    return load


@pytest.fixture(scope="module", autouse=True)
def poisoned_empty() -> Iterator[None]:
    """`torch.empty` gives NaN (the largest number for integers), never luckily zeros."""
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before, warn_only=warns)

"""The kernels of attention compile for GPUs, on machines without one."""

import pytest
import torch
from paged_cases import CaseSpec, ListSpec, build

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, compile as compile_for  # noqa: E402
from triton.runtime.jit import mangle_type  # noqa: E402

from pikv_kernels import decode_attention, merge_states  # noqa: E402


CASES = [
    ("float32", torch.bfloat16, 80), ("float8", torch.float16, 80), ("int8", torch.bfloat16, 90),
    ("int3", torch.bfloat16, 80), ("int4/int2", torch.bfloat16, 90),
]


def source(kernel, args: tuple, constants: dict) -> ASTSource:
    """What a launch with these arguments would compile."""
    bound = dict(zip(kernel.arg_names, args)) | constants
    signature, values = {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = bound[name]
        if value is None or name in constants:
            signature[name], values[index,] = "constexpr", value
        elif isinstance(value, tuple):
            signature[name] = tuple(mangle_type(x) for x in value)
        else:
            signature[name] = mangle_type(value)
    return ASTSource(kernel, signature, values)


class Recorder:
    """Stands for a kernel: keeps the arguments of its launches."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *args, **constants: self.launches.append((args, constants))


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("payload, dtype, capability", CASES)
def test_attention_compiles(payload, dtype, capability, is_shared, monkeypatch):
    is_fancy = payload != "float32"
    lists = (ListSpec(payload, 16, 20, 2, 2, *[is_fancy] * 3, is_turned=is_fancy),)
    shape = (1, 128, 576, 512) if is_shared else (2, 4, 80, 128)
    case = build(CaseSpec(2, 1, *shape, dtype, lists, is_shared=is_shared))
    recorders = Recorder(), Recorder()
    kernels = decode_attention.attend_split, merge_states._merge
    monkeypatch.setattr(decode_attention, "attend_split", recorders[0])
    monkeypatch.setattr(merge_states, "_merge", recorders[1])
    decode_attention.decode_attention(case.query, case.lists, 1.0, payload != "bfloat16")
    target = GPUTarget("cuda", capability, 32)
    for kernel, recorder in zip(kernels, recorders):
        (args, constants), = recorder.launches
        assert compile_for(source(kernel, args, constants), target=target).asm["cubin"]

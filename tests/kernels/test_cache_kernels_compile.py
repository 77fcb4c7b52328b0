"""The kernels that write and score pages compile for GPUs, on machines without one."""

import pytest
import torch
from guarded_pools import PageSpec, empty_pages, empty_sketch, seal_case
from mean_cases import mean_case
from sketch_cases import ScoreSpec, build

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, compile as compile_for  # noqa: E402
from triton.runtime.jit import JITFunction, mangle_type  # noqa: E402

from pikv_kernels.append_kv import append_kv  # noqa: E402
from pikv_kernels.attend_means import attend_means  # noqa: E402
from pikv_kernels.project import project  # noqa: E402
from pikv_kernels.route_topk import route_topk  # noqa: E402
from pikv_kernels.score_pages import score_pages  # noqa: E402
from pikv_kernels.seal_page import seal_page  # noqa: E402


def signature_of(value, path: tuple[int, ...], constants: dict):
    """Types of an argument, tuples of tuples too; None is a constant."""
    if value is None:
        constants[path] = None
        return "constexpr"
    if isinstance(value, tuple):
        return tuple(signature_of(v, (*path, i), constants) for i, v in enumerate(value))
    return mangle_type(value)


@pytest.fixture
def compiled(monkeypatch) -> list[str]:
    """Names of the kernels that were launched, each compiled instead."""
    names = []

    def run(kernel, *args, grid, warmup, **named):
        constants, signature = {}, {}
        bound = dict(zip(kernel.arg_names, args)) | named
        for index, parameter in enumerate(kernel.params):
            value = bound[parameter.name]
            if parameter.is_constexpr:
                constants[(index,)], signature[parameter.name] = value, "constexpr"
            else:
                signature[parameter.name] = signature_of(value, (index,), constants)
        source = ASTSource(kernel, signature, constants)
        assert compile_for(source, target=GPUTarget("cuda", 80, 32)).asm["cubin"]
        names.append(kernel.__name__)

    monkeypatch.setattr(JITFunction, "run", run)
    return names


def test_small_kernels(compiled):
    tokens, index = torch.zeros(2, 3, 64, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.int64)
    append_kv(tokens, tokens, torch.zeros(2, 4, 16, 64), torch.zeros(2, 4, 16, 64), index, index)
    project(tokens, torch.zeros(3, 64, 32, dtype=torch.bfloat16), None)
    route_topk(torch.zeros(3, 64), torch.zeros(8), 2, torch.zeros(8, 64))
    route_topk(torch.zeros(3, 1024), torch.zeros(1024), 32)
    assert compiled == ["_append", "_project", "_route", "_route"]


@pytest.mark.parametrize(
    "payload, sketch", [("float8", "box"), ("int2", "low rank 4"), ("int3/int4", "box")]
)
def test_sealing(compiled, payload, sketch):
    spec = PageSpec(payload, 1, 2, 16, 64, 64, 2, 2, sketch, torch.bfloat16, 0)
    case = seal_case(spec, 4)
    there, _ = empty_sketch(sketch, 1, 4, 16, 64, torch.bfloat16)
    seal_page(case.keys, case.values, empty_pages(spec, 4)[0], case.page, there)
    assert compiled == ["_seal"]


@pytest.mark.parametrize("sketch, dtype", [("box", torch.bfloat16), ("low rank 2", torch.float32)])
def test_scoring(compiled, sketch, dtype):
    spec = ScoreSpec(sketch, 1, 40, 2, 4, 64, 16, 8, "mass", True, dtype, False, 0)
    score_pages(*build(spec).arguments)
    assert compiled == ["_logits", "_normalisers", "_scores", "_select"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tail(compiled, dtype):
    attend_means(*mean_case(2, 40, 2, 4, 128, dtype, False, 0.9, 0))
    assert compiled == ["_attend", "_merge"]

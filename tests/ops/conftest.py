"""Lets a module's tests go both ways that an operation can go on a CPU, on several threads."""

import pytest
import torch

from pikv_megatron.ops import backend


@pytest.fixture(scope="module", params=["C++ kernel", "torch"])
def path(request):
    """Of the operations that have a C++ kernel."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(backend, "CPU_KERNELS", ())
        else:
            assert backend._has_cpu_kernels(), "the kernels were not built"
        yield request.param


@pytest.fixture(scope="module")
def threads(request):
    """As many as the test's parameter says."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)

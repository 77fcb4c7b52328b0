"""Lets a module's tests go both ways that an operation can go on a CPU."""

import pytest

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

"""Every test runs on the CPU unless it asks for a GPU itself."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# A red run must be red again: automatic runs draw the same cases each time.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Before torch is imported. Workers stand side by side, and one of them may run four ranks: threads
# that wait for a core that another process holds made one fixture 23 s or over 300 s long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "parity"))
sys.path.insert(0, str(Path(__file__).parent / "checkpoint"))


@pytest.fixture(scope="module", autouse=True)
def restored_environment():
    """Megatron-Core writes its choice of attention into the environment, which ranks inherit."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def one_rank():
    """Process groups of a single rank in this process."""
    from ranks import free_port

    from pikv_megatron import process_groups

    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(free_port()),
    )
    with process_groups() as groups:
        yield groups

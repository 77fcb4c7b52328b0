"""Every test runs on the CPU unless it asks for a GPU itself."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "parity"))
sys.path.insert(0, str(Path(__file__).parent / "checkpoint"))


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

"""Runs programs without a GPU: under the real deepspeed launcher on two ranks, or alone."""

import os
import subprocess
import sys
from pathlib import Path

from ranks import free_port


def launch(program: Path, *arguments: str, timeout: float) -> subprocess.CompletedProcess:
    """`deepspeed --num_accelerators 2 program ...`, away from the sources."""
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [
        sys.executable, str(launcher), "--num_accelerators", "2", "--log_level", "warning",
        "--master_port", str(free_port()), str(program), *arguments,
    ]
    return _run(command, timeout)


def run_alone(
    program: Path, *arguments: str, timeout: float = 240.0
) -> subprocess.CompletedProcess:
    """`python program ...`, away from the sources, on a wide terminal."""
    return _run([sys.executable, str(program), *arguments], timeout)


def _run(command: list[str], timeout: float) -> subprocess.CompletedProcess:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "160"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=environment, cwd="/"
    )

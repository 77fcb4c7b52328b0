"""What the programs of `launch/` have in common once they run."""

import os
import shlex
import sys
import time

import deepspeed
import torch

IS_FIRST_RANK = os.environ.get("RANK", "0") == "0"
BAD_INPUT = 2
# The launcher ends all ranks with the first that exits. So the others leave it to the first one of
# their machine to speak, and do so themselves only where it met no error.
PATIENCE_SECONDS = 20


def refuse(error: ValueError) -> int:
    """Say on one line what was wrong with the input; the exit code."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(PATIENCE_SECONDS)
    print("error:", " ".join(str(error).split()), file=sys.stderr, flush=True)
    return BAD_INPUT


def use_device() -> None:
    """This rank's GPU, or its share of the cores."""
    deepspeed.utils.logger.setLevel("WARNING")  # its chatter would mix with the text
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    elif "OMP_NUM_THREADS" not in os.environ:
        local_ranks = int(os.environ.get("LOCAL_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))


def command() -> str:
    """How to do the same again."""
    num_ranks = os.environ["WORLD_SIZE"]
    program = ["python"] if num_ranks == "1" else ["deepspeed", "--num_accelerators", num_ranks]
    own = [argument for argument in sys.argv if not argument.startswith("--local_rank")]
    return shlex.join([*program, *own])

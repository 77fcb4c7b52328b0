"""A rank that raises, dies or falls silent ends the whole job, with a message and in time."""

import time
from pathlib import Path

import pytest
from launcher import launch

TIMEOUT_SECONDS = 8
START_SECONDS = 90  # imports and one build on a busy machine

PROGRAM = f"""
import os, sys, time
sys.path[:0] = {[str(Path(__file__).parents[1] / "parity")]!r}
import deepspeed, torch
from parity_models import build
from pikv_megatron import PiKVConfig, PiKVForCausalLM, process_groups

def fail(step):
    if os.environ["RANK"] == "1" and step.step == 3:
        print("rank 1 fails at", time.time(), file=sys.stderr, flush=True)
        {{failure}}

with process_groups(expert_parallel_size=2, timeout_seconds={TIMEOUT_SECONDS}) as groups:
    pikv = PiKVConfig(shard_after=0, page_size=2, window=2)
    engine = deepspeed.init_inference(
        PiKVForCausalLM(build(groups, pikv), pikv), dtype=torch.float32
    )
    engine.generate([[1, 2, 3], [4]], max_new_tokens=20, callback=fail)
print("generated to the end")
"""
FAILURES = {
    "raises": ("raise OSError('disk is gone')", "disk is gone"),
    "dies": ("os._exit(7)", "exits with return code = 7"),
    "falls silent": ("time.sleep(600)", "imed out"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_the_job_ends_with_a_message(tmp_path, failure):
    statement, message = FAILURES[failure]
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.replace("{failure}", statement))
    run = launch(program, timeout=START_SECONDS + 3 * TIMEOUT_SECONDS)
    ended = time.time()
    assert run.returncode != 0 and "generated to the end" not in run.stdout
    assert message in run.stderr + run.stdout
    failed_at = float(run.stderr.split("rank 1 fails at ")[1].split()[0])
    assert ended - failed_at < 3 * TIMEOUT_SECONDS

"""The traffic meter against known sizes, on two real ranks and on one."""

import deepspeed.comm as dist
import pytest
import torch
from ranks import run_ranks

from pikv_megatron.inference.traffic import KV_OPS, TrafficMeter
from pikv_megatron.runtime.process_groups import process_groups


def send(num_floats: int, op: str) -> None:
    """One all-to-all of `num_floats` from this rank, its own share included."""
    tensor = torch.zeros(num_floats)
    dist.all_to_all_single(torch.empty_like(tensor), tensor, log_name=op)


def measure() -> list[dict[str, int]]:
    with process_groups(expert_parallel_size=2):
        meter = TrafficMeter()
        send(64, "pikv_query")  # before the start
        meter.start()
        for _ in range(3):
            send(64, "pikv_query")
        send(128, "pikv_query")
        send(2, "pikv_combine")
        dist.all_reduce(torch.zeros(1000))  # none of the cache's
        running = meter.bytes_by_op()
        torch.distributed.all_gather_object([None, None], {"any": "object"})
        meter.stop()
        send(64, "pikv_query")  # after the end
        stopped = meter.bytes_by_op()
        meter.start()
        send(2, "pikv_flush")
        meter.stop()
        return [running, stopped, meter.bytes_by_op()]


def test_counts_the_named_collectives_between_start_and_stop():
    for running, stopped, again in run_ranks(measure, 2):
        expected = {"pikv_query": 4 * (3 * 64 + 128), "pikv_combine": 8}
        assert running == stopped == dict.fromkeys(KV_OPS, 0) | expected
        assert again == dict.fromkeys(KV_OPS, 0) | {"pikv_flush": 8}


def test_puts_the_settings_of_the_logger_back():
    logger = dist.comm.comms_logger
    before = (logger.enabled, logger.prof_all, list(logger.prof_ops))
    meter = TrafficMeter()
    meter.start()
    assert logger.enabled and not logger.prof_all and logger.prof_ops == list(KV_OPS)
    meter.stop()
    meter.stop()
    assert (logger.enabled, logger.prof_all, list(logger.prof_ops)) == before


def test_without_start_there_is_nothing():
    meter = TrafficMeter(("pikv_query",))
    meter.stop()
    assert meter.bytes_by_op() == {"pikv_query": 0}


def lose_a_rank(rank_that_leaves: int) -> None:
    with process_groups(expert_parallel_size=2, timeout_seconds=20):
        if dist.get_rank() == rank_that_leaves:
            raise RuntimeError("left on purpose")
        meter = TrafficMeter()
        meter.start()
        send(2, "pikv_query")


def test_a_lost_rank_ends_the_metered_job():
    with pytest.raises(RuntimeError, match="rank|left on purpose"):
        run_ranks(lose_a_rank, 2, 1, timeout=60)

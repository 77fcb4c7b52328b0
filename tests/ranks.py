"""Runs a function in several real gloo processes and hands back what each returned."""

import multiprocessing as mp
import os
import queue
import socket
import time
import traceback
from typing import Any, Callable

# Ranks are forked from a process that imported these once, which takes longer than most tests.
PRELOADED = ["transformers", "pikv_megatron.checkpoint.huggingface"]


def run_ranks(
    fn: Callable, world_size: int, *args: Any, timeout: float = 120.0, start: str = "forkserver"
) -> list:
    """Run `fn(*args)` on `world_size` ranks and return their results by rank.

    `fn` is a top-level function; it starts and ends its own process groups. The first rank that
    fails ends the others, and its traceback becomes the error here. `start` is "spawn" where the
    imports themselves are tested.

    Raises:
        RuntimeError: a rank raised or died.
        TimeoutError: a rank did not finish within `timeout` seconds.
    """
    context = mp.get_context(start)
    context.set_forkserver_preload(PRELOADED)
    results = context.Queue()
    port = free_port()
    ranks = [
        context.Process(
            target=_rank_main, args=(fn, args, dict(os.environ), rank, world_size, port, results)
        )
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    try:
        return _collect(ranks, results, time.monotonic() + timeout)
    finally:
        for process in ranks:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()


def _collect(ranks: list, results: Any, deadline: float) -> list:
    returned: dict[int, Any] = {}
    while len(returned) < len(ranks):
        if time.monotonic() > deadline:
            missing = sorted(set(range(len(ranks))) - set(returned))
            _kill(ranks)
            raise TimeoutError(f"ranks {missing} did not finish in time")
        try:
            rank, value, error = results.get(timeout=0.2)
        except queue.Empty:
            dead = [r for r, p in enumerate(ranks) if not p.is_alive() and r not in returned]
            if dead and results.empty():
                _kill(ranks)
                raise RuntimeError(f"rank {dead[0]} died, exit code {ranks[dead[0]].exitcode}")
            continue
        if error is not None:
            _kill(ranks)
            raise RuntimeError(f"rank {rank} failed:\n{error}")
        returned[rank] = value
    return [returned[rank] for rank in range(len(ranks))]


def _kill(ranks: list) -> None:
    for process in ranks:
        process.kill()


def _rank_main(fn, args, environment, rank, world_size, port, results) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), DS_ACCELERATOR="cpu",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )
    import torch

    torch.set_num_threads(1)
    try:
        results.put((rank, fn(*args), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        results.close()
        results.join_thread()
        raise


_held: list[socket.socket] = []


def free_port() -> int:
    """A port that is this process's until it ends: two tests at once never get the same one.

    A socket that is bound and does not listen keeps others from being given its port, and lets a
    server that reuses addresses, as torch's store does, listen there.
    """
    sock = socket.socket()
    sock.bind(("", 0))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    _held.append(sock)
    return sock.getsockname()[1]

"""Times contestants in short turns, so that a noisy machine disturbs all of them alike."""

import sys
import time
from contextlib import contextmanager
from typing import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist

from pikv_megatron.benchmarks.model.decoding import Contestant

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
# Largest difference of logits, as a share of the largest logit. In 16 bits two experts can be so
# close that contestants choose differently now and then: the median over the steps is judged.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# A lossy cache may differ by anything that is a number.
ANY_NUMBER = sys.float_info.max


class Race:
    """Runs every contestant over the same tokens.

    A turn is several steps, as a server decodes: were it one step only, every step would find the
    processor's caches full of the others' weights and code.

    Args:
        contestants: by name; the first one's logits are the reference.
        clock: seconds, `time.perf_counter` or `time.process_time`.
        turn: steps that a contestant makes before the next one's turn.

    Attributes:
        differences: by name, of every step: how far the logits are from the reference's.
    """

    def __init__(self, contestants: Mapping[str, Contestant], clock: Clock, turn: int):
        self.contestants = contestants
        self._clock = clock
        self._turn = turn
        self.differences: dict[str, list[float]] = {name: [] for name in contestants}

    @torch.no_grad()
    def run(self, tokens: torch.Tensor, on_step: Callable[[], None]) -> dict[str, list[float]]:
        """Seconds of every step by contestant.

        Args:
            tokens: [steps, batch_size].
            on_step: called for every step.
        """
        names = list(self.contestants)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for index, turn_tokens in enumerate(tokens.split(self._turn)):
            logits: dict[str, list[torch.Tensor]] = {name: [] for name in names}
            first = index % len(names)
            for name in names[first:] + names[:first]:
                for step_tokens in turn_tokens:
                    start = _read(self._clock, is_start=True)
                    logits[name].append(self.contestants[name].step(step_tokens))
                    seconds[name].append(_read(self._clock) - start)
            for step_logits in zip(*logits.values()):
                self._compare(dict(zip(names, step_logits)))
                on_step()
        return seconds

    def check(self) -> dict[str, float]:
        """How far each contestant's logits are from the reference's, on any rank.

        Raises:
            ValueError: a lossless one is too far away, so that times would compare different
                things, or a lossy one gives no numbers.
        """
        weight = next(next(iter(self.contestants.values())).model.parameters())
        dtype = weight.dtype
        steps = torch.tensor(list(self.differences.values()), device=weight.device)
        found = steps.amax(1) if dtype == torch.float32 else steps.median(1).values
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        by_name = dict(zip(self.differences, found.tolist()))
        for name, difference in by_name.items():
            limit = TOLERANCES[dtype] if self.contestants[name].is_lossless else ANY_NUMBER
            if difference > limit:
                raise ValueError(
                    f"no figures: logits of {name!r} differ from those of {next(iter(by_name))!r} "
                    f"by {difference:.1e} of the largest, more than {limit:.0e}"
                )
        return by_name

    def _compare(self, logits: Mapping[str, torch.Tensor]) -> None:
        reference = next(iter(logits[name] for name in self.contestants))
        largest = reference.abs().amax().item() if reference.numel() else 1.0
        for name, other in logits.items():
            distance = (other - reference).abs()
            difference = distance.amax().item() / largest if distance.numel() else 0.0
            # A comparison with NaN would let it pass.
            self.differences[name].append(difference if difference >= 0 else float("inf"))


class PartClock:
    """Sums the time that a model spends in a part of its steps."""

    def __init__(self, clock: Clock):
        self.seconds = 0.0
        self._clock = clock
        self._start = 0.0

    def start(self) -> None:
        self._start = _read(self._clock)

    def stop(self) -> None:
        self.seconds += _read(self._clock) - self._start


@contextmanager
def attention_clock(contestant: Contestant, clock: Clock) -> Iterator[PartClock]:
    """Time a contestant's attention for the length of a `with` block."""
    attention = PartClock(clock)
    with around_attention(contestant, attention.start, attention.stop):
        yield attention


@contextmanager
def around_attention(
    contestant: Contestant, before: Callable[[], None], after: Callable[[], None]
) -> Iterator[None]:
    """Call two functions before and after each layer's attention for the length of a `with` block:
    see `Contestant.attention_bounds`."""
    hooks = []
    for first, last in contestant.attention_bounds():
        hooks.append(first.register_forward_hook(lambda *args: before()))
        hooks.append(last.register_forward_pre_hook(lambda *args: after()))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def of_ranks(clock: str, seconds: Sequence[float]) -> list[float]:
    """Ranks leave a step together, by the wall; their processors' times differ: the mean."""
    if clock == "wall":
        return list(seconds)
    times = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(times)
    return (times / dist.get_world_size()).tolist()


def _read(clock: Clock, is_start: bool = False) -> float:
    """Seconds, once the device is idle; at the start of a step, once all ranks have come here."""
    if is_start and dist.get_world_size() > 1:
        dist.barrier()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock()

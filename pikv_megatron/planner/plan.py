"""A target's plan: bytes, traffic and time of its fullest rank, and whether it can be."""

from dataclasses import dataclass
from functools import cached_property

from pikv_megatron.planner.closed_form import ClosedForm
from pikv_megatron.planner.hardware import Hardware
from pikv_megatron.planner.planned_cache import PlannedCache
from pikv_megatron.planner.step_time import StepTime, dense_step_time, step_time
from pikv_megatron.planner.target import Target
from pikv_megatron.planner.traffic import Traffic, decode_traffic
from pikv_megatron.planner.weights import Weights

GRAIN = 64  # contexts are found to within so many tokens


@dataclass(frozen=True)
class Plan:
    """What a target takes, on ranks of some size.

    Attributes:
        target: what is planned for.
        memory: bytes of a rank.
        workspace: bytes of it that activations, communication and the runtime take.
        hardware: what a rank runs on.
        weights: of the model.
    """

    target: Target
    memory: int
    workspace: int
    hardware: Hardware
    weights: Weights

    @cached_property
    def cache(self) -> PlannedCache:
        return PlannedCache(self.target)

    @property
    def weight_bytes(self) -> int:
        """Of a rank."""
        return self.weights.of_rank(self.target.num_ranks)

    @cached_property
    def cache_bytes(self) -> int:
        """Of the fullest rank, metadata included."""
        return sum(self.cache.bytes_by_part().values())

    @property
    def dense_bytes(self) -> int:
        """Of a cache that holds each sequence whole on its home rank, as computed."""
        target = self.target
        return target.num_own * sum(
            spec.kv.token_bytes * min(target.context, spec.sliding_window or target.context)
            for spec in target.specs
        )

    @property
    def needed_bytes(self) -> int:
        """Of the fullest rank, all in all."""
        return self.weight_bytes + self.cache_bytes + self.workspace

    @property
    def is_possible(self) -> bool:
        limit = self.target.pikv.memory_limit
        fits = limit is None or self.cache_bytes <= limit
        return fits and self.needed_bytes <= self.memory

    @cached_property
    def traffic(self) -> Traffic:
        return decode_traffic(self.target, self.cache)

    @cached_property
    def step_time(self) -> StepTime:
        return step_time(self.target, self.cache, self.weights, self.traffic, self.hardware)

    @cached_property
    def dense_step_time(self) -> StepTime:
        return dense_step_time(self.target, self.weights, self.hardware)

    @property
    def closed_form(self) -> ClosedForm | None:
        return ClosedForm.of(self.target, self.cache, self.hardware)

    def of(self, **changes) -> "Plan":
        """The plan of another target; other ranks keep the hardware."""
        return Plan(
            self.target.but(**changes), self.memory, self.workspace, self.hardware, self.weights
        )

    def largest_context(self) -> int:
        """Tokens of every sequence that fit, 0 where none do; at most the model's own."""
        return _last(
            self.target.max_sequence_length, lambda length: self.of(context=length).is_possible
        )

    def largest_batch(self) -> int:
        """Sequences of this context that fit, in whole rounds over the ranks, 0 where none do."""
        ranks = self.target.num_ranks
        if not self.of(batch=1).is_possible:
            return 0
        most = 1
        while self.of(batch=2 * most * ranks).is_possible and most < 1 << 20:
            most *= 2
        rounds = _last(2 * most, lambda n: self.of(batch=n * ranks).is_possible, grain=1)
        return max(1, rounds * ranks)

    def pays_from(self) -> int | None:
        """Shortest context from which a step is faster than over dense caches, each whole on its
        home rank; None: it never is at this batch."""
        longest = self.target.max_sequence_length

        def is_slower(length: int) -> bool:
            plan = self.of(context=length)
            return plan.step_time.total >= plan.dense_step_time.total

        if is_slower(longest):
            return None
        return _last(longest, is_slower) + 1


def _last(most: int, holds, grain: int = GRAIN) -> int:
    """The largest number up to `most` for which something holds that stops holding once, to within
    a grain; 0 where it holds for none."""
    if holds(most):
        return most
    low, high = 0, most
    while high - low > grain:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low

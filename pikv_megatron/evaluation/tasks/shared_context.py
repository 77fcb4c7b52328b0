"""Several questions on one context that was compressed before any was known (SCBench's shape,
arXiv 2412.10319)."""

from dataclasses import replace

from pikv_megatron.evaluation.tasks.needle_queries import NeedleQueries


class SharedContext(NeedleQueries):
    """Numbers of several keys; the prompt ends before the first question."""

    name = "shared_context"

    def problem(self, rng, length):
        return replace(super().problem(rng, length), asks_later=True)

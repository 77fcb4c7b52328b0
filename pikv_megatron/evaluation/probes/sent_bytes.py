"""Counts what ranks hand to the cache's collectives in decode steps."""

from pikv_megatron.inference.traffic import TrafficMeter


class SentBytes:
    """Counts one flush interval of two, by DeepSpeed's communication logger, which takes time: the
    steps that it counts are not timed.

    Args:
        flush_interval: steps.

    Attributes:
        is_on: the step that `before` told of is counted.
        num_bytes: of this rank, in all steps that were counted.
        num_steps: that were.
    """

    def __init__(self, flush_interval: int):
        self._interval, self._meter = flush_interval, TrafficMeter()
        self.is_on = False
        self.num_bytes = self.num_steps = 0

    def before(self, step: int) -> None:
        """Decode step `step` of a batch comes, from 1."""
        self.end()
        self.is_on = (step - 1) // self._interval % 2 == 0
        if self.is_on:
            self._meter.start()

    def end(self) -> None:
        """The step has been made."""
        if self.is_on:
            self._meter.stop()
            self.num_bytes += sum(self._meter.bytes_by_op().values())
            self.num_steps += 1
        self.is_on = False

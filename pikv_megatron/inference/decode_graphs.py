"""Steps that only decode, recorded once for each shape and replayed: a CUDA graph has no host cost.

A step of a shape that was not met before runs as it is, which also compiles its kernels; the next
one is recorded. Steps that feed a prompt or flush a window always run as they are.
"""

from collections.abc import Callable

import torch

from pikv_megatron.cache.step.step_plan import StepPlan
from pikv_megatron.transformer.context import PiKVInferenceContext

# Tokens [1, T] and a step's plan -> logits [1, T, vocab].
Feed = Callable[[torch.Tensor, StepPlan], torch.Tensor]
# A step -> what repeats it, in the same memory.
Record = Callable[[Callable[[], torch.Tensor]], Callable[[], torch.Tensor]]

FEWEST_PAGES = 16


class DecodeGraphs:
    """Feeds steps without a prompt.

    Args:
        context: the cache.
        feed: runs a step.
        record: `record_on_cuda()`, say.

    Attributes:
        num_replays: steps that were replayed.
    """

    def __init__(self, context: PiKVInferenceContext, feed: Feed, record: Record):
        self._context, self._feed, self._record = context, feed, record
        self._steps: dict[tuple, RecordedStep | None] = {}
        self._num_pages = context.num_pages
        self.num_replays = 0

    def feed(self, ids: torch.Tensor, plan: StepPlan) -> torch.Tensor:
        """The logits [1, T, vocab] of tokens [1, T]; overwritten by the next step."""
        if not plan.only_decodes:
            return self._feed(ids, plan)
        if self._num_pages != self._context.num_pages:
            # The pools lie elsewhere now.
            self._steps.clear()
            self._num_pages = self._context.num_pages
        columns = self._columns(plan.decode.most_pages)
        key = plan.decode_shape, columns
        if key not in self._steps:
            self._steps[key] = None
            return self._feed(ids, plan)
        if self._steps[key] is None:
            plan.decode.fix(columns)
            self._steps[key] = RecordedStep(self._context, self._feed, self._record, ids, plan)
        self.num_replays += 1
        return self._steps[key].repeat(ids, plan)

    def _columns(self, most_pages: int) -> int:
        """Pages that a recorded step reads up to: a power of two, or as many as there can be."""
        bucket = max(FEWEST_PAGES, 1 << max(0, most_pages - 1).bit_length())
        return min(bucket, self._context.most_pages)


class RecordedStep:
    """One step, whose tokens and plan every other one is written over.

    Args:
        ids: [1, T].
        plan: of the step that is recorded.
    """

    def __init__(
        self, context: PiKVInferenceContext, feed: Feed, record: Record, ids: torch.Tensor,
        plan: StepPlan,
    ):
        self._context, self._ids, self._plan = context, ids, plan
        self._replay = record(lambda: feed(ids, plan))

    def repeat(self, ids: torch.Tensor, plan: StepPlan) -> torch.Tensor:
        """Run it for another step's tokens and plan."""
        self._ids.copy_(ids)
        self._plan.take_numbers(plan)
        with self._context.planned(self._plan):
            return self._replay()


def record_on_cuda() -> Record:
    """Records CUDA graphs, which share their memory: one is replayed at a time."""
    pool = torch.cuda.graph_pool_handle()

    def record(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            logits = step()

        def replay() -> torch.Tensor:
            graph.replay()
            return logits

        return replay

    return record


def check_graphs(dtype: torch.dtype) -> None:
    """Refuse models whose steps wait for the host.

    Raises:
        ValueError: torch's grouped products do so but in bfloat16.
    """
    if dtype != torch.bfloat16:
        raise ValueError(
            f"cuda_graphs: experts of type {dtype} are computed with counts that the host reads; "
            "load the model in bfloat16, or set cuda_graphs to false"
        )

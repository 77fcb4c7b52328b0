"""What would make an impossible target possible, one change at a time."""

from collections.abc import Iterator

from pikv_megatron.config import PiKVConfig
from pikv_megatron.planner.plan import Plan
from pikv_megatron.planner.target import ranks_that_divide
from pikv_megatron.presets import preset_files


def remedies(plan: Plan) -> list[str]:
    """Sentences, each a change with which the target fits; empty where none of them is enough."""
    return [remedy for kind in (_ranks, _preset, _context, _batch) for remedy in kind(plan)]


def _ranks(plan: Plan) -> Iterator[str]:
    for num_ranks in ranks_that_divide(plan.target.architecture.num_experts):
        if num_ranks > plan.target.num_ranks and _fits(plan, num_ranks=num_ranks):
            yield f"--expert-parallel {num_ranks}"
            return


def _preset(plan: Plan) -> Iterator[str]:
    fitting = [name for name in preset_files() if _fits(plan, pikv=PiKVConfig(preset=name))]
    if fitting:
        yield f"--pikv {' or '.join(fitting)}"


def _context(plan: Plan) -> Iterator[str]:
    longest = plan.largest_context()
    if longest:
        yield f"--context {longest}"


def _batch(plan: Plan) -> Iterator[str]:
    most = plan.largest_batch()
    if most:
        yield f"--batch {most}"


def _fits(plan: Plan, **changes) -> bool:
    """False also for what cannot be built, of other ranks or of a preset for other models."""
    try:
        return plan.of(**changes).is_possible
    except ValueError:
        return False

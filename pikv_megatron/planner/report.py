"""A plan as a table, or as JSON."""

from dataclasses import asdict
from typing import Any

from rich.filesize import decimal
from rich.table import Table

from pikv_megatron.planner.plan import Plan
from pikv_megatron.planner.remedies import remedies


LOWER = "pages_in_host_memory", "pages_in_files"


def report_json(plan: Plan) -> dict[str, Any]:
    """Every figure, in bytes, seconds and tokens."""
    target, form = plan.target, plan.closed_form
    return {
        "possible": plan.is_possible,
        "remedies": [] if plan.is_possible else remedies(plan),
        "expert_parallel_size": target.num_ranks,
        "batch": target.batch,
        "context": target.context,
        "dtype": str(target.dtype).removeprefix("torch."),
        "bytes_per_rank": {
            "memory": plan.memory, "needed": plan.needed_bytes, "weights": plan.weight_bytes,
            "workspace": plan.workspace, "cache": plan.cache_bytes,
            "cache_by_part": plan.cache.bytes_by_part(), "dense_cache": plan.dense_bytes,
            **dict(zip(LOWER, plan.cache.lower_bytes())),
        },
        "largest_context": plan.largest_context(),
        "closed_form": None if form is None else asdict(form),
        "traffic_per_step": plan.traffic._asdict(),
        "step_seconds": plan.step_time._asdict() | {"total": plan.step_time.total},
        "dense_step_seconds": plan.dense_step_time.total,
        "sharding_pays_from": plan.pays_from(),
        "hardware": asdict(plan.hardware),
    }


def report_table(plan: Plan) -> Table:
    """The same, to be read."""
    target = plan.target
    table = Table("", "", show_header=False, title=(
        f"{target.batch} sequences of {target.context:,} tokens on {target.num_ranks} ranks"
    ))
    _add_memory(table, plan)
    _add_closed_form(table, plan)
    table.add_section()
    for op, sent in plan.traffic._asdict().items():
        table.add_row(f"sent a decode step and rank: {op}", decimal(round(sent)))
    table.add_section()
    for name, seconds in plan.step_time._asdict().items():
        table.add_row(f"step: {name}", _time(seconds))
    table.add_row("step, predicted", _time(plan.step_time.total))
    table.add_row("step, each cache whole on its home rank", _time(plan.dense_step_time.total))
    first = plan.pays_from()
    table.add_row(
        "sharding makes a step faster from", "never" if first is None else f"{first:,} tokens"
    )
    return table


def verdict(plan: Plan) -> str:
    """One line: whether it fits, and if not, what would."""
    needed, memory = decimal(plan.needed_bytes), decimal(plan.memory)
    if plan.is_possible:
        return f"It fits: {needed} of {memory} a rank."
    limit = plan.target.pikv.memory_limit
    if limit is not None and plan.cache_bytes > limit:
        found = f"the cache takes {decimal(plan.cache_bytes)} of memory_limit {decimal(limit)}"
    else:
        found = f"a rank needs {needed} and has {memory}"
    ways = remedies(plan)
    if not ways:
        return f"It does not fit: {found}, and no single change of ranks, preset, context or " \
            "batch is enough."
    return f"It does not fit: {found}. Any of these would do: {'; '.join(ways)}."


def _add_memory(table: Table, plan: Plan) -> None:
    table.add_row("weights", decimal(plan.weight_bytes))
    table.add_row("cache", decimal(plan.cache_bytes))
    for part, num_bytes in plan.cache.bytes_by_part().items():
        table.add_row(f"  {part}", decimal(num_bytes))
    for name, num_bytes in zip(LOWER, plan.cache.lower_bytes()):
        if num_bytes:
            table.add_row(f"beside it: {name.replace('_', ' ')}", decimal(num_bytes))
    table.add_row("workspace", decimal(plan.workspace))
    table.add_row("needed, fullest rank", decimal(plan.needed_bytes))
    table.add_row("dense cache instead", decimal(plan.dense_bytes))
    table.add_row("largest context at this batch", f"{plan.largest_context():,}")


def _add_closed_form(table: Table, plan: Plan) -> None:
    form = plan.closed_form
    if form is None:
        return
    table.add_section()
    table.add_row("the paper: K, pages a sequence and rank", f"{form.num_pages:,}")
    table.add_row("  S, and S*", f"{form.page_size}, {form.best_page_size:.1f}")
    table.add_row("  rho", f"{form.compression:.2f}")
    table.add_row("  M_total, and M*_total", (
        f"{decimal(round(form.total_bytes))}, {decimal(round(form.best_bytes))}"
    ))
    table.add_row("  T_read + T_decode, a token's", (
        f"{_time(form.read_seconds)} + {_time(form.decode_seconds)}"
    ))


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-4 else f"{1e6 * seconds:.3g} us"

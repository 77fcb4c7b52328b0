"""python -m pikv_megatron.planner; exits 1 where a target does not fit, 2 where it is wrong."""

import json
import sys
from collections.abc import Sequence

from rich.console import Console

from pikv_megatron.planner.options import parse_options
from pikv_megatron.planner.report import report_json, report_table, verdict


def main(argv: Sequence[str]) -> int:
    """Print what is asked for; the exit status."""
    try:
        plan, as_json = parse_options(argv)
    except ValueError as error:
        print(f"planner: {error}", file=sys.stderr)
        return 2
    if as_json:
        print(json.dumps(report_json(plan), indent=2))
    else:
        console = Console()
        console.print(report_table(plan))
        console.print(verdict(plan), highlight=False, soft_wrap=True)
    return 0 if plan.is_possible else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

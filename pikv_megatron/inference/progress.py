"""Progress on stderr: a bar on a terminal, one line for each finished task elsewhere."""

import time
from contextlib import contextmanager
from typing import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Advance = Callable[[int, int], None]


@contextmanager
def progress(title: str, is_shown: bool, console: Console | None = None) -> Iterator[Advance]:
    """Show how far a task is.

    Args:
        title: what is being done.
        is_shown: False on every rank but one.
        console: default stderr.

    Yields:
        A function to call with (done, total).
    """
    console = console or Console(stderr=True)
    if not is_shown:
        yield lambda done, total: None
    elif not console.is_terminal:
        start = time.perf_counter()
        yield lambda done, total: None
        console.print(f"{title}: {time.perf_counter() - start:.1f} s", highlight=False)
    else:
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)

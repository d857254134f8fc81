"""Progress: shows what is being done."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress

Step = Callable[[str], None]
"""A function that is called with what is being done."""


def silent(doing: str) -> None:
    """Shows nothing."""


@contextmanager
def shown(progress: bool | Step | None, first: bool = True) -> Iterator[Step]:
    """Shows what is being done.

    Args:
        progress: Whether to show a bar; None = only if stderr is a terminal. Or a function that is called instead.
        first: Whether this process is the one that shows it by default.
    """
    if callable(progress):
        yield progress
        return
    show = sys.stderr.isatty() and first if progress is None else progress
    with Progress(console=Console(stderr=True), transient=True, disable=not show) as bar:
        task = bar.add_task("", total=None)
        yield lambda doing: bar.update(task, description=doing, advance=1)

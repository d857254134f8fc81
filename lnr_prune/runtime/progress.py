"""Progress: what is being done, how much of it is done, and how long the rest will take."""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import Progress

logger = logging.getLogger("lnr_prune")

Step = Callable[[str], None]
"""A function that is called with what is being done."""
EVERY = 10.0  # seconds between two lines where there is no terminal
SURE = 0.05  # share of the work after which the clock is trusted more than the forecast


@dataclass(frozen=True)
class Stage:
    """A part of a run.

    Attributes:
        name: What the description of each of its steps begins with.
        steps: Number of its steps.
        seconds: How long it takes, roughly.
    """

    name: str
    steps: int
    seconds: float


def silent(doing: str) -> None:
    """Shows nothing."""


@contextmanager
def shown(progress: bool | Step | None, first: bool = True) -> Iterator[Step]:
    """Shows what is being done: in a bar on a terminal, elsewhere in lines.

    Args:
        progress: Whether to show it on stderr; None = only if that is a terminal, else it is logged. Or a function that
            is called instead.
        first: Whether this process is the one that shows it by default.
    """
    if callable(progress):
        yield progress
    elif sys.stderr.isatty() and (first if progress is None else progress):
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=None)
            yield lambda doing: bar.update(task, description=doing, advance=1)
    elif progress:
        yield now_and_then(Console(stderr=True, markup=False, highlight=False, soft_wrap=True).print)
    else:
        yield now_and_then(logger.info) if first and progress is None else silent


def now_and_then(tell: Step, clock: Callable[[], float] = time.monotonic) -> Step:
    """Tells the first step, and then one every ten seconds."""
    last = -EVERY

    def step(doing: str) -> None:
        nonlocal last
        if (now := clock()) - last >= EVERY:
            last = now
            tell(doing)

    return step


def counted(step: Step, stages: Sequence[Stage], clock: Callable[[], float] = time.monotonic) -> Step:
    """A step that also says its number, and how long the run will still take: "refitting fc1 (2 of 5, 3 min left)".

    Args:
        step: Is told.
        stages: What the run consists of.
        clock: The time in seconds.
    """
    begin, done = clock(), dict.fromkeys((stage.name for stage in stages), 0)
    longest_first, total = sorted(stages, key=lambda stage: -len(stage.name)), sum(stage.seconds for stage in stages)

    def told(doing: str) -> None:
        stage = next((stage for stage in longest_first if doing.startswith(stage.name)), None)
        if stage is None:
            step(doing)
            return
        earlier = stages[: stages.index(stage)]
        finished = sum(each.seconds for each in earlier)
        finished += stage.seconds * min(1.0, done[stage.name] / stage.steps)
        done[stage.name] += 1
        elapsed = clock() - begin
        pace = (elapsed + SURE * total) / (finished + SURE * total) if total else 1.0
        of = f"{done[stage.name]} of {max(stage.steps, done[stage.name])}"
        step(f"{doing} ({of}, {duration((total - finished) * pace)} left)")

    return told


def duration(seconds: float) -> str:
    """About how long: "40 s", "3 min", "1.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

"""How a prune runs, which its result does not depend on."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lnr_prune.runtime.checks import check_flags
from lnr_prune.runtime.processes import ALONE, Ranks
from lnr_prune.runtime.progress import shown
from lnr_prune.runtime.work import Work


@dataclass(frozen=True)
class Run:
    """Settings of a run. Its result does not depend on them.

    Attributes:
        work: A folder in which statistics, finished groups and refitted layers are kept, so that a run that was killed
            goes on from there when it is called again in the same way, and ends with the same result. The batches must
            be the same in every pass. The folder stays when all is done: the same call again takes little time then;
            remove it when the pruned model is saved. None = nothing is kept.
        low_memory: Gathers the second moments of a few groups at a time, which are gone when the channels of these are
            chosen, with one more pass over the calibration data for every few (two with a budget).
        progress: Whether to show a progress bar; None = if stderr is a terminal. Or a function that is called with
            what is being done.
        alone: Whether this process prunes by itself, whatever process group there is.

    Raises:
        TypeError: If a setting is of another type.

    Example:
        >>> Run(work="half-done", progress=print).low_memory
        False
    """

    work: str | os.PathLike[str] | None = None
    low_memory: bool = False
    progress: bool | Callable[[str], None] | None = None
    alone: bool = False

    def __post_init__(self) -> None:
        check_flags(low_memory=self.low_memory, alone=self.alone)
        if not (self.progress is None or isinstance(self.progress, bool) or callable(self.progress)):
            raise TypeError(f"progress must be True, False, None or a function of a text, got {self.progress!r}")
        if not (self.work is None or isinstance(self.work, str | os.PathLike)):
            raise TypeError(f"work must be the path of a folder, or None, got {self.work!r}")


def check_run(run: object) -> None:
    """Refuses what is no `Run`.

    Raises:
        TypeError: It says what is one.
    """
    if not isinstance(run, Run):
        raise TypeError(f"run must be a Run, such as Run(work='folder'), got {run!r}")


@contextmanager
def started(run: Run) -> Iterator[Work]:
    """Within, all processes that prune together leave well, or all raise; progress is shown.

    Raises:
        TypeError: If run is something else.
        RankError: If another process has failed, or is lost.
    """
    check_run(run)
    ranks = ALONE if run.alone else Ranks.of_process_group()
    with ranks.together(), shown(run.progress, ranks.rank == 0) as step:
        yield Work(ranks, step)

"""How a prune runs: settings that do not change its result."""

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
        work: A folder that keeps statistics, finished groups and refitted layers. If a run is killed, the same call
            continues from there and ends with the same result. The batches must be the same in every pass. The folder
            stays after the run, and the same call then takes little time. Remove it once the pruned model is saved.
            None = nothing is kept.
        low_memory: Whether to gather the second moments of only a few groups at a time, and to free them once the
            channels of these groups are chosen. Every few groups take one more pass over the calibration data (two
            with a budget).
        progress: Whether to show a progress bar; None = only if stderr is a terminal. Or a function that is called
            with what is being done.
        alone: Whether this process prunes by itself, even if there is a process group.

    Raises:
        TypeError: If a setting is of the wrong type.

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
            raise TypeError(
                f"progress must be True, False, None or a function that takes a string, got {self.progress!r}"
            )
        if not (self.work is None or isinstance(self.work, str | os.PathLike)):
            raise TypeError(f"work must be the path of a folder, or None, got {self.work!r}")


def check_run(run: object) -> None:
    """Refuses anything but a `Run`.

    Raises:
        TypeError: If it is anything else; the message shows how to make a `Run`.
    """
    if not isinstance(run, Run):
        raise TypeError(f"run must be a Run, such as Run(work='folder'), got {run!r}")


@contextmanager
def started(run: Run) -> Iterator[Work]:
    """Starts a run. Within, all processes that prune together succeed, or all raise; progress is shown.

    Raises:
        TypeError: If ``run`` is not a `Run`.
        RankError: If another process has failed, or is lost.
    """
    check_run(run)
    ranks = ALONE if run.alone else Ranks.of_process_group()
    with ranks.together(), shown(run.progress, ranks.rank == 0) as step:
        yield Work(ranks, step)

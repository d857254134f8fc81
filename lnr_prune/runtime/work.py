"""Work: which processes prune together, who is told about progress, and where results are kept.

A `Work` is passed to every long step of a prune. A step asks `Work.remembered` for a value, which is read from the work
folder if it is there, and otherwise computed and written. A file appears only once it is complete, so a run may be
killed at any moment. A damaged file is computed again. A run that is continued ends with the result of one that was
never interrupted, to the last bit if torch computes in the same way (the same kind of device, the same number of
threads). Without a folder, as in ``Work()``, nothing is kept.

A folder belongs to one run: the same model, arguments, calibration data and versions. The model's tensors and its
printed form are compared, but not the code of its forward. Nothing in the files is executed.

Processes that prune together use one folder, that of the first rank, which reads and writes for all. All ranks
together compute what is missing. Only a process that prunes alone takes snapshots of a pass.
"""

import errno
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from lnr_prune.errors import PlanError, ran_out_of_memory
from lnr_prune.runtime.digest import sha256
from lnr_prune.runtime.disk import PART, StrPath, locked, put, regular
from lnr_prune.runtime.identity import Identity
from lnr_prune.runtime.processes import ALONE, Ranks
from lnr_prune.runtime.progress import Step, silent
from lnr_prune.runtime.stored import Stored

logger = logging.getLogger("lnr_prune")

Value = TypeVar("Value")
SECONDS = 60.0  # least time between two snapshots
SHARE = 20  # the least time is also this many times as long as the last snapshot took
RUN, LOCK = "lnr-prune.json", "lnr-prune.lock"


@dataclass(eq=False)
class Folder:
    """A work folder that is in use.

    Attributes:
        path: The folder, None on all ranks but the first.
        run: SHA-256 of the run that it belongs to.
        due: When the next snapshot is due.
    """

    path: Path | None
    run: str
    due: float

    def file(self, what: str) -> Path:
        """Where the value of this name is kept."""
        name = re.sub(r"[^A-Za-z0-9.]+", "-", what)[:60]
        return (self.path or Path()) / f"{name}-{sha256(what)[:16]}.safetensors"

    def owner(self, what: str) -> str:
        """Who may read the value of this name: this run, under this name."""
        return f"{self.run} {what}"


@dataclass(frozen=True, eq=False)
class Work:
    """What every long step is given.

    Attributes:
        ranks: The processes that prune together.
        step: A function that is called with what is being done.
        folder: Where values are kept; None = nowhere.
    """

    ranks: Ranks = ALONE
    step: Step = silent
    folder: Folder | None = None

    def forgetful(self) -> "Work":
        """The same without a folder, for trials that are remembered only as a whole."""
        return replace(self, folder=None)

    def remembered(self, what: str, kind: type[Value], compute: Callable[[], Value]) -> Value:
        """The value of this name: read, or computed and written.

        Args:
            what: Its name in the folder.
            kind: Its type, one that `typed` can read.
            compute: Computes it.

        Raises:
            OSError: If it cannot be written.
        """
        return self.each("", kind, (what,), lambda _: [compute()])[0]

    def each(
        self, what: str, kind: type[Value], names: Sequence[str], compute: Callable[[Sequence[str]], Sequence[Value]]
    ) -> list[Value]:
        """Like `remembered`, for several values; the missing ones are computed together."""
        if self.folder is None:
            return list(compute(names))
        files = {name: f"{what} {name}".strip() for name in names}
        found = {name: value for name in names for value in self._found(self.folder, files[name], kind)}
        if missing := [name for name in names if name not in found]:
            for name, value in zip(missing, compute(missing), strict=True):
                _write(self.folder, files[name], value)
                found[name] = value
        return [found[name] for name in names]

    def share_out(self, what: str, kind: type[Value], tasks: Mapping[str, Callable[[], Value]]) -> list[Value]:
        """Like `Ranks.share_out`, but each result is remembered as soon as it is known."""

        def done(names: Sequence[str]) -> list[Value]:
            return self.ranks.share_out([tasks[name] for name in names])

        names = list(tasks)
        size = len(names) if self.folder is None else self.ranks.size
        parts = (names[start : start + size] for start in range(0, len(names), size))
        return [value for part in parts for value in self.each(what, kind, part, done)]

    def snapshot(self, what: str, kind: type[Value]) -> Value | None:
        """The last snapshot of a long pass; None if there is none, or if several processes prune together."""
        if self.folder is None or self.ranks.size > 1:
            return None
        return next(iter(self._found(self.folder, what, kind)), None)

    def keep(self, what: str, value: object) -> None:
        """Replaces the last snapshot, but only once in a while, so that it takes little of the time."""
        start = time.monotonic()
        if self.folder is None or self.ranks.size > 1 or start < self.folder.due:
            return
        _write(self.folder, what, value)
        end = time.monotonic()
        self.folder.due = end + max(SECONDS, SHARE * (end - start))

    def drop(self, what: str) -> None:
        """Removes a snapshot."""
        if self.folder is not None and self.folder.path is not None:
            self.folder.file(what).unlink(missing_ok=True)

    def _found(self, folder: Folder, what: str, kind: type[Value]) -> tuple[Value, ...]:
        """The value, on all ranks, if the first rank has it in its folder."""
        stored = None if folder.path is None else _read(folder, what, kind)
        shapes = [(list(tensor.shape), tensor.dtype) for tensor in stored.tensors] if stored else []
        told = self.ranks.all_gather((stored.text, stored.devices, shapes) if stored else None)[0]
        if told is None:
            return ()
        text, devices, shapes = told
        if self.ranks.size > 1:  # each has an accelerator of its own
            devices = re.sub(r":\d+", "", devices)
        tensors = stored.tensors if stored else [torch.empty(shape, dtype=dtype) for shape, dtype in shapes]
        return (Stored(text, devices, self.ranks.broadcast(*tensors)).value(kind),)


@contextmanager
def opened_folder(path: StrPath, identity: Callable[[], Identity], ranks: Ranks) -> Iterator[Folder]:
    """Opens a work folder; within, it belongs to this run.

    Args:
        path: The folder; it is made if it does not exist.
        identity: Returns the identity of the run; called on all ranks, once the folder is locked.
        ranks: The processes that prune together.

    Raises:
        ValueError: If the folder belongs to another run, or holds something else.
        LnrPruneError: If another process uses it.
        OSError: If it cannot be written.
    """
    with ExitStack() as stack:
        place = Path(path) if ranks.rank == 0 else None
        if place is not None:
            if place.exists() and not place.is_dir():
                raise ValueError(f"the work folder {place} is a file: give a folder")
            with _writing(place):
                place.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(place / LOCK))
                for part in place.glob(PART.format("*")):  # left by a run that was killed
                    part.unlink()
        run = identity()
        if place is not None:
            _claim(place, run)
        ranks.all_gather(None)  # if the first rank has failed, all ranks end here, before any long work
        yield Folder(place, sha256(run.to_json()), time.monotonic() + SECONDS)


def _read(folder: Folder, what: str, kind: type[Value]) -> Stored | None:
    path = folder.file(what)
    try:
        return Stored.read(path, folder.owner(what), kind)
    except Exception as error:  # a damaged file raises what it likes
        if ran_out_of_memory(error):
            raise
        logger.warning("%s is damaged and will be computed again: %s", path, error)
        return None


def _write(folder: Folder, what: str, value: object) -> None:
    if folder.path is None:
        return
    stored = Stored.of(value)
    with _writing(folder.path):
        stored.write(folder.file(what), folder.owner(what))


def _claim(place: Path, run: Identity) -> None:
    """Checks that the folder belongs to this run or to none, and claims it for this run."""
    path, then = place / RUN, None
    new = not os.path.lexists(path)
    for entry in sorted(place.iterdir()):
        if entry.is_symlink() or (new and entry.name != LOCK):
            raise ValueError(
                f"the work folder {place} holds {entry.name!r}, which no prune wrote: give a new or an empty folder"
            )
    if not new:
        try:
            regular(path)
            then = Identity.from_json(path.read_text(encoding="utf-8"))
        except (PlanError, UnicodeDecodeError) as error:  # files of other runs have other checksums
            logger.warning("%s is damaged and will be written again: %s", path, error)
    if then is not None and (differences := "; ".join(run.differences(then))):
        raise ValueError(
            f"the work folder {place} belongs to another run. What differs: {differences}. To continue that run, give "
            "the same as then (for a loader that shuffles: list(loader), drawn with the same seed). Or give another "
            "folder"
        )
    if not new:
        logger.info("continuing from %d files in %s", len(list(place.glob("*.safetensors"))), place)
    with _writing(place):
        put(path, lambda part: Path(part).write_text(run.to_json() + "\n", encoding="utf-8"))


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        number, what = error.errno or errno.EIO, error.strerror or error
        advice = "free some space, or allow writing, and run the same again: it continues from what is there"
        raise OSError(number, f"the work folder cannot be written: {what}; {advice}", str(place)) from error

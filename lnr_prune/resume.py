"""Work folders: what a prune finds out is kept in files, and a run that was killed goes on from these.

Within `folder`, what is `remembered` is read from the folder if it is there, else computed and written. A file is put
in its place when it is whole, so a run may be killed at any moment; one that is damaged is computed anew. A run that
goes on ends with the result of one that was never interrupted, to the last bit where torch computes alike (on the same
kind of device, with as many threads). Without a folder all functions are the identity.

A folder belongs to one run: the same model, arguments, calibration data and versions. Of the model its tensors and its
printed form are compared, not the code of its forward. Files are safetensors and JSON, read as the types that are
expected: nothing in them is executed.

Processes that prune together (`lnr_prune.distributed`) have one folder, the first rank's. It reads and writes for all;
what is not there all ranks compute together. Snapshots of a pass are for a process alone.
"""

import errno
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from lnr_prune import distributed
from lnr_prune.calibration import Calibration
from lnr_prune.disk import PART, StrPath, locked, opened, put, regular
from lnr_prune.errors import PlanError, ran_out_of_memory
from lnr_prune.identity import Fixed, Run, sha256
from lnr_prune.plain_data import parsed, typed
from lnr_prune.record import digest_of

logger = logging.getLogger("lnr_prune")

Value = TypeVar("Value")
SECONDS = 60.0  # between two snapshots, at least
SHARE = 20  # times as long as the last one took, at least
RUN, LOCK = "lnr-prune.json", "lnr-prune.lock"

_current: ContextVar["_Folder | None"] = ContextVar("folder", default=None)


@dataclass(eq=False)
class _Folder:
    """The folder, None on all ranks but the first; SHA-256 of the run; when the next snapshot is due."""

    path: Path | None
    run: str
    due: float

    def file(self, what: str) -> Path:
        name = re.sub(r"[^A-Za-z0-9.]+", "-", what)[:60]
        return (self.path or Path()) / f"{name}-{sha256(what)[:16]}.safetensors"


@contextmanager
def folder(
    path: StrPath | None, model: nn.Module, data: Calibration, arguments: Mapping[str, object]
) -> Iterator[Calibration]:
    """Within, what is `remembered` is kept in this folder.

    Args:
        path: The folder; it is made if it does not exist. None = nothing is kept.
        model: The model that is pruned.
        data: The calibration data, which is gone through once.
        arguments: Of the prune: those that its result depends on.

    Yields:
        The calibration data. It raises a CalibrationError where a pass gives other batches than the first did: what is
        remembered would not fit what is computed.

    Raises:
        ValueError: If the folder belongs to another run, or holds something else.
        LnrPruneError: If another process uses it.
        OSError: If it cannot be written.
    """
    if path is None:
        with nothing():  # not even within another run
            yield data
        return
    with ExitStack() as stack:
        place = Path(path) if distributed.rank() == 0 else None
        if place is not None:
            if place.exists() and not place.is_dir():
                raise ValueError(f"the work folder {place} is a file: give a folder")
            with _writing(place):
                place.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(place / LOCK))
                for part in place.glob(PART.format("*")):  # of a run that was killed
                    part.unlink()
        fixed = Fixed.of(data)
        run = Run.of(model, fixed, arguments)
        if place is not None:
            _claim(place, run)
        distributed.everyone(None)  # if the first rank has failed, all end here, before long work
        token = _current.set(_Folder(place, sha256(run.to_json()), time.monotonic() + SECONDS))
        try:
            yield fixed
        finally:
            _current.reset(token)


@contextmanager
def nothing() -> Iterator[None]:
    """Within, nothing is remembered."""
    token = _current.set(None)
    try:
        yield
    finally:
        _current.reset(token)


def remembered(what: str, kind: type[Value], compute: Callable[[], Value]) -> Value:
    """The value of this name: read, or computed and written.

    Args:
        what: Its name in the folder.
        kind: Its type, of those that `typed` reads.
        compute: Computes it.

    Raises:
        OSError: If it cannot be written.
    """
    return each("", kind, (what,), lambda _: [compute()])[0]


def each(
    what: str, kind: type[Value], names: Sequence[str], compute: Callable[[Sequence[str]], Sequence[Value]]
) -> list[Value]:
    """Like `remembered`, of several values; those that are not there are computed together."""
    here = _current.get()
    if here is None:
        return list(compute(names))
    files = {name: f"{what} {name}".strip() for name in names}
    found = {name: value for name in names for value in _found(here, files[name], kind)}
    if missing := [name for name in names if name not in found]:
        for name, value in zip(missing, compute(missing), strict=True):
            _write(here, files[name], value)
            found[name] = value
    return [found[name] for name in names]


def spread(what: str, kind: type[Value], tasks: Mapping[str, Callable[[], Value]]) -> list[Value]:
    """Like `distributed.spread`; each result is remembered as soon as it is there."""

    def done(names: Sequence[str]) -> list[Value]:
        return distributed.spread([tasks[name] for name in names])

    names, size = list(tasks), distributed.ranks()
    if _current.get() is None:
        return done(names)
    parts = (names[start : start + size] for start in range(0, len(names), size))
    return [value for part in parts for value in each(what, kind, part, done)]


def snapshot(what: str, kind: type[Value]) -> Value | None:
    """What was last kept of a long pass; None where there is nothing, or several processes prune together."""
    here = _current.get()
    if here is None or distributed.ranks() > 1:
        return None
    return next(iter(_found(here, what, kind)), None)


def keep(what: str, value: object) -> None:
    """Writes a snapshot in place of the last one, but seldom: it must not take much of the time."""
    here, start = _current.get(), time.monotonic()
    if here is None or distributed.ranks() > 1 or start < here.due:
        return
    _write(here, what, value)
    end = time.monotonic()
    here.due = end + max(SECONDS, SHARE * (end - start))


def drop(what: str) -> None:
    """Removes a snapshot."""
    here = _current.get()
    if here is not None and here.path is not None:
        here.file(what).unlink(missing_ok=True)


@dataclass(frozen=True, eq=False)
class _Stored:
    """A value as a file has it: JSON, in which a tensor is its number; the tensors, and where they were."""

    text: str
    devices: str
    tensors: tuple[Tensor, ...]

    @classmethod
    def of(cls, value: object) -> "_Stored":
        tensors: list[Tensor] = []
        text, stored, storages = json.dumps(_plain(value, tensors)), list[Tensor](), set[int]()
        for tensor in tensors:
            there = tensor.detach().cpu().contiguous()
            if there.untyped_storage().data_ptr() in storages:  # a view of another tensor
                there = there.clone()
            storages.add(there.untyped_storage().data_ptr())
            stored.append(there)
        return cls(text, " ".join(str(tensor.device) for tensor in tensors), tuple(stored))

    def value(self, kind: type[Value]) -> Value:
        pairs = zip(self.tensors, self.devices.split(), strict=True)
        return typed(parsed(self.text), kind, "the value", [tensor.to(device) for tensor, device in pairs])

    def checksum(self, run: str, what: str) -> str:
        tensors = {str(index): tensor for index, tensor in enumerate(self.tensors)}
        return sha256(json.dumps([run, what, self.text, self.devices, digest_of(tensors)]))


def _plain(value: Any, tensors: list[Tensor]) -> Any:
    """The value as JSON has it; its tensors are added to the list."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return len(tensors) - 1
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name), tensors) for field in fields(value)}
    if isinstance(value, Mapping):
        return {name: _plain(entry, tensors) for name, entry in value.items()}
    if isinstance(value, tuple):
        return [_plain(entry, tensors) for entry in value]
    return value


def _found(here: _Folder, what: str, kind: type[Value]) -> tuple[Value, ...]:
    """The value on all ranks, if the first one has it."""
    stored = None if here.path is None else _read(here, what, kind)
    shapes = [(list(tensor.shape), tensor.dtype) for tensor in stored.tensors] if stored else []
    told = distributed.everyone((stored.text, stored.devices, shapes) if stored else None)[0]
    if told is None:
        return ()
    text, devices, shapes = told
    if distributed.ranks() > 1:  # each has an accelerator of its own
        devices = re.sub(r":\d+", "", devices)
    tensors = stored.tensors if stored else [torch.empty(shape, dtype=dtype) for shape, dtype in shapes]
    return (_Stored(text, devices, distributed.shared(*tensors)).value(kind),)


def _read(here: _Folder, what: str, kind: type[Value]) -> _Stored | None:
    path = here.file(what)
    if not os.path.lexists(path):
        return None
    try:
        with opened(path) as file:
            tensors = tuple(file.get_tensor(str(index)).clone() for index in range(len(file.keys())))
            entries = file.metadata() or {}
        stored = _Stored(entries["value"], entries["devices"], tensors)
        if entries["sha256"] != stored.checksum(here.run, what):
            raise PlanError("its SHA-256 is not the one that was written with it")
        stored.value(kind)
    except Exception as error:  # a damaged file raises what it likes
        if ran_out_of_memory(error):
            raise
        logger.warning("%s is damaged and is computed anew: %s", path, error)
        return None
    return stored


def _write(here: _Folder, what: str, value: object) -> None:
    if here.path is None:
        return
    stored = _Stored.of(value)
    entries = {"value": stored.text, "devices": stored.devices, "sha256": stored.checksum(here.run, what)}
    tensors = {str(index): tensor for index, tensor in enumerate(stored.tensors)}
    with _writing(here.path):
        put(here.file(what), lambda part: save_file(tensors, part, entries))


def _claim(place: Path, run: Run) -> None:
    """Checks that the folder is this run's, or nobody's, and makes it this run's."""
    path, then = place / RUN, None
    new = not os.path.lexists(path)
    for entry in sorted(place.iterdir()):
        if entry.is_symlink() or (new and entry.name != LOCK):
            raise ValueError(
                f"the work folder {place} holds {entry.name!r}, which is not of a prune: give a new or an empty folder"
            )
    if not new:
        try:
            regular(path)
            then = Run.from_json(path.read_text(encoding="utf-8"))
        except (PlanError, UnicodeDecodeError) as error:  # files of other runs have other checksums
            logger.warning("%s is damaged and is written anew: %s", path, error)
    if then is not None and (differences := "; ".join(run.differences(then))):
        raise ValueError(
            f"the work folder {place} belongs to another run, of {differences}. Give the same again to go on with "
            "that run (of a loader that shuffles: list(loader), drawn with the same seed), or another folder"
        )
    if not new:
        logger.info("going on from %d files in %s", len(list(place.glob("*.safetensors"))), place)
    with _writing(place):
        put(path, lambda part: Path(part).write_text(run.to_json() + "\n", encoding="utf-8"))


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None) or errno.EIO
        what = getattr(error, "strerror", None) or error
        advice = "make room, or let it be written, and run the same again: it goes on from what is there"
        raise OSError(number, f"the work folder cannot be written: {what}; {advice}", str(place)) from error

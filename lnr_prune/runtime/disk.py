"""Files: written whole or not at all, read without trust."""

import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import safe_open

from lnr_prune.errors import LnrPruneError, PlanError

try:
    from fcntl import LOCK_EX, LOCK_NB, lockf
except ImportError:  # Windows: nobody is kept out
    lockf = None  # type: ignore[assignment]


StrPath = str | os.PathLike[str]
PART = ".lnr-prune-{}.part"  # name of a file that is being written
_held: set[tuple[int, str]] = set()  # process and file: it could lock it again


def regular(path: StrPath) -> None:
    """Refuses what is no file.

    Raises:
        PlanError: If it is a pipe, a device or a folder.
        OSError: If it is not there.
    """
    if not stat.S_ISREG(os.stat(os.fspath(path)).st_mode):  # reading from a pipe would wait
        raise PlanError("it is not a regular file")


@contextmanager
def opened(path: StrPath) -> Iterator[Any]:
    """A safetensors file, for reading.

    Raises:
        PlanError: If it is none, or damaged.
        OSError: If it is not there.
    """
    regular(path)
    try:
        file = safe_open(path, "pt")
    except Exception as error:  # safetensors raises its own, and the system's
        raise PlanError(f"it is not a safetensors file, or it is damaged or cut off: {error}") from error
    with file as entered:
        yield entered


def put(path: StrPath, write: Callable[[str], object]) -> None:
    """Writes a file beside the wanted one and puts it in its place: nothing is ever half-written."""
    target = os.path.realpath(path)
    if not os.path.basename(os.fspath(path)) or os.path.isdir(target):
        raise IsADirectoryError(errno.EISDIR, "it is a folder; name a file in it", os.fspath(path))
    if not os.path.isdir(os.path.dirname(target)):
        raise FileNotFoundError(errno.ENOENT, "its folder does not exist; make it first", os.fspath(path))
    part = os.path.join(os.path.dirname(target), PART.format(secrets.token_hex(8)))
    try:
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = os.stat(target if os.path.exists(target) else part).st_mode
        write(part)
        os.chmod(part, stat.S_IMODE(mode))  # safetensors makes files that only their owner may read
        with open(part, "rb") as written:
            os.fsync(written.fileno())
        os.replace(part, target)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(part)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Within, no other run holds this lock; when a process ends, however that is, so does its lock.

    It is one of POSIX: unlike that of flock, a child process does not get it too, and outlive its parent with it.

    Raises:
        LnrPruneError: If it is held.
        OSError: If the file cannot be written.
    """
    name = os.getpid(), os.path.realpath(path)
    in_use = LnrPruneError(f"{path.parent} is in use by another run: wait for its end, or give another folder")
    if name in _held:
        raise in_use
    file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    _held.add(name)
    try:
        if lockf is not None:
            try:
                lockf(file, LOCK_EX | LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                raise in_use from error
        os.write(file, b"held by the process that prunes\n")  # if there is no room, it is known now
        yield
    finally:
        os.close(file)
        _held.remove(name)

"""Files: written completely or not at all, and read without trusting them."""

import errno
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from lnr_prune.errors import LnrPruneError, PlanError

StrPath = str | os.PathLike[str]
PART = ".lnr-prune-{}.part"  # name of a file that is being written


def regular(path: StrPath) -> None:
    """Refuses anything but a regular file.

    Raises:
        PlanError: If it is a pipe, a device or a folder.
        OSError: If it does not exist.
    """
    if not stat.S_ISREG(os.stat(os.fspath(path)).st_mode):  # reading from a pipe would block
        raise PlanError("it is not a regular file")


@contextmanager
def opened(path: StrPath) -> Iterator[Any]:
    """Opens a safetensors file for reading.

    Raises:
        PlanError: If it is not a safetensors file, or is damaged.
        OSError: If it does not exist.
    """
    regular(path)
    try:
        file = safe_open(path, "pt")
    except Exception as error:  # safetensors raises its own errors and the system's
        raise PlanError(f"it is not a safetensors file, or it is damaged or cut off: {error}") from error
    with file as entered:
        yield entered


def put(path: StrPath, write: Callable[[str], object]) -> None:
    """Writes a temporary file next to the path, then renames it: no file is ever half-written.

    Raises:
        OSError: If it cannot be written, or if a folder, a device or a pipe is there, which a file must not replace.
    """
    target = os.path.realpath(path)
    if not os.path.basename(os.fspath(path)) or os.path.isdir(target):
        raise IsADirectoryError(errno.EISDIR, "it is a folder; name a file in it", os.fspath(path))
    if not os.path.isdir(os.path.dirname(target)):
        raise FileNotFoundError(errno.ENOENT, "its folder does not exist; make it first", os.fspath(path))
    if os.path.exists(target) and not stat.S_ISREG(os.stat(target).st_mode):
        raise OSError(errno.EINVAL, "it is a device, a pipe or a socket; give the name of a file", os.fspath(path))
    part = os.path.join(os.path.dirname(target), PART.format(secrets.token_hex(8)))
    try:
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = os.stat(target if os.path.exists(target) else part).st_mode
        write(part)
        os.chmod(part, stat.S_IMODE(mode))  # safetensors makes files that only their owner may read
        with open(part, "rb") as written:
            os.fsync(written.fileno())
        os.replace(part, target)
    except SafetensorError as error:  # hides the system's error in its text
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise OSError(errno.EIO, f"it cannot be written: {error}", os.fspath(path)) from error
        raise OSError(int(number[1]), os.strerror(int(number[1])), os.fspath(path)) from error
    finally:
        with suppress(FileNotFoundError):
            os.unlink(part)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock that no other run can hold meanwhile. It is released when the process ends, in whatever way.

    Raises:
        LnrPruneError: If another run holds it.
        OSError: If the file cannot be written.
    """
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        in_use = f"{path.parent} is in use by another run: wait until it ends, or give another folder"
        raise LnrPruneError(in_use) from error
    try:
        yield
    finally:
        lock.release()

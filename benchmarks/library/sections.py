"""Sections of a long script: rows that are printed and written as they come, whatever becomes of the others."""

import faulthandler
import gc
import json
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType

import torch

Cell = str | float | int | None
GRACE = 60.0  # seconds after which a section that cannot be stopped ends the process
WIDE = 52  # characters of a row's name


@dataclass(frozen=True)
class Found:
    """What an item of a section has found.

    Attributes:
        cells: Column -> figure or text; a column that is left out is empty.
        wrong: What is not as it must be; "" = all is well.
    """

    cells: Mapping[str, Cell]
    wrong: str = ""


@dataclass(frozen=True)
class Section:
    """A table.

    Attributes:
        name: Its name.
        columns: Its columns, in order; one for the item's name comes first, one for what is wrong last.
        limit: Seconds that it may take.
        items: Name -> what is run for its row.
    """

    name: str
    columns: Sequence[str]
    limit: float
    items: Mapping[str, Callable[[], Found]]


@dataclass(frozen=True)
class Row:
    """A row of the file."""

    section: str
    what: str
    seconds: float
    cells: Mapping[str, Cell]
    wrong: str


class OutOfTime(BaseException):
    """The section's time is up. No ``except Exception`` on the way can take it for a failure of its own."""


@dataclass
class Sheet:
    """All rows so far.

    Attributes:
        about: What they were measured on.
        file: Where they are written, after each one.
        rows: The rows.
    """

    about: Mapping[str, Cell]
    file: Path | None = None
    rows: list[Row] = field(default_factory=list)

    @property
    def wrong(self) -> list[Row]:
        """The rows in which something is wrong."""
        return [row for row in self.rows if row.wrong]

    def run(self, section: Section) -> None:
        """Runs the items one after another; one that fails, or is out of time, has its row all the same."""
        print(f"\n## {section.name} (at most {section.limit:.0f} s)\n", flush=True)
        _line((section.name.ljust(WIDE), *section.columns, "wrong"))
        _line(("-" * WIDE, *("-" * (len(column) - 1) + ":" for column in section.columns), "-----"))
        begin, todo = time.perf_counter(), list(section.items)
        try:
            with limited(section.limit):
                while todo:
                    self._item(section, todo[0])
                    del todo[0]
        except OutOfTime:
            for position, what in enumerate(todo):
                done = "stopped" if position == 0 else "not run"
                self._add(section, Row(section.name, what, 0.0, {}, f"{done}: {section.limit:.0f} s are over"))
        print(f"\n{section.name}: {time.perf_counter() - begin:.1f} s", flush=True)

    def _item(self, section: Section, what: str) -> None:
        begin = time.perf_counter()
        try:
            found = section.items[what]()
        except Exception as error:  # of any kind: the others come all the same
            traceback.print_exc()
            sys.stderr.flush()
            text = next(iter(str(error).splitlines()), "").replace("|", "/")
            found = Found({}, f"{type(error).__name__}: {text[:160]}")
        self._add(section, Row(section.name, what, time.perf_counter() - begin, found.cells, found.wrong))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # a prune asks how much is free

    def _add(self, section: Section, row: Row) -> None:
        self.rows.append(row)
        cells = (_text(row.cells.get(column)).rjust(len(column)) for column in section.columns)
        _line((row.what.ljust(WIDE), *cells, row.wrong))
        if self.file:
            known = {**self.about, "rows": [asdict(each) for each in self.rows]}
            self.file.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises `OutOfTime` within, when the seconds are over; where that is not noticed, the process ends."""

    def over(_: int, __: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, over)
    faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=sys.__stderr__ or sys.stderr)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()


def _text(cell: Cell) -> str:
    if cell is None:
        return ""
    return f"{cell:.3g}" if isinstance(cell, float) else f"{cell:,}" if isinstance(cell, int) else cell


def _line(cells: Sequence[str]) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)

"""What is said while a run goes on."""

import logging
from collections.abc import Iterator

import pytest

from lnr_prune.runtime.progress import EVERY, Stage, counted, duration, now_and_then, shown


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_steps_are_numbered_and_what_is_left_follows_the_clock() -> None:
    clock, told = Clock(), list[str]()
    step = counted(told.append, [Stage("read", 2, 10.0), Stage("read twice", 1, 20.0), Stage("solve", 4, 70.0)], clock)
    for name in ("read", "read", "read twice", "solve a", "solve b"):
        step(name)
        clock.now += {"read": 10.0, "read twice": 40.0}.get(name, 35.0)  # twice as long as expected
    assert [each.split(",")[0] for each in told] == [
        "read (1 of 2", "read (2 of 2", "read twice (1 of 1", "solve a (1 of 4", "solve b (2 of 4"
    ]  # fmt: skip
    left = [float(each.split(", ")[1].split()[0]) for each in told[1:]]
    assert left[2] == pytest.approx(2 * 70 / 60, abs=0.5)  # minutes
    assert told[-1].endswith(f"{2 * 52.5 / 60:.0f} min left)")


def test_what_no_stage_knows_is_told_as_it_is() -> None:
    told = list[str]()
    counted(told.append, [])("waiting")
    assert told == ["waiting"]


def test_more_steps_than_expected_are_no_error() -> None:
    clock, told = Clock(), list[str]()
    step = counted(told.append, [Stage("read", 1, 0.0)], clock)
    for _ in range(3):
        step("read")
    assert told == [f"read ({n} of {n}, 0 s left)" for n in (1, 2, 3)]


def test_lines_are_few() -> None:
    clock, told = Clock(), list[str]()
    step = now_and_then(told.append, clock)
    for second in range(25):
        clock.now = float(second)
        step(str(second))
    assert told == ["0", str(int(EVERY)), str(int(2 * EVERY))]


def test_without_a_terminal_it_is_logged_or_printed_in_lines(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    def says(progress: bool | None, first: bool = True) -> Iterator[str]:
        caplog.clear()
        with caplog.at_level(logging.INFO, "lnr_prune"), shown(progress, first) as step:
            step("reading [x]")
        yield from (*caplog.messages, capsys.readouterr().err)

    assert list(says(None)) == ["reading [x]", ""]
    assert list(says(True)) == ["reading [x]\n"]
    assert list(says(False)) == [""]
    assert list(says(None, first=False)) == [""]


@pytest.mark.parametrize(("seconds", "text"), [(4.4, "4 s"), (99.4, "99 s"), (100, "2 min"), (9000, "2.5 h")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text

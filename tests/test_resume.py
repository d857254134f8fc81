"""Work folders: a run that is killed anywhere goes on, and ends with the result of one that was not."""

import logging
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from lnr_prune import resume
from tests import runs

KILLS = int(os.environ.get("LNR_PRUNE_KILLS", "3"))
STEP = 1 if KILLS >= 50 else 5  # files that a run makes
LIMIT = 120  # seconds that a process may take
MODEL, DATA = runs.network("lasso")


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "SECONDS", 0.0)
    monkeypatch.setattr(resume, "SHARE", 0)


def started(work: Callable[..., None], *arguments: Any) -> BaseProcess:
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.runs", "torch._dynamo"])
    process = server.Process(target=work, args=arguments)
    process.start()
    return process


def ended(process: BaseProcess, seconds: float = LIMIT) -> int | None:
    """The exit code; it is killed if it takes longer."""
    try:
        process.join(seconds)
    finally:
        process.kill()
    process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def expected() -> Mapping[str, Any]:
    return {}


def of(name: str, expected: Any) -> dict[str, Any]:
    """What a run ends with that has no work folder."""
    if name not in expected:
        expected[name] = runs.pruned(name, None)
    result: dict[str, Any] = expected[name]
    return result


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", runs.AMOUNTS)
def test_a_work_folder_changes_nothing_and_is_read_again(name: str, expected: Any, tmp_path: Path) -> None:
    work = tmp_path / "deep" / "work"
    assert runs.same(runs.pruned(name, work), of(name, expected))
    before = files(work)
    assert not [file for file in before if file.endswith(".part") or file.startswith("sums")]
    assert runs.same(runs.pruned(name, work), of(name, expected))
    assert files(work) == before


@pytest.mark.parametrize(("name", "when", "least"), [("lasso", "before", 15), ("budget", "after", 25)])
def test_killed_at_every_file(name: str, when: str, least: int, expected: Any, tmp_path: Path) -> None:
    """Every run makes a few new files, and is killed before or after it has put the last one in its place."""
    work, out, codes = tmp_path / "work", tmp_path / "out", list[int | None]()
    while not out.exists():
        codes.append(ended(started(runs.work, name, work, out, 1 + STEP + (when == "before"), when)))
        assert len(codes) < 60
    assert set(codes[:-1]) == {-9}
    assert len(codes) > least / STEP
    assert runs.same(torch.load(out, weights_only=False), of(name, expected))
    assert not [file for file in files(work) if file.endswith(".part")]


def test_killed_at_random_moments(expected: Any, tmp_path: Path) -> None:
    chance, name, moments = random.Random(0), "budget", []
    start = time.monotonic()
    assert ended(started(runs.work, name, tmp_path / "first", tmp_path / "out")) == 0
    took = time.monotonic() - start
    for number in range(KILLS):
        work, out = tmp_path / f"work-{number}", tmp_path / f"out-{number}"
        ended(started(runs.work, name, work, out), moment := chance.uniform(0, took))
        moments.append((round(moment, 2), len(files(work)) if work.exists() else 0))
        if not out.exists():
            assert ended(started(runs.work, name, work, out)) == 0
        assert runs.same(torch.load(out, weights_only=False), of(name, expected)), moments
        assert not [file for file in files(work) if file.endswith(".part")]
    logging.getLogger(__name__).info("killed after seconds, at files: %s", moments)

"""Work folders: a run that is killed anywhere goes on, and ends with the result of one that was not."""

import errno
import json
import logging
import multiprocessing
import os
import pickle
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typer.testing import CliRunner

import lnr_prune as lnr
from lnr_prune.calibration.moments import SecondMoments
from lnr_prune.cli import main
from lnr_prune.errors import CalibrationError, LnrPruneError
from lnr_prune.runtime.digest import digest_of, sha256
from lnr_prune.runtime.disk import locked
from lnr_prune.runtime.identity import Identity
from lnr_prune.runtime.processes import ALONE
from lnr_prune.runtime.work import LOCK, RUN, Work, opened_folder
from tests.helpers import runs
from tests.helpers.faults import failing, owner_of

KILLS = int(os.environ.get("LNR_PRUNE_KILLS", "3"))
STEP = 1 if KILLS >= 50 else 5  # files that a run makes
LIMIT = 3600.0  # seconds: it ends processes that hang
MODEL, DATA = runs.network("lasso")
DONE = {  # what a run that goes on has to do less of
    "batches": "lnr_prune.calibration.gather.watch",
    "rows": "lnr_prune.calibration.moments.SecondMoments.with_rows",
    "solves": "lnr_prune.lasso.path.solve",
    "groups": "lnr_prune.lasso.problem.GroupLasso.error",
    "curves": "lnr_prune.selection.curves.backward",
    "eliminations": "lnr_prune.selection.selectors.backward",
    "regressions": "lnr_prune.refit.fit.ridge_regression",
    "layers": "lnr_prune.refit.refit.target_of",
    "allocations": "lnr_prune.selection.search.allocate",
    "refits": "lnr_prune.selection.trials.refit_network",
}


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    snapshots(monkeypatch, 0.0, 0)


def snapshots(patch: pytest.MonkeyPatch, seconds: float, share: int) -> None:
    """How seldom they are."""
    patch.setattr("lnr_prune.runtime.work.SECONDS", seconds)
    patch.setattr("lnr_prune.runtime.work.SHARE", share)


def started(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.helpers.runs", "torch._dynamo"])
    process = server.Process(target=target, args=arguments)
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
    assert ("4.running_mean" in of(name, expected)["masked"]) == (name in ("batch norm", "tandem"))
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
        codes.append(ended(started(runs.alone, name, work, out, 1 + STEP + (when == "before"), when)))
        assert len(codes) < 60
    assert set(codes[:-1]) == {-9}
    assert len(codes) > least / STEP
    assert runs.same(torch.load(out, weights_only=False), of(name, expected))
    assert not [file for file in files(work) if file.endswith(".part")]


def test_killed_at_random_moments(expected: Any, tmp_path: Path) -> None:
    """After the first, every run is killed up to twice, from the moment that it has a folder, and then goes on."""
    chance, name, kills, number, longest = random.Random(0), "budget", list[int](), 0, 0.0
    while len(kills) < KILLS:
        work, out = tmp_path / f"work-{number}", tmp_path / f"out-{number}"
        for limit in [chance.uniform(0, longest) for _ in range(2 if number else 0)] + [LIMIT]:
            process = started(runs.alone, name, work, out)
            while process.is_alive() and not (work / RUN).exists():
                time.sleep(0.001)
            start = time.monotonic()
            if ended(process, limit) == -9:
                kills.append(len(files(work)))
            longest = max(longest, time.monotonic() - start)
        assert runs.same(torch.load(out, weights_only=False), of(name, expected)), kills
        assert not [file for file in files(work) if file.endswith(".part")]
        number += 1
    logging.getLogger(__name__).info("%d runs, killed at so many files: %s", number, kills)


def mine(
    folder: Any,
    data: Any = None,
    model: nn.Module | None = None,
    progress: Callable[[str], None] | None = None,
    **more: Any,
) -> dict[str, Any]:
    run, options = lnr.Run(work=folder, progress=progress), {**runs.AMOUNTS["lasso"], **more}
    return runs.result(lnr.prune(model or MODEL, DATA if data is None else data, run=run, **options))


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each function of `DONE` is called."""
    calls: Counter[str] = Counter()

    def counting(what: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def function(*args: Any, **kwargs: Any) -> Any:
            calls[what] += 1
            return real(*args, **kwargs)

        return function

    for what, path in DONE.items():
        owner, name = owner_of(path)
        monkeypatch.setattr(owner, name, counting(what, getattr(owner, name)))
    return calls


@pytest.mark.parametrize("name", ["lasso", "backward", "budget", "logits", "repeated"])
def test_what_is_there_is_not_done_again(name: str, tmp_path: Path, counted: Counter[str]) -> None:
    runs.pruned(name, tmp_path)
    assert sum(counted.values()) > 20
    counted.clear()
    runs.pruned(name, tmp_path)
    assert not +counted


class Stop(Exception):  # noqa: N818
    """Ends a run."""


def stopped(at: str, count: int) -> Callable[[str], None]:
    """Progress that ends the run where this is said for the n-th time."""
    said: list[str] = []

    def progress(text: str) -> None:
        said.append(text)
        if text.startswith(at) and sum(each.startswith(at) for each in said) == count:
            raise Stop

    return progress


@pytest.mark.parametrize(
    ("name", "at", "count", "done"),
    [
        ("lasso", "statistics", 4, {"batches": 4, "layers": 0}),  # of 6 batches
        ("budget", "measuring", 3, {"batches": 6, "curves": 2, "refits": 0}),
        ("budget", "trying", 2, {"batches": 6, "curves": 4, "refits": 1}),
        ("budget", "searching", 3, {"batches": 6, "curves": 4, "refits": 4}),
        ("lasso", "selecting", 3, {"batches": 6, "groups": 2, "layers": 0}),
        ("lasso", "refitting", 5, {"batches": 6, "groups": 4, "layers": 3}),
    ],
)
def test_only_what_is_left_is_done(
    name: str, at: str, count: int, done: dict[str, int], tmp_path: Path, counted: Counter[str]
) -> None:
    wanted, whole = runs.pruned(name, None), Counter(counted)
    with pytest.raises(Stop):
        runs.pruned(name, tmp_path, progress=stopped(at, count))
    counted.clear()
    assert runs.same(runs.pruned(name, tmp_path), wanted)
    assert {each: whole[each] - counted[each] for each in done} == done


def test_a_snapshot_of_fewer_layers_is_not_taken(expected: Any, tmp_path: Path) -> None:
    """Of a pass for one layer, whose file was lost, and before it is over another one's is."""
    mine(tmp_path)
    for path in (*tmp_path.glob("moments-3*"), *tmp_path.glob("channels*"), *tmp_path.glob("refit*")):
        path.unlink()
    with pytest.raises(Stop):
        mine(tmp_path, progress=stopped("statistics", 3))
    next(tmp_path.glob("moments-6*")).unlink()
    assert list(tmp_path.glob("sums-of*"))
    assert runs.same(mine(tmp_path), of("lasso", expected))


def cut(raw: bytes) -> bytes:
    return raw[: len(raw) // 2]


def flipped(where: float) -> Callable[[bytes], bytes]:
    """One bit is another one."""

    def flip(raw: bytes) -> bytes:
        at = int(where * (len(raw) - 1))
        return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]

    return flip


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "cut off": cut,
    "zeros": lambda raw: bytes(len(raw)),
    "text": lambda _: b"{}",
    "a pickle": lambda _: pickle.dumps({"value": 1.0}),
    "the first bit": flipped(0),
    "a bit of the header": flipped(0.1),
    "the last bit": flipped(1),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run that kept the snapshots of its pass."""
    work = tmp_path_factory.mktemp("finished") / "work"
    with pytest.MonkeyPatch.context() as patch:
        snapshots(patch, 0.0, 0)
        patch.setattr(Work, "drop", lambda work, what: None)
        runs.pruned("budget", work)
    return files(work)


def laid(found: Mapping[str, bytes], work: Path) -> None:
    work.mkdir(exist_ok=True)
    for name, raw in found.items():
        (work / name).write_bytes(raw)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_computed_anew(
    damage: str, finished: dict[str, bytes], expected: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """All of them, the snapshot too."""
    spare = (LOCK,)
    laid({name: raw if name in spare else DAMAGES[damage](raw) for name, raw in finished.items()}, tmp_path)
    assert runs.same(runs.pruned("budget", tmp_path), of("budget", expected))
    said = warnings_in(caplog)
    for name in finished.keys() - set(spare):
        assert any(name in text and "is damaged and will be" in text for text in said), name
    assert files(tmp_path).keys() == {name for name in finished if not name.startswith("sums")}
    caplog.clear()
    assert runs.same(runs.pruned("budget", tmp_path), of("budget", expected))
    assert "is damaged" not in " ".join(warnings_in(caplog))


def test_any_one_damaged_file_is_computed_anew(
    finished: dict[str, bytes], expected: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = [name for name in finished if name != LOCK]
    for number, name in enumerate(names):
        work, chance = tmp_path / str(number), random.Random(number)
        caplog.clear()
        laid({**finished, name: flipped(chance.random())(finished[name])}, work)
        if chance.random() < 0.5:
            laid({name: finished[names[number - 1]]}, work)  # another one's contents
        if name.startswith("moments") or chance.random() < 0.2:
            (work / next(each for each in names if each.startswith("allocation"))).unlink()
        assert runs.same(runs.pruned("budget", work), of("budget", expected)), name
        assert files(work).keys() == {each for each in finished if not each.startswith("sums")}


def test_files_of_another_run_are_not_taken(
    finished: dict[str, bytes], expected: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine(tmp_path, refit=lnr.Refit(ridge=0.1))
    laid({name: raw for name, raw in files(tmp_path).items() if name.startswith("refit")}, other := tmp_path / "other")
    laid({RUN: finished[RUN]}, other)
    assert runs.same(runs.pruned("budget", other), of("budget", expected))
    assert "SHA-256" in " ".join(warnings_in(caplog))


def other_weights() -> nn.Module:
    model, _ = runs.network("lasso")
    with torch.no_grad():
        model.get_parameter("3.weight")[0, 0, 0, 0] += 1e-3
    return model


def other_layers() -> nn.Module:
    model, _ = runs.network("lasso")
    model[2] = nn.ReLU6()  # type: ignore[operator]
    return model


KEPT, FITTED = "Keep(channels=0.5)", "Refit(ridge=None, window=1, iterations=10)"
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "amount": ({"amount": lnr.Keep(0.4)}, f"What differs: amount: {KEPT}, now Keep(channels=0.4). To continue"),
    "kind of amount": ({"amount": lnr.Penalty(ratio=0.1)}, f"amount: {KEPT}, now Penalty(lam=None, ratio=0.1)."),
    "budget": ({"amount": lnr.Budget(macs=0.5)}, f"amount: {KEPT}, now Budget("),
    "selector": ({"selector": "backward"}, "selector: Lasso(solver=Newton("),
    "solver": ({"selector": lnr.Lasso(lnr.Fista())}, ", now Lasso(solver=Fista("),
    "ridge": ({"refit": lnr.Refit(ridge=0.1)}, f"refit: {FITTED}, now Refit(ridge=0.1,"),
    "window": ({"refit": lnr.Refit(window=2)}, f"refit: {FITTED}, now Refit(ridge=None, window=2,"),
    "bias": ({"bias": False}, "bias: True, now False"),
    "no refit": ({"refit": None}, f"refit: {FITTED}, now None"),
    "logits": ({"logits": True}, "logits: None, now True"),
    "graph": ({"into": "graph"}, "into: 'module', now 'graph'"),
    "weights": ({"model": other_weights()}, "What differs: other weights"),
    "layers": ({"model": other_layers()}, "What differs: a model with other layers"),
    "values": ({"data": [*DATA[:3], DATA[3] + 1, *DATA[4:]]}, "What differs: other calibration data (from batch 3 on)"),
    "order": ({"data": DATA[::-1]}, "What differs: other calibration data (from batch 0 on)"),
    "batches": ({"data": torch.cat(DATA).split(6)}, "What differs: other calibration data (from batch 1 on)"),
    "fewer": ({"data": DATA[:-1]}, "What differs: other calibration data (6 batches, now 5)"),
    "more": ({"data": [*DATA, DATA[0]]}, "What differs: other calibration data (6 batches, now 7)"),
    "precision": ({"data": [batch.double().float() * (1 + 2e-7) for batch in DATA]}, "other calibration data"),
}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("done") / "work"
    mine(work)
    return work


@pytest.mark.parametrize("what", OTHERS)
def test_the_folder_of_another_run_is_refused(what: str, done: Path) -> None:
    before, (arguments, words) = files(done), OTHERS[what]
    with pytest.raises(ValueError, match="belongs to another run") as caught:
        mine(done, **arguments)
    assert words in str(caught.value)
    assert "another folder" in str(caught.value)
    assert files(done) == before


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    mine(tmp_path, selector=lnr.Random())
    with pytest.raises(ValueError, match=r"differs: selector: Random\(seed=0\), now Random\(seed=1\)\. To continue"):
        mine(tmp_path, selector=lnr.Random(seed=1))


def test_layers_may_be_named_in_any_order(tmp_path: Path) -> None:
    first = mine(tmp_path, amount=lnr.Keep({"0": 3, "10": 0.5}))
    assert runs.same(mine(tmp_path, amount=lnr.Keep({"10": 0.5, "0": 3})), first)


@pytest.mark.parametrize("name", ["version", "torch", "data"])
def test_the_folder_of_another_version_or_number_of_processes(name: str, done: Path, tmp_path: Path) -> None:
    run = Identity.from_json((done / RUN).read_text(encoding="utf-8"))
    others = {
        "version": replace(run, version="0.0.9"),
        "torch": replace(run, torch="1.0"),
        "data": replace(run, data=run.data * 2),
    }
    laid({**files(done), RUN: others[name].to_json().encode()}, tmp_path)
    words = {
        "version": "differs: lnr-prune: 0.0.9, now",
        "torch": "differs: torch: 1.0, now",
        "data": "differs: 2 processes, now 1",
    }
    with pytest.raises(ValueError, match=words[name]):
        mine(tmp_path)


def test_what_does_not_change_the_result_may_change(done: Path, expected: Any) -> None:
    again = mine(done, data=iter(DATA), progress=lambda text: None)
    assert runs.same(again, of("lasso", expected))
    model, _ = runs.network("lasso")
    lnr.prune(model, [(batch, 7) for batch in DATA], lnr.Keep(0.5), into="model", run=lnr.Run(work=str(done)))
    assert runs.same({**again, "state": model.state_dict()}, of("lasso", expected))


@pytest.mark.parametrize("made", ["file", "link", "folder"])
def test_a_folder_with_something_else_in_it_is_refused(made: str, tmp_path: Path) -> None:
    work, other = tmp_path / "work", tmp_path / "precious"
    other.write_text("kept", encoding="utf-8")
    work.mkdir()
    if made == "file":
        (work / "notes.txt").write_text("kept", encoding="utf-8")
    elif made == "link":
        mine(work)
        stored = next(work.glob("moments*"))
        stored.unlink()
        stored.symlink_to(other)
    else:
        (work / "inner").mkdir()
    with pytest.raises(ValueError, match="which no prune wrote: give a new or an empty folder"):
        mine(work)
    assert other.read_text(encoding="utf-8") == "kept"


def test_one_run_at_a_time(tmp_path: Path, expected: Any) -> None:
    """Neither another process nor another call in this one; all others wait for nothing."""
    codes, wanted = list[int | None](), of("lasso", expected)

    def meanwhile(doing: str) -> None:
        if not codes:
            with pytest.raises(
                LnrPruneError, match="in use by another run: wait until it ends, or give another folder"
            ):
                mine(tmp_path)
            codes.append(ended(started(runs.alone, "lasso", tmp_path, tmp_path.parent / "out")))
            assert runs.same(mine(tmp_path.parent / "other"), wanted)
            mine(None, amount=lnr.Keep(0.4))  # leaves no trace here

    assert runs.same(mine(tmp_path, progress=meanwhile), wanted)
    assert codes == [1]
    assert runs.same(mine(tmp_path), wanted)


def test_the_lock_does_not_outlive_its_process(tmp_path: Path) -> None:
    """Workers of a data loader live a little longer than a process that is killed."""
    child = started(runs.forking, tmp_path / "lock")
    assert ended(child) == -9
    worker = int((tmp_path / "lock.worker").read_text(encoding="ascii"))
    try:
        os.kill(worker, 0)  # it lives
        with locked(tmp_path / "lock"):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_loader_that_shuffles_is_refused(tmp_path: Path, expected: Any) -> None:
    samples: Any = torch.cat(DATA)
    with pytest.raises(CalibrationError, match=r"not what it was in the first pass.*list\(loader\)"):
        mine(tmp_path / "a", DataLoader(samples, batch_size=6, shuffle=True))
    torch.manual_seed(0)
    loader: DataLoader[Tensor] = DataLoader(samples, batch_size=6, shuffle=True)
    first = mine(tmp_path / "b", list(loader))
    torch.manual_seed(0)
    assert runs.same(mine(tmp_path / "b", list(loader)), first)
    with pytest.raises(ValueError, match="other calibration data"):
        mine(tmp_path / "b", list(loader))


class Shrinking:
    """Has a batch less in every pass."""

    def __init__(self) -> None:
        self.left = len(DATA)

    def __iter__(self) -> Iterator[Tensor]:
        self.left -= 1
        return iter(DATA[: self.left])


def test_a_pass_that_lacks_batches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="of the calibration data is not what it was"):
        mine(tmp_path, Shrinking())


NO_ROOM = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("at", [1, 4, 10, 14])
@pytest.mark.parametrize("write", ["lnr_prune.runtime.stored.save_file", "os.fsync", "os.replace"])
def test_a_write_that_fails(
    write: str, at: int, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        owner, name = (os, write[3:]) if write.startswith("os.") else owner_of(write)
        patch.setattr(owner, name, failing(at, NO_ROOM, getattr(owner, name)))
        with pytest.raises(OSError, match=r"cannot be written: No space left.*free some space.*continues") as caught:
            mine(tmp_path)
        assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.glob(".*"))
    assert runs.same(mine(tmp_path), of("lasso", expected))


@pytest.mark.parametrize("made", ["file", "below a file", "lock is a link", "full"])
def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: Counter[str]
) -> None:
    work = tmp_path / "work"
    kinds: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
        "file": (work.touch, ValueError, "is a file: give a folder"),
        "below a file": ((tmp_path / "work").touch, OSError, "cannot be written: Not a directory"),
        "lock is a link": (lambda: (work / LOCK).symlink_to(tmp_path / "x"), OSError, "cannot be written: Too"),
        "full": (lambda: monkeypatch.setattr(os, "fsync", failing(1, NO_ROOM, os.fsync)), OSError, "No space left"),
    }
    prepare, kind, words = kinds[made]
    if "lock" in made:
        work.mkdir()
    prepare()
    with pytest.raises(kind, match=words):
        mine(work / "inner" if made == "below a file" else work)
    assert not +counted
    with locked(tmp_path / LOCK):
        pass


@pytest.mark.parametrize("folder", [7, b"work", ["work"]])
def test_a_work_that_is_no_path(folder: Any) -> None:
    with pytest.raises(TypeError, match="work must be the path of a folder, or None, got"):
        mine(folder)


def test_files_of_killed_runs_are_cleared_away(tmp_path: Path) -> None:
    mine(tmp_path)
    (tmp_path / ".lnr-prune-0123.part").write_bytes(b"half")
    mine(tmp_path)
    assert not list(tmp_path.glob(".*"))


@contextmanager
def kept(folder: Path) -> Iterator[Work]:
    """Work of a run that has this folder."""
    model = nn.Linear(2, 2)
    identity = Identity.of(model, dict(model.named_parameters()), [], {})
    with opened_folder(folder, lambda: identity, ALONE) as opened:
        yield Work(folder=opened)


def test_values_come_back_as_they_were(tmp_path: Path) -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    moments = SecondMoments.of(x, x.new_empty(3, 0))
    value = ({"a": moments, "b": SecondMoments.of(x[:, 1:], x[:, :0])}, float("inf"), None, "λ", x.T, x, x[0])
    kind: Any = tuple[dict[str, SecondMoments], float, int | None, str, Tensor, Tensor, Tensor]
    with kept(tmp_path) as work:
        work.remembered("value", kind, lambda: value)
        back = work.remembered("value", kind, lambda: pytest.fail("is there"))
        assert back[1:4] == value[1:4]
        for name in "ab":
            for one, other in zip(vars(back[0][name]).values(), vars(value[0][name]).values(), strict=True):
                assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))
        assert all(torch.equal(one, other) for one, other in zip(back[4:], value[4:], strict=True))
        for dtype in (torch.bool, torch.bfloat16, torch.float16, torch.int64, torch.complex64):
            tensor = torch.ones(2, 1, dtype=dtype).expand(2, 3)
            work.remembered(str(dtype), Tensor, tensor.detach)
            again = work.remembered(str(dtype), Tensor, lambda: pytest.fail("is there"))
            assert again.dtype == dtype
            assert torch.equal(again, tensor)


class Trap:
    """A pickle that tells when it is loaded."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return EXECUTED.append, ("pickle",)


EXECUTED: list[str] = []
FORGED: dict[str, tuple[str, str, dict[str, Tensor]]] = {
    "another type": ('"text"', "", {}),
    "a tensor that is not there": ("[0, 1.0]", "", {}),
    "a number below zero": ("[-1, 1.0]", "cpu", {"0": torch.ones(2)}),
    "too few devices": ("[0, 1.0]", "", {"0": torch.ones(2)}),
    "an unknown device": ("[0, 1.0]", "elsewhere", {"0": torch.ones(2)}),
    "an accelerator": ("[0, 1.0]", "xpu:7", {"0": torch.ones(2)}),
    "another name": ("[0, 1.0]", "cpu", {"x": torch.ones(2)}),
    "no JSON": ("__import__('os').system('x')", "", {}),
    "deep": ("[" * 10**5, "", {}),
    "code": ('{"__reduce__": ["os.system", "x"]}', "", {}),
}


@pytest.mark.parametrize("what", [*FORGED, "a pickle", "a pipe"])
def test_forged_files_are_computed_anew(what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Even with checksums that are right."""
    kind: Any = tuple[Tensor, float]
    with kept(tmp_path) as work:
        assert work.folder is not None
        work.remembered("value", kind, lambda: (torch.zeros(2), 2.0))
        (path,) = tmp_path.glob("value*")
        if what == "a pickle":
            path.write_bytes(pickle.dumps(Trap()))
        elif what == "a pipe":
            path.unlink()
            os.mkfifo(path)
        else:
            text, devices, tensors = FORGED[what]
            digest = digest_of({str(i): tensor for i, tensor in enumerate(tensors.values())})
            checksum = sha256(json.dumps([work.folder.owner("value"), text, devices, digest]))
            save_file(tensors, path, {"value": text, "devices": devices, "sha256": checksum})
        tensor, number = work.remembered("value", kind, lambda: (torch.ones(2), 3.0))
        assert (tensor.tolist(), number) == ([1.0, 1.0], 3.0)
        assert "is damaged and will be computed again" in " ".join(warnings_in(caplog))
        assert work.remembered("value", kind, lambda: (torch.zeros(2), 4.0))[1] == 3.0
    assert not EXECUTED


def test_snapshots_are_seldom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    snapshots(monkeypatch, 5.0, 20)
    written = list[int]()
    with kept(tmp_path) as work:
        for step in range(60):
            work.keep("steps", step)
            if work.snapshot("steps", int) == step:
                written.append(step)
        work.drop("steps")
        assert work.snapshot("steps", int) is None
    assert written == [4, 24, 44]  # after 5 seconds, then every 20 times the second that one takes


def test_a_sweep_has_a_folder_for_every_point(tmp_path: Path, counted: Counter[str]) -> None:
    amounts = [lnr.Keep(0.6), lnr.Keep(0.4)]
    first = lnr.sweep(MODEL, DATA, amounts, run=lnr.Run(work=tmp_path))
    counted.clear()
    again = lnr.sweep(MODEL, DATA, amounts, run=lnr.Run(work=str(tmp_path)))
    assert not +counted
    assert [point.report for point in first.points] == [point.report for point in again.points]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(
        "import torch\ndef net():\n    torch.manual_seed(0)\n    return torch.nn.Sequential(torch.nn.Linear(5, 8), "
        "torch.nn.ReLU(), torch.nn.Linear(8, 3))\n",
        encoding="utf-8",
    )
    np.save("x.npy", np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32))
    options = ["prune", "nets.py:net", "--data", "x.npy", "--work", "work", "--out", "m.safetensors"]
    assert CliRunner().invoke(main.app, [*options, "--keep", "0.5"]).exit_code == 0
    assert list(Path("work").glob("refit-of-2.weight*"))
    Path("m.safetensors").unlink()
    with locked(Path("work") / LOCK):
        refused = CliRunner().invoke(main.app, [*options, "--keep", "0.5"])
    assert refused.exit_code == 1
    assert "work is in use by another run" in refused.output
    assert CliRunner().invoke(main.app, [*options, "--keep", "0.4"]).exit_code == 2
    assert not Path("m.safetensors").exists()
    assert CliRunner().invoke(main.app, [*options, "--keep", "0.5"]).exit_code == 0
    assert Path("m.safetensors").exists()


def ranked(count: int, name: str, folder: Path, at: int = 0) -> list[int | None]:
    processes = [started(runs.together, rank, count, name, folder, at) for rank in range(count)]
    return [ended(process) for process in processes]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no torch.distributed")
@pytest.mark.parametrize("name", ["lasso", "budget"][: 1 + (KILLS >= 50)])
def test_processes_that_prune_together_go_on_together(name: str, tmp_path: Path) -> None:
    """The first rank, whose folder it is, is killed at every few files."""
    assert ranked(2, name, tmp_path / "whole") == [0, 0]
    whole = torch.load(tmp_path / "rank-0", weights_only=False)
    for rank in range(2):
        (tmp_path / f"rank-{rank}").unlink()
    made = list[int]()
    for at in (3, 4, 5):
        assert ranked(2, name, tmp_path / "work", at) == [-9, 0]
        assert "rank 1 has lost the others" in (tmp_path / "error-1").read_text(encoding="utf-8")
        made.append(len(list((tmp_path / "work").glob("*.safetensors"))))
    assert made == [2, 5, 9]
    assert ranked(2, name, tmp_path / "work") == [0, 0]
    for rank in range(2):
        assert runs.same(torch.load(tmp_path / f"rank-{rank}", weights_only=False), whole)
    assert ranked(2, "logits", tmp_path / "work") == [0, 0]
    for rank in range(2):
        said = (tmp_path / f"error-{rank}").read_text(encoding="utf-8")
        assert "rank 0: ValueError: the work folder" in said
        assert "logits: None, now True" in said

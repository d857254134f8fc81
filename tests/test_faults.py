"""Faults at any place: the error arrives, and nothing else is left of the attempt."""

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lnr_prune as lnr
from lnr_prune.errors import CalibrationError, GraphError, LnrPruneError
from lnr_prune.settings import Amount
from tests.helpers.faults import failing, owner_of
from tests.helpers.models import randomised
from tests.helpers.untouched import Untouched

IMAGES = torch.randn(16, 2, 6, 6, generator=torch.Generator().manual_seed(0))
OUT_OF_MEMORY = RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")


def net() -> nn.Sequential:
    layers = [
        nn.Conv2d(2, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 8),
        nn.ReLU(),
        nn.Linear(8, 3),
    ]
    return randomised(nn.Sequential(*layers))


class FaultError(Exception):
    """No error that the library knows."""


class Breaking:
    """Batches that can be gone through again; it fails at the n-th batch that is read, counted over all passes."""

    def __init__(self, at: int, error: BaseException) -> None:
        self.at, self.error, self.read = at, error, 0

    def __iter__(self) -> Iterator[Tensor]:
        for batch in IMAGES.split(4):
            self.read += 1
            if self.read == self.at:
                raise self.error
            yield batch

    def __len__(self) -> int:
        return 4


@pytest.fixture
def model() -> nn.Module:
    model = net().train()
    model[1].eval()
    return model


@pytest.fixture
def untouched(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Untouched:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return Untouched(model, tmp_path)


def batches_read(amount: Amount) -> int:
    data = Breaking(-1, FaultError())
    with torch.random.fork_rng():
        lnr.prune(net(), data, amount)
    return data.read


@pytest.mark.parametrize("into", ["copy", "model"])
def test_an_exception_at_any_batch(into: str, model: nn.Module, untouched: Untouched) -> None:
    last = batches_read(lnr.Keep(0.5))
    assert last > 8  # at least two passes
    for at in range(1, last + 1):
        with pytest.raises(FaultError):
            lnr.prune(model, Breaking(at, FaultError()), lnr.Keep(0.5), into=into)
        untouched.check()


@pytest.mark.parametrize("error", [FaultError(), OUT_OF_MEMORY, MemoryError(), KeyboardInterrupt()])
def test_an_exception_in_the_middle_of_a_search(error: BaseException, model: nn.Module, untouched: Untouched) -> None:
    budget = lnr.Budget(params=0.5, effort=lnr.Effort(search=2))
    for at in (2, 6, batches_read(budget)):
        with pytest.raises(type(error)):
            lnr.prune(model, Breaking(at, error), budget)
        untouched.check()


STEPS = [
    "lnr_prune.collapse.trial.find_groups",
    "lnr_prune.collapse.trial.copied",
    "lnr_prune.collapse.trial.shrinkable",
    "lnr_prune.calibration.moments.SecondMoments.with_rows",
    "lnr_prune.calibration.reading.gather",
    "lnr_prune.lasso.path.solve",
    "lnr_prune.lasso.problem.GroupLasso.error",
    "lnr_prune.refit.fit.ridge_regression",
    "lnr_prune.refit.refit.target_of",
    "lnr_prune.calibration.adapter.AdaptedLayer.write",
    "lnr_prune.calibration.adapter.AdaptedLayer.inputs",
    "lnr_prune.collapse.plan.make_plan",
    "lnr_prune.collapse.plan.fingerprint",
    "lnr_prune.prune.output_error",
    "lnr_prune.collapse.remove.collapse",
    "lnr_prune.collapse.verify.Reference.check",
    "lnr_prune.selection.costs.cost.side_by_side",
]
ONLY_OF_COPIES = ("lnr_prune.collapse.trial.copied", "lnr_prune.selection.costs.cost.side_by_side")


def break_at(path: str, error: BaseException, patch: pytest.MonkeyPatch) -> None:
    """Lets the first call of a function fail."""
    owner, name = owner_of(path)
    patch.setattr(owner, name, failing(1, error, getattr(owner, name)))


@pytest.mark.parametrize("into", ["copy", "model"])
@pytest.mark.parametrize("step", STEPS)
def test_an_exception_in_any_step(
    step: str, into: str, model: nn.Module, untouched: Untouched, monkeypatch: pytest.MonkeyPatch
) -> None:
    if into == "model" and step in ONLY_OF_COPIES:
        pytest.skip("has no part in shrinking the model itself")
    for error in (FaultError(), OUT_OF_MEMORY):
        with monkeypatch.context() as patch:
            break_at(step, error, patch)
            with pytest.raises((type(error), CalibrationError, GraphError)):
                lnr.prune(model, IMAGES.split(4), lnr.Keep(0.5), into=into)
        untouched.check()


def test_out_of_memory_in_a_layer_says_what_to_do(
    model: nn.Module, untouched: Untouched, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = set()
    for at in range(1, 12):
        with monkeypatch.context() as patch:
            patch.setattr(nn.Conv2d, "forward", failing(at, OUT_OF_MEMORY, nn.Conv2d.forward))
            try:
                lnr.prune(model, IMAGES.split(4), lnr.Keep(0.5))
            except LnrPruneError as error:
                errors.add((type(error), str(error).rpartition(": ")[2]))
        untouched.check()
    assert errors == {(CalibrationError, "give smaller batches"), (GraphError, "give smaller batches")}


WRITES = ["lnr_prune.collapse.files.save_file", "os.fsync", "os.chmod", "os.replace"]


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("write", WRITES)
def test_an_exception_in_a_write(write: str, existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pruned = lnr.prune(net(), IMAGES, lnr.Keep(0.5))
    path = tmp_path / "pruned.safetensors"
    if existing:
        path.write_bytes(b"as it was")
    before = Untouched(pruned.model, tmp_path)
    with monkeypatch.context() as patch:
        break_at(write, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), patch)
        with pytest.raises(OSError, match="No space left"):
            pruned.save(path)
    before.check()
    assert not existing or path.read_bytes() == b"as it was"
    pruned.save(path)
    assert isinstance(lnr.load(path, net()), nn.Sequential)


@pytest.mark.parametrize("step", ["lnr_prune.collapse.apply.collapse", "lnr_prune.collapse.apply.replace_tensors"])
@pytest.mark.parametrize("into", ["copy", "model"])
def test_an_exception_while_a_file_is_loaded(
    step: str, into: str, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lnr.prune(model, IMAGES, lnr.Keep(0.5)).save(tmp_path / "pruned.safetensors")
    before = Untouched(model, tmp_path)
    with monkeypatch.context() as patch:
        break_at(step, FaultError(), patch)
        with pytest.raises(FaultError):
            lnr.load(tmp_path / "pruned.safetensors", model, into=into)
    before.check()

"""Faults at any place: the error arrives, and nothing else is left of the attempt."""

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lnr_prune as lnr
from lnr_prune.errors import CalibrationError, GraphError, LnrPruneError
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


def failing(at: int, error: BaseException, real: Callable[..., Any]) -> Callable[..., Any]:
    """The function, but its n-th call fails."""
    calls = []

    def function(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            raise error
        return real(*args, **kwargs)

    return function


@pytest.fixture
def model() -> nn.Module:
    model = net().train()
    model[1].eval()
    return model


@pytest.fixture
def untouched(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Untouched:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return Untouched(model, tmp_path)


def batches_read(**options: Any) -> int:
    data = Breaking(-1, FaultError())
    with torch.random.fork_rng():
        lnr.prune(net(), data, **options)
    return data.read


@pytest.mark.parametrize("inplace", [False, True])
def test_an_exception_at_any_batch(inplace: bool, model: nn.Module, untouched: Untouched) -> None:
    last = batches_read(keep=0.5)
    assert last > 8  # at least two passes
    for at in range(1, last + 1):
        with pytest.raises(FaultError):
            lnr.prune(model, Breaking(at, FaultError()), lnr.Keep(0.5), into="model" if inplace else "copy")
        untouched.check()


@pytest.mark.parametrize("error", [FaultError(), OUT_OF_MEMORY, MemoryError(), KeyboardInterrupt()])
def test_an_exception_in_the_middle_of_a_search(error: BaseException, model: nn.Module, untouched: Untouched) -> None:
    budget = lnr.Budget(params=0.5, effort=lnr.Effort(search=2))
    for at in (2, 6, batches_read(budget=budget)):
        with pytest.raises(type(error)):
            lnr.prune(model, Breaking(at, error), budget)
        untouched.check()


STEPS = [
    "lnr_prune.prune.find_groups",
    "lnr_prune.prune.copied",
    "lnr_prune.prune.shrinkable",
    "lnr_prune.statistics.SecondMoments.with_rows",
    "lnr_prune.supports.gather",
    "lnr_prune.path.solve",
    "lnr_prune.problem.GroupLasso.error",
    "lnr_prune.target.ridge_regression",
    "lnr_prune.target._moments",
    "lnr_prune.registry.AdaptedLayer.write",
    "lnr_prune.registry.AdaptedLayer.inputs",
    "lnr_prune.prune.make_plan",
    "lnr_prune.prune.fingerprint",
    "lnr_prune.prune.output_error",
    "lnr_prune.prune.collapse",
    "lnr_prune.verify.Reference.check",
    "lnr_prune.cost.side_by_side",
]


def owner_of(path: str) -> tuple[Any, str]:
    """The module or class, and the name in it."""
    owner, name = path.rsplit(".", 1)
    try:
        return import_module(owner), name
    except ImportError:
        return getattr(*owner_of(owner)), name


def break_at(path: str, error: BaseException, patch: pytest.MonkeyPatch) -> None:
    """Lets the first call of a function fail."""
    owner, name = owner_of(path)
    patch.setattr(owner, name, failing(1, error, getattr(owner, name)))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_an_exception_in_any_step(
    step: str, inplace: bool, model: nn.Module, untouched: Untouched, monkeypatch: pytest.MonkeyPatch
) -> None:
    if inplace and step in ("lnr_prune.prune.copied", "lnr_prune.cost.side_by_side"):
        pytest.skip("has no part in pruning in place")
    for error in (FaultError(), OUT_OF_MEMORY):
        with monkeypatch.context() as patch:
            break_at(step, error, patch)
            with pytest.raises((type(error), CalibrationError, GraphError)):
                lnr.prune(model, IMAGES.split(4), lnr.Keep(0.5), into="model" if inplace else "copy")
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


WRITES = ["save_file", "os.fsync", "os.chmod", "os.replace"]


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("write", WRITES)
def test_an_exception_in_a_write(write: str, existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pruned = lnr.prune(net(), IMAGES, lnr.Keep(0.5))
    path = tmp_path / "pruned.safetensors"
    if existing:
        path.write_bytes(b"as it was")
    before = Untouched(pruned.model, tmp_path)
    with monkeypatch.context() as patch:
        owner, name = (os, write[3:]) if write.startswith("os.") else (files, write)
        patch.setattr(owner, name, failing(1, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), getattr(owner, name)))
        with pytest.raises(OSError, match="No space left"):
            pruned.save(path)
    before.check()
    assert not existing or path.read_bytes() == b"as it was"
    pruned.save(path)
    assert isinstance(lnr.load(path, net()), nn.Sequential)


@pytest.mark.parametrize("step", ["lnr_prune.shrink.collapse", "lnr_prune.shrink.replace_tensors"])
@pytest.mark.parametrize("inplace", [False, True])
def test_an_exception_while_a_file_is_loaded(
    step: str, inplace: bool, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lnr.prune(model, IMAGES, lnr.Keep(0.5)).save(tmp_path / "pruned.safetensors")
    before = Untouched(model, tmp_path)
    with monkeypatch.context() as patch:
        break_at(step, FaultError(), patch)
        with pytest.raises(FaultError):
            lnr.load(tmp_path / "pruned.safetensors", model, into="model" if inplace else "copy")
    before.check()

"""What a prune needs is known before it starts, and is refused with advice where it is not there."""

import inspect
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

import lnr_prune as lnr
from lnr_prune import memory
from lnr_prune.calibration import calibrate
from lnr_prune.graph import find_groups, named_tensors
from lnr_prune.memory import COPIES, available_memory, memory_plan
from lnr_prune.supports import paired, read
from tests.models import Functional, Residual, cnn, mlp

X = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
HIDDEN = (300, 200, 100)


def planned(model: nn.Module, x: torch.Tensor, bias: bool) -> tuple[memory.MemoryPlan, int]:
    """The plan, and the bytes that the second moments take."""
    groups = find_groups(model, (x,), {}).groups
    pairs = {group.name: [paired(consumer, bias) for consumer in group.consumers] for group in groups}
    readings = read(model, groups, calibrate(model, x), bias=bias)
    sums = {id(m.xx): m.xx.nbytes for reading in readings.values() for m in reading.moments}
    return memory_plan(pairs, named_tensors(model)), sum(sums.values())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("model", "shape"),
    [(mlp(8, 12, 9, 4), (8,)), (cnn(), (2, 12, 12)), (Residual(), (3, 8, 8)), (Functional(), (5,))],
)
def test_the_bytes_of_the_statistics_are_those_that_are_used(
    model: nn.Module, shape: tuple[int, ...], bias: bool
) -> None:
    plan, used = planned(model, torch.randn(6, *shape), bias)
    assert plan.statistics == used
    assert plan.total == used + plan.solve


def test_the_largest_group_counts() -> None:
    plan, _ = planned(mlp(8, *HIDDEN, 4), X, bias=False)
    assert plan.largest == "0"
    assert plan.layers == {"2.weight": 8 * 300**2, "4.weight": 8 * 200**2, "6.weight": 8 * 100**2}
    assert plan.solve == 8 * ((COPIES - 1) * 300**2 + 3 * 200 * 300)


def available(count: int | None, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(inspect.unwrap(lnr.prune).__globals__, "available_memory", lambda _: count)


def test_too_little_memory_is_refused_before_the_data_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp(8, *HIDDEN, 4)
    plan, _ = planned(model, X, bias=True)
    read_so_far = []

    class Watched(list[torch.Tensor]):
        def __iter__(self):  # type: ignore[no-untyped-def]
            for batch in super().__iter__():
                read_so_far.append(1)
                yield batch

    available(plan.total - 1, monkeypatch)
    message = r"needs 0.0\d+ GB.*group '0'.*are available.*largest: '2'.*prune a few groups at a time: keep=\{name"
    with pytest.raises(lnr.LnrPruneError, match=message):
        lnr.prune(model, Watched(X.split(10)), keep=0.5)
    assert len(read_so_far) == 1  # the example
    lnr.prune(model, X, keep={"4": 10})
    available(1000, monkeypatch)
    with pytest.raises(lnr.LnrPruneError, match="leave that group whole"):
        lnr.prune(model, X, keep=0.5)
    for enough in (plan.total, None):
        available(enough, monkeypatch)
        lnr.prune(model, X, keep={"4": 10})


def test_the_plan_is_stated(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lnr_prune")
    lnr.prune(mlp(8, 12, 4), X, keep=0.5)
    assert "for the second moments of 1 layers" in caplog.text
    assert "to solve group '0'); available: " in caplog.text


def test_available_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = available_memory(torch.device("cpu"))
    assert found is None or 2**20 < found < 2**50
    assert memory._of_group(tmp_path) is None
    for name, text in {"max": "1000", "current": "700", "stat": "anon 500\ninactive_file 150\nactive_file 50"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert memory._of_group(tmp_path) == 500
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._of_group(tmp_path) is None
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "nothing")
    assert available_memory(torch.device("cpu")) is None

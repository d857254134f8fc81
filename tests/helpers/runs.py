"""What the processes of `test_work` do: a prune with a work folder, which may be killed on the way."""

import os
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

import lnr_prune as lnr
from lnr_prune.calibration import rows
from lnr_prune.runtime import work
from lnr_prune.runtime.disk import locked
from lnr_prune.runtime.processes import Ranks
from tests.helpers.models import Functional, Residual, cnn, mlp, randomised

BATCHES = (6, 4, 9, 5, 8, 4)
AMOUNTS: dict[str, dict[str, Any]] = {  # arguments of a prune
    "lasso": {"amount": lnr.Keep(0.5)},
    "penalty": {"amount": lnr.Penalty(ratio=0.1), "refit": lnr.Refit(ridge=1e-3)},
    "backward": {"amount": lnr.Keep({"0": 3, "10": 0.5}), "selector": lnr.Backward(swaps=8), "logits": True},
    "random": {"amount": lnr.Keep(0.6), "selector": lnr.Random(seed=3), "refit": None},
    "budget": {"amount": lnr.Budget(macs=0.3, effort=lnr.Effort(search=4)), "selector": "backward"},
    "logits": {"amount": lnr.Budget(params=0.5, effort=lnr.Effort(search=2)), "logits": True},
    "graph": {"amount": lnr.Keep(0.5), "into": "graph"},
    "residual": {"amount": lnr.Budget(params=0.6)},
    "repeated": {"amount": lnr.Keep(0.5)},
    "batch norm": {"amount": lnr.Keep(0.5)},
    "tandem": {"amount": lnr.Keep(0.5), "refit": lnr.Refit(window=2, iterations=3)},
    "bfloat16": {"amount": lnr.Keep(0.5)},
}


def drawn(*shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randn(sum(BATCHES), *shape, generator=generator).split(BATCHES))


def network(name: str) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    if name == "residual":
        return randomised(Residual()), drawn(3, 8, 8)
    if name in ("batch norm", "tandem"):  # whose running means take up the intercepts
        first, second = (nn.Conv2d(2, 8, 3, 2, bias=False), nn.Conv2d(8, 6, 3, bias=False))
        layers = [first, nn.BatchNorm2d(8), nn.ReLU(), second, nn.BatchNorm2d(6), nn.ReLU()]
        return randomised(nn.Sequential(*layers, nn.Flatten(), nn.Linear(54, 3))), drawn(2, 12, 12)
    if name == "repeated":
        return randomised(Functional()), drawn(5)
    if name == "bfloat16":
        return randomised(mlp(7, 12, 10, 3)).bfloat16(), [batch.bfloat16() for batch in drawn(7)]
    return randomised(cnn()), drawn(2, 12, 12)


def result(pruned: lnr.Pruned) -> dict[str, Any]:
    """All that a run ends with but the latencies, as plain data and tensors."""
    report = {name: value for name, value in pruned.report.to_dict().items() if not name.startswith("latency")}
    return {"plan": pruned.plan.indices, "report": report, "state": pruned.model.state_dict(), "masked": pruned.masked}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """To the last bit."""
    tensors = all(
        one[kind].keys() == other[kind].keys()
        and all(torch.equal(tensor, other[kind][key]) for key, tensor in one[kind].items())
        for kind in ("state", "masked")
    )
    return tensors and one["plan"] == other["plan"] and one["report"] == other["report"]


def pruned(name: str, folder: Path | None, progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """What a run ends with, of this process's part of the data."""
    model, data = network(name)
    per_column = rows.ROWS_PER_COLUMN
    rows.ROWS_PER_COLUMN = 2 if name == "budget" else per_column  # which rows: that depends on the sample
    try:
        mine = Ranks.of_process_group().shard(data)
        return result(lnr.prune(model, mine, run=lnr.Run(work=folder, progress=progress), **AMOUNTS[name]))
    finally:
        rows.ROWS_PER_COLUMN = per_column


def dying(at: int, when: str, real: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """``os.replace``, of which the n-th call ends the process, before or after."""
    calls = []

    def replace(source: Any, target: Any) -> None:
        calls.append(1)
        if len(calls) == at and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    return replace


def alone(name: str, folder: Path, out: Path, at: int = 0, when: str = "after") -> None:
    """Prunes; the result is saved. With ``at`` the process is killed at its n-th file."""
    prepare()
    setattr(os, "replace", dying(at, when, os.replace))  # noqa: B010  (mypy takes no assignment)
    torch.save(pruned(name, folder), out)


def together(rank: int, ranks: int, name: str, folder: Path, at: int = 0) -> None:
    """The same, on several ranks; the work folder is the first one's."""
    prepare()
    meeting = folder.parent / f"meeting-{name}-{at}"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    setattr(os, "replace", dying(at, "after", os.replace))  # noqa: B010
    try:
        torch.save(pruned(name, folder if rank == 0 else Path("nowhere")), folder.parent / f"rank-{rank}")
    except lnr.LnrPruneError as error:
        (folder.parent / f"error-{rank}").write_text(str(error), encoding="utf-8")
    dist.destroy_process_group() if at == 0 else os._exit(0)  # a broken group has nothing to say to the others


def prepare() -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    work.SECONDS, work.SHARE = 0.0, 0  # a snapshot after every batch


def forking(lock: Path) -> None:
    """Holds a lock, has a child, and is killed."""
    with locked(lock):
        child = os.fork()
        if child == 0:
            time.sleep(3600)  # the test ends it
            os._exit(0)
        lock.with_suffix(".worker").write_text(str(child), encoding="ascii")
        os.kill(os.getpid(), signal.SIGKILL)

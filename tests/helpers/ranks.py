"""What the processes of `test_distributed` do: every case in turn, in one process group."""

import os
import signal
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lnr_prune as lnr
from lnr_prune.calibration import rows
from lnr_prune.calibration.adapter import AdaptedLayer, find
from lnr_prune.calibration.data import calibrate
from lnr_prune.calibration.gather import gather
from lnr_prune.calibration.moments import SecondMoments
from lnr_prune.graph.groups import find_groups
from lnr_prune.runtime import processes
from lnr_prune.selection import memory
from tests.helpers.models import Residual, cnn, mlp, randomised

SIZES = (5, 3, 8, 2, 7, 4, 6, 9)  # of the batches
PRUNED: dict[str, dict[str, Any]] = {
    "lasso": {"keep": 0.5},
    "search": {"budget": lnr.Budget(params=0.5, effort=lnr.Effort(search=3))},
    "penalty": {"lam_ratio": 0.1, "ridge": 1e-3},
    "random": {"keep": 0.6, "selector": "random", "seed": 3},
    "tandem": {"keep": 0.4, "tandem": 3},
    "not refitted": {"keep": 0.5, "selector": "backward", "debias": False},
}
FEW = ("lasso", "search", "tandem", "some rows")  # for more than two ranks


def network(kind: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomised(kind()).double().requires_grad_(False)


def batches(*shape: int) -> list[Tensor]:
    drawn = torch.randn(sum(SIZES), *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return list(drawn.split(SIZES))


def uneven(data: list[Tensor]) -> list[Tensor]:
    """One batch for every rank but the last, which gets all others."""
    last = processes.rank() == processes.ranks() - 1
    return data[processes.rank() :] if last else data[processes.rank() : processes.rank() + 1]


def result(pruned: lnr.Pruned) -> tuple[Any, ...]:
    return pruned.plan.indices, dict(pruned.masked), pruned.report.error


def pruned_cases(share: Callable[[list[Tensor]], Any], names: Collection[str] | None = None) -> dict[str, Any]:
    """What one process gives too, with ``share=list``."""
    images = batches(2, 12, 12)

    def pruned(amount: dict[str, Any]) -> lnr.Pruned:
        return lnr.prune(network(cnn), share(images), **amount)

    cases: dict[str, Callable[[], lnr.Pruned]] = {name: partial(pruned, PRUNED[name]) for name in PRUNED}
    cases["few batches"] = lambda: lnr.prune(network(cnn), share(images[-3:]), lnr.Keep(0.5))
    cases["a stream"] = lambda: lnr.prune(network(cnn), iter(uneven(images)), lnr.Keep(0.5))
    cases["residual"] = lambda: lnr.prune(network(Residual), share(batches(3, 8, 8)), lnr.Keep(0.5))
    results = {name: result(case()) for name, case in cases.items() if names is None or name in names}
    per_column, rows.ROWS_PER_COLUMN = rows.ROWS_PER_COLUMN, 2
    results["some rows"] = result(lnr.prune(network(cnn), uneven(images), lnr.Keep(0.5)))
    rows.ROWS_PER_COLUMN = per_column
    turn, memory.TURN = memory.TURN, 0
    for name in ("low memory", "low memory, search") if names is None else ():
        amount = PRUNED["search" if "search" in name else "lasso"]
        results[name] = result(lnr.prune(network(cnn), share(images), run=lnr.Run(low_memory=True), **amount))
    memory.TURN = turn
    return results


class Branching(nn.Module):
    """Goes through its second layer for some batches only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        return self.last(self.second(y) if len(x) == 7 else y)


def branched(share: Callable[[list[Tensor]], Any]) -> dict[str, SecondMoments]:
    model, data = network(Branching), batches(4)
    layers = find_groups(model, (data[4],), {}).layers
    return gather(
        model, {layer.weight: AdaptedLayer(layer, find(layer)) for layer in layers}, calibrate(model, share(data))
    )


def failing(nth: int, fail: Callable[[], Any], which: int = 1) -> Iterator[Tensor]:
    for index, batch in enumerate(processes.shard(batches(5))):
        if processes.rank() == which and index == nth:
            fail()
        yield batch


class Shard:
    """Batches of which one rank's fail, anew in every pass from a certain one on."""

    def __init__(self, passes: int, fail: Callable[[], Any]) -> None:
        self.left, self.fail = passes, fail

    def __iter__(self) -> Iterator[Tensor]:
        self.left -= 1
        yield from failing(0, self.fail) if self.left < 0 else processes.shard(batches(5))


def damaged() -> None:
    raise OSError("a damaged file")


def not_a_number(*, everywhere: bool = False) -> list[Tensor]:
    data = processes.shard(batches(5))
    if processes.rank() == 1 or everywhere:
        data[1][0, 0] = torch.nan
    return list(data)


def mine(model: nn.Module, data: Any, **amount: Any) -> lnr.Pruned:
    return lnr.prune(model, data, **(amount or {"keep": 0.5}))


def sharded(model: nn.Module) -> nn.Module:
    fully_shard(model, mesh=init_device_mesh("cpu", (processes.ranks(),)))
    return model


def failures() -> dict[str, Callable[[], Any]]:
    net, data, rank = network(lambda: mlp(5, 12, 9, 3)), batches(5), processes.rank()
    return {
        "not a number": lambda: mine(net, not_a_number()),
        "not a number anywhere": lambda: mine(net, not_a_number(everywhere=True)),
        "an exception in the data": lambda: mine(net, failing(1, damaged)),
        "an exception in the first pass": lambda: mine(net, Shard(1, damaged)),
        "an exception in the refit": lambda: mine(net, Shard(2, damaged)),
        "an empty shard": lambda: mine(net, data if rank == 0 else []),
        "another shape": lambda: mine(net, data if rank == 0 else batches(6)),
        "other weights": lambda: mine(network(lambda: mlp(5, 12, 9, 3), seed=rank), data),
        "other arguments": lambda: mine(net, data, keep=3 + rank),
        "wrong arguments": lambda: mine(net, data, keep=-1),
        "sharded": lambda: mine(sharded(mlp(5, 12, 3)), data),
        "wrapped": lambda: mine(DistributedDataParallel(mlp(5, 12, 3)), data),
        "wrapped inside": lambda: mine(nn.Sequential(DistributedDataParallel(mlp(5, 12, 3)), nn.ReLU()), data),
    }


def outcome(case: Callable[[], Any]) -> Any:
    try:
        return case()
    except Exception as error:  # to be looked at by the test
        return type(error).__name__, str(error)


def work(rank: int, ranks: int, folder: Path) -> None:
    """All cases; what each gives is saved under the rank's number."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    results: dict[str, Any] = {"pruned": pruned_cases(processes.shard, None if ranks == 2 else FEW)}
    if ranks == 2:
        results["branched"] = branched(processes.shard)
        results["failed"] = {name: outcome(case) for name, case in failures().items()}
        with processes.alone():
            results["alone"] = result(mine(network(cnn), batches(2, 12, 12)))
    torch.save(results, folder / str(rank))
    dist.destroy_process_group()


def end(rank: int, ranks: int, folder: Path, how: str, passes: int) -> None:
    """One rank is killed or sleeps; how long it took the others to notice, and what they raised."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    limit = timedelta(seconds=6 if how == "sleeps" else 60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks, timeout=limit)

    def fail() -> None:
        (folder / "time").write_text(str(time.time()), encoding="utf-8")
        if how == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(10)

    raised = outcome(lambda: mine(network(lambda: mlp(5, 12, 9, 3)), Shard(passes, fail)))
    torch.save((time.time() - float((folder / "time").read_text(encoding="utf-8")), raised), folder / str(rank))
    os._exit(0)  # a broken process group has nothing to say to the others

"""What the processes of `test_processes` do: every case in turn, in one process group."""

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
from lnr_prune.calibration.data import calibrate
from lnr_prune.calibration.gather import gather
from lnr_prune.calibration.moments import SecondMoments
from lnr_prune.runtime.processes import Ranks
from lnr_prune.runtime.work import Work
from lnr_prune.selection.costs import memory
from tests.helpers.layers import layers_of
from tests.helpers.models import Residual, cnn, mlp, randomised

SIZES = (5, 3, 8, 2, 7, 4, 6, 9)  # of the batches
HALF = lnr.Keep(0.5)


def of_first(model: nn.Module) -> float:
    """A metric for which the ranks have different numbers: the first one's counts."""
    if dist.is_initialized() and dist.get_rank() > 0:
        return float("nan")
    return float(sum(parameter.numel() for parameter in model.parameters()) > 500)


FEWER = lnr.Effort(refits=0)
PRUNED: dict[str, dict[str, Any]] = {  # arguments of a prune
    "lasso": {"amount": HALF},
    "search": {"amount": lnr.Budget(params=0.5, effort=lnr.Effort(search=3))},
    "penalty": {"amount": lnr.Penalty(ratio=0.1), "refit": lnr.Refit(ridge=1e-3)},
    "random": {"amount": lnr.Keep(0.6), "selector": lnr.Random(seed=3)},
    "tandem": {"amount": lnr.Keep(0.4), "refit": lnr.Refit(window=2, iterations=3)},
    "tolerance": {"amount": lnr.Tolerance(of_first, evaluations=3, effort=FEWER), "selector": "norm"},
    "agreement": {"amount": lnr.Tolerance(drop=0.2, evaluations=3, effort=FEWER), "selector": "norm"},
    "not refitted": {"amount": HALF, "selector": "backward", "refit": None},
}
NEVER = timedelta(days=1)  # no test takes so long
FEW = ("lasso", "search", "tandem", "some rows")  # for more than two ranks


def network(kind: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomised(kind()).double().requires_grad_(False)


def batches(*shape: int) -> list[Tensor]:
    drawn = torch.randn(sum(SIZES), *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return list(drawn.split(SIZES))


def uneven(data: list[Tensor], ranks: Ranks) -> list[Tensor]:
    """One batch for every rank but the last, which gets all others."""
    return data[ranks.rank :] if ranks.rank == ranks.size - 1 else data[ranks.rank : ranks.rank + 1]


def result(pruned: lnr.Pruned) -> tuple[Any, ...]:
    return pruned.plan.indices, dict(pruned.masked), pruned.report.error


def pruned_cases(ranks: Ranks, names: Collection[str] | None = None) -> dict[str, Any]:
    """What many ranks give, each with its shard, and what one gives alone."""
    images = batches(2, 12, 12)

    def pruned(options: dict[str, Any]) -> lnr.Pruned:
        return lnr.prune(network(cnn), ranks.shard(images), **options)

    cases: dict[str, Callable[[], lnr.Pruned]] = {name: partial(pruned, PRUNED[name]) for name in PRUNED}
    cases["few batches"] = lambda: lnr.prune(network(cnn), ranks.shard(images[-3:]), lnr.Keep(0.5))
    cases["a stream"] = lambda: lnr.prune(network(cnn), iter(uneven(images, ranks)), lnr.Keep(0.5))
    cases["residual"] = lambda: lnr.prune(network(Residual), ranks.shard(batches(3, 8, 8)), lnr.Keep(0.5))
    results = {name: result(case()) for name, case in cases.items() if names is None or name in names}
    per_column, rows.ROWS_PER_COLUMN = rows.ROWS_PER_COLUMN, 2
    results["some rows"] = result(lnr.prune(network(cnn), uneven(images, ranks), lnr.Keep(0.5)))
    rows.ROWS_PER_COLUMN = per_column
    of_a_pass, memory.PASS = memory.PASS, 0
    for name in ("low memory", "low memory, search") if names is None else ():
        options = PRUNED["search" if "search" in name else "lasso"]
        results[name] = result(pruned({**options, "run": lnr.Run(low_memory=True)}))
    memory.PASS = of_a_pass
    return results


class Branching(nn.Module):
    """Goes through its second layer for some batches only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        return self.last(self.second(y) if len(x) == 7 else y)


def branched(ranks: Ranks) -> dict[str, SecondMoments]:
    model, data = network(Branching), batches(4)
    found = gather(model, layers_of(model, data[4]), calibrate(model, ranks.shard(data)), Work(ranks))
    return {name: halves.whole for name, halves in found.items()}


def failing(nth: int, fail: Callable[[], Any], ranks: Ranks) -> Iterator[Tensor]:
    """The rank's batches; the second rank's n-th fails."""
    for index, batch in enumerate(ranks.shard(batches(5))):
        if ranks.rank == 1 and index == nth:
            fail()
        yield batch


class Shard:
    """Batches of which the second rank's fail, anew in every pass from a certain one on."""

    def __init__(self, passes: int, fail: Callable[[], Any], ranks: Ranks) -> None:
        self.left, self.fail, self.ranks = passes, fail, ranks

    def __iter__(self) -> Iterator[Tensor]:
        self.left -= 1
        yield from failing(0, self.fail, self.ranks) if self.left < 0 else self.ranks.shard(batches(5))


def damaged() -> None:
    raise OSError("a damaged file")


def not_a_number(ranks: Ranks, *, everywhere: bool = False) -> list[Tensor]:
    data = list(ranks.shard(batches(5)))
    if ranks.rank == 1 or everywhere:
        data[1][0, 0] = torch.nan
    return data


def mine(model: nn.Module, data: Any, amount: lnr.Keep = HALF, **options: Any) -> lnr.Pruned:
    return lnr.prune(model, data, amount, **options)


def sharded(model: nn.Module, ranks: Ranks) -> nn.Module:
    fully_shard(model, mesh=init_device_mesh("cpu", (ranks.size,)))
    return model


def failures(ranks: Ranks) -> dict[str, Callable[[], Any]]:
    net, data, rank = network(lambda: mlp(5, 12, 9, 3)), batches(5), ranks.rank
    return {
        "not a number": lambda: mine(net, not_a_number(ranks)),
        "not a number anywhere": lambda: mine(net, not_a_number(ranks, everywhere=True)),
        "an exception in the data": lambda: mine(net, failing(1, damaged, ranks)),
        "an exception in the first pass": lambda: mine(net, Shard(1, damaged, ranks)),
        "an exception in the refit": lambda: mine(net, Shard(2, damaged, ranks)),
        "an empty shard": lambda: mine(net, data if rank == 0 else []),
        "another shape": lambda: mine(net, data if rank == 0 else batches(6)),
        "other weights": lambda: mine(network(lambda: mlp(5, 12, 9, 3), seed=rank), data),
        "other arguments": lambda: mine(net, data, lnr.Keep(3 + rank)),
        "an unknown argument": lambda: mine(net, data, into="thin air"),
        "an unknown layer": lambda: mine(net, data, lnr.Keep({"nowhere": 3})),
        "sharded": lambda: mine(sharded(mlp(5, 12, 3), ranks), data),
        "wrapped": lambda: mine(DistributedDataParallel(mlp(5, 12, 3)), data),
        "wrapped inside": lambda: mine(nn.Sequential(DistributedDataParallel(mlp(5, 12, 3)), nn.ReLU()), data),
    }


def outcome(case: Callable[[], Any]) -> Any:
    try:
        return case()
    except Exception as error:  # to be looked at by the test
        return type(error).__name__, str(error)


def joined(rank: int, size: int, folder: Path, timeout: timedelta = NEVER) -> Ranks:
    """The process group, once all processes are there: none waits for another that is only slow to start."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    (folder / f"here-{rank}").touch()
    until(lambda: len(list(folder.glob("here-*"))) == size)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size, timeout=timeout)
    return Ranks.of_process_group()


def until(there: Callable[[], bool]) -> None:
    """Waits; the test ends a process that waits for ever."""
    while not there():
        time.sleep(0.01)


def all_cases(rank: int, size: int, folder: Path) -> None:
    """What each gives is saved under the rank's number."""
    ranks = joined(rank, size, folder)
    results: dict[str, Any] = {"pruned": pruned_cases(ranks, None if size == 2 else FEW)}
    if size == 2:
        results["branched"] = branched(ranks)
        results["failed"] = {name: outcome(case) for name, case in failures(ranks).items()}
        results["alone"] = result(mine(network(cnn), batches(2, 12, 12), run=lnr.Run(alone=True)))
    torch.save(results, folder / str(rank))
    dist.destroy_process_group()


def lost(rank: int, size: int, folder: Path, how: str, passes: int) -> None:
    """The second rank is killed, or sleeps until the first one has given it up; what the others raised is saved."""
    ranks = joined(rank, size, folder, timedelta(seconds=6) if how == "sleeps" else NEVER)

    def fail() -> None:
        if how == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        until((folder / "0").exists)

    raised = outcome(lambda: mine(network(lambda: mlp(5, 12, 9, 3)), Shard(passes, fail, ranks)))
    torch.save(raised, folder / str(rank))
    os._exit(0)  # a broken process group has nothing to say to the others

"""What `test_memory` measures, on its own: ``python -m tests.helpers.peaks [[SIZES,SELECTOR,BIAS,ITERATIONS],...]``."""

import gc
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lnr_prune.calibration import outputs
from lnr_prune.calibration.data import calibrate
from lnr_prune.calibration.outputs import outputs_of
from lnr_prune.calibration.reading import read
from lnr_prune.collapse.masks import Supports
from lnr_prune.graph.groups import find_groups
from lnr_prune.graph.module import named_tensors
from lnr_prune.refit.network import refit_network
from lnr_prune.refit.refit import Refit
from lnr_prune.selection.amount import Keep
from lnr_prune.selection.costs.memory import memory_plan
from lnr_prune.selection.select import select, supports_of
from lnr_prune.selection.selectors import SELECTORS, Backward
from tests.helpers.models import mlp

STATUS = Path("/proc/self/status")
CHOOSING = {**SELECTORS, "backward_swap": Backward(swaps=8)}


def resident(field: str) -> int:
    """Bytes in memory: "VmRSS", now, or "VmHWM", at most since the last reset."""
    line = next(line for line in STATUS.read_text(encoding="ascii").splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


@contextmanager
def peak(found: Callable[[int], Any]) -> Iterator[None]:
    """Tells how much more than at the beginning was in memory at most."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = resident("VmRSS")
    yield
    found(resident("VmHWM") - before)


def measured(sizes: list[int], selector: str, bias: bool, iterations: int = 0) -> dict[str, int]:
    """Bytes that selection and refit take, and those that the plan says.

    Args:
        sizes: Of the layers.
        selector: Name of the selector, of those in `CHOOSING`.
        bias: Whether the layers have biases.
        iterations: In which two layers are refitted together; 0 = each is by itself.
    """
    torch.manual_seed(0)
    model, found = mlp(*sizes, bias=bias), dict[str, int]()
    x = torch.randn(sizes[1], sizes[0])
    graph, data, tensors = find_groups(model, (x,), {}), calibrate(model, x.split(64)), named_tensors(model)
    refit = Refit(window=2, iterations=iterations) if iterations else Refit()
    plan = memory_plan(graph, graph.groups, tensors, bias=bias, refit=refit)

    def supports() -> Supports:
        readings = read(model, graph.groups, data, bias=bias)
        return supports_of(select([readings], Keep(0.9).choices(graph, CHOOSING[selector]), tensors))

    with peak(lambda count: found.update(selection=count)):
        kept = supports()
    with peak(lambda count: found.update(refit=count)):
        refit_network(model, graph, kept, data, settings=refit, repeated={}, bias=bias)
    return {**found, "planned_selection": plan.at_once + plan.solve, "planned_refit": plan.refit}


def verified() -> list[int]:
    """Bytes that the outputs of a model of 20 MB in float64 take: its copies at once, and one by one."""
    model, x, found = mlp(*[500] * 11), torch.randn(2, 500), list[int]()
    for outputs.TOGETHER in (2**30, 0):
        with peak(found.append):
            outputs_of(model, {}, ((x,), {}), wide=True, training=False)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    measured([8, 12, 4], "group_lasso", True)  # what torch sets up at first does not count
    sys.stdout.write(
        json.dumps({"pruned": [measured(*case) for case in json.loads(sys.argv[1])], "verified": verified()})
    )

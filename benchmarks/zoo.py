"""Every architecture of a model zoo: its channel groups, and pruned == masked in float64.

Random weights; 30 % of the channels of every group removed at random; one process a model, so that none can hang
the others or leave memory behind:

    python benchmarks/zoo.py --set torchvision --json rows.json
    python benchmarks/zoo.py --set torchvision --only resnet50,vit_b_16
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from lnr_prune.calibration import Call
from lnr_prune.collapse import collapse
from lnr_prune.cost import parameters
from lnr_prune.errors import LnrPruneError
from lnr_prune.graph import find_groups, named_tensors
from lnr_prune.plan import make_plan
from lnr_prune.recipes.data import import_torchvision
from lnr_prune.verify import Reference, masked_weights, random_weights, shrinkable

REMOVED = 0.3
LIMIT = 180  # seconds a model
QUICK = 4  # models of a quick run


@dataclass(frozen=True)
class Row:
    """One model; shares are fractions of its parameters."""

    model: str
    groups: int = 0
    refused: int = 0  # groups whose sizes the module's forward holds
    reachable: float = 0.0  # share in groups of the graph
    in_module: float = 0.0  # share in groups that the module itself can lose
    kept: float = 1.0
    graph_seconds: float = 0.0
    seconds: float = 0.0
    result: str = ""


def torchvision_models() -> dict[str, Callable[[], tuple[nn.Module, Call]]]:
    """Name -> how to make a classifier of torchvision, or a segmentation model, and an example call."""
    models = import_torchvision().models

    def make(name: str) -> tuple[nn.Module, Call]:
        options: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        segments = name in models.list_models(module=models.segmentation)
        if segments:
            options["weights_backbone"] = None
        size = 299 if name == "inception_v3" else 224
        return models.get_model(name, weights=None, **options), ((torch.randn(1, 3, size, size),), {})

    names = models.list_models(module=models) + models.list_models(module=models.segmentation)
    return {name: lambda name=name: make(name) for name in names}  # type: ignore[misc]


SETS = {"torchvision": torchvision_models}


def measure(name: str, make: Callable[[], tuple[nn.Module, Call]]) -> Row:
    """Groups, trial, random removal and verification of one model."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    begin = time.perf_counter()
    model, call = make()
    model.eval()
    started = time.perf_counter()
    graph = find_groups(model, *call)
    row = Row(name, groups=len(graph.groups), graph_seconds=time.perf_counter() - started)
    row = replace(row, reachable=_share(model, graph.groups))
    groups, _ = shrinkable(model, graph.groups, call)
    row = replace(row, refused=len(graph.groups) - len(groups), in_module=_share(model, groups))
    generator = torch.Generator().manual_seed(0)
    supports: list[tuple[Any, Tensor]] = []
    for group in groups:
        support = torch.ones(group.size, dtype=torch.bool)
        support[torch.randperm(group.size, generator=generator)[: max(1, int(REMOVED * group.size))]] = False
        supports.append((group, support))
    weights = random_weights(model)
    masked = {**weights, **masked_weights(supports, weights)}
    before, reference = parameters(model), Reference(model, masked, call)
    collapse(model, make_plan(supports), masked)
    reference.check(model)
    result = "exact" if reference.wide else "exact in the model's dtype"
    return replace(row, kept=parameters(model) / before, seconds=time.perf_counter() - begin, result=result)


def _share(model: nn.Module, groups: tuple[Any, ...]) -> float:
    tensors = named_tensors(model)
    trained = {name for name, _ in model.named_parameters()}
    reached = {name for group in groups for name, _ in group.slots} & trained
    return sum(tensors[name].numel() for name in reached) / parameters(model)


def _child(chosen: str, name: str) -> None:
    try:
        row = measure(name, SETS[chosen]()[name])
    except LnrPruneError as error:
        row = Row(name, result=f"{type(error).__name__}: {error}")
    sys.stdout.write(json.dumps(asdict(row)) + "\n")


def _in_a_process(chosen: str, name: str, limit: float) -> Row:
    command = [sys.executable, __file__, "--set", chosen, "--child", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return Row(name, seconds=limit, result=f"not done in {limit:.0f} s")
    if done.returncode:
        return Row(name, result=f"died: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else '?'}")
    return Row(**json.loads(done.stdout.splitlines()[-1]))


def _print(rows: list[Row]) -> None:
    table = Table(box=box.MARKDOWN)
    titles = ("model", "groups", "refused", "reachable", "in module", "kept", "graph s", "s", "result")
    for index, title in enumerate(titles):
        table.add_column(title, justify="left" if index in (0, 8) else "right")
    for row in rows:
        shares = (f"{share:.3f}" for share in (row.reachable, row.in_module, row.kept))
        table.add_row(
            row.model, str(row.groups), str(row.refused), *shares, f"{row.graph_seconds:.1f}", f"{row.seconds:.0f}",
            row.result[:60],
        )  # fmt: skip
    console = Console(width=150)
    console.print(table)
    exact = sum(row.result.startswith("exact") for row in rows)
    console.print(f"exact: {exact} of {len(rows)}; refused groups: {sum(row.refused for row in rows)}")


def main(
    chosen: Annotated[str, typer.Option("--set", help=f"Which zoo: {', '.join(SETS)}.")] = "torchvision",
    only: Annotated[str, typer.Option(help="Models to run, comma-separated. Default: all.")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the rows.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help=f"The first {QUICK} models only.")] = False,
    data_root: Annotated[Path | None, typer.Option(help="Not used: the weights are random.")] = None,
    limit: Annotated[float, typer.Option(help="Seconds a model may take.")] = LIMIT,
    child: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Prunes every model of a zoo at random and compares it with the masked one."""
    if child:
        _child(chosen, child)
        return
    names = [name for name in only.split(",") if name] or list(SETS[chosen]())
    names = names[:QUICK] if quick else names
    console = Console(stderr=True)
    rows = [_in_a_process(chosen, name, limit) for name in track(names, "models", console=console, transient=True)]
    _print(rows)
    if json_file:
        json_file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)

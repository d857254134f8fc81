"""Every architecture of a model zoo: its channel groups, and pruned == masked in float64.

Random weights; 30 % of the channels of every group removed at random, from the module itself; where its forward
refuses a group, all groups are pruned as graph, too. One process a model, so that none can hang the others or leave
memory behind:

    python benchmarks/zoo.py --set torchvision --json rows.json
    python benchmarks/zoo.py --set timm --only resnest14d,swin_tiny_patch4_window7_224
    python benchmarks/zoo.py --set huggingface
"""

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
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
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.library.zoo_models import SETS, Zoo
from lnr_prune.calibration.calls import Call, run
from lnr_prune.collapse.collapse import collapse
from lnr_prune.collapse.graph_module import pruned_graph
from lnr_prune.collapse.masks import masked_weights, random_weights
from lnr_prune.collapse.plan import Plan, make_plan
from lnr_prune.collapse.trial import shrinkable
from lnr_prune.collapse.verify import Reference
from lnr_prune.graph.groups import ChannelGroup, find_groups
from lnr_prune.graph.module import named_tensors
from lnr_prune.graph.owners import along
from lnr_prune.selection.costs.cost import parameters

REMOVED = 0.3
LIMIT = 180  # seconds a model
QUICK = 4  # models of a quick run


@dataclass(frozen=True)
class Row:
    """One model; shares are fractions of its parameters."""

    model: str
    groups: int = 0
    graph: float | None = None  # with --graph-only: what masked channels still have to say, see _leftover
    refused: int = 0  # groups whose sizes the module's forward holds
    reachable: float = 0.0  # share in groups of the graph
    in_module: float = 0.0  # share in groups that the module itself can lose
    as_graph: float = 0.0  # share in groups that the model as graph lost; 0 where the module loses them all
    kept: float = 1.0
    graph_seconds: float = 0.0  # of one core, whatever else it does
    seconds: float = 0.0
    result: str = ""


def measure(name: str, zoo: Zoo, graph_only: bool) -> Row:
    """Groups, trial, random removal and verification of one model."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    begin = time.perf_counter()
    model, call = zoo.make(name)
    model.eval()
    started = time.process_time()
    graph = find_groups(model, *call)
    row = Row(name, groups=len(graph.groups), graph_seconds=time.process_time() - started)
    row = replace(row, reachable=_share(model, graph.groups))
    if graph_only:
        row = replace(row, graph=_leftover(model, graph.groups, call), seconds=time.perf_counter() - begin)
        return replace(row, result="graph only" if graph.groups else _why(graph.frozen))
    groups, fixed = shrinkable(model, graph.groups, call)
    row = replace(row, refused=len(graph.groups) - len(groups), in_module=_share(model, groups))
    result = "exact" if groups else _why(fixed or graph.frozen)
    if row.refused:
        result = f"{result}; all as graph" if groups else "exact as graph"
        pruned_graph(model, *_plan(model, graph.groups), call)  # raises where it differs
        row = replace(row, as_graph=row.reachable)
    plan, masked = _plan(model, groups)
    before, reference = parameters(model), Reference(model, masked, call)
    collapse(model, plan, masked)
    reference.check(model)
    if groups and not reference.wide:
        result += " (in the model's dtype)"
    return replace(row, kept=parameters(model) / before, seconds=time.perf_counter() - begin, result=result)


def _plan(model: nn.Module, groups: Sequence[ChannelGroup]) -> tuple[Plan, dict[str, Tensor]]:
    """30 % of every group removed, and the weights of the model that only masks them."""
    supports, weights = _supports(groups), random_weights(model)
    return make_plan(supports), {**weights, **masked_weights(supports, weights)}


def _why(frozen: Mapping[str, str]) -> str:
    reasons = Counter(reason.split(" (")[0] for reason in frozen.values())
    return f"nothing: {reasons.most_common(1)[0][0]}"


def _supports(groups: Sequence[ChannelGroup]) -> dict[ChannelGroup, Tensor]:
    generator = torch.Generator().manual_seed(0)
    supports = {}
    for group in groups:
        support = torch.ones(group.size, dtype=torch.bool)
        support[torch.randperm(group.size, generator=generator)[: max(1, int(REMOVED * group.size))]] = False
        supports[group] = support
    return supports


def _leftover(model: nn.Module, groups: Sequence[ChannelGroup], call: Call) -> float:
    """What channels that are masked still have to say: nothing, if the graph is right.

    Where the consumers' columns of dropped channels are zero, all else that leaves with them is scaled at random;
    returned is the largest change of the outputs, relative to the largest output. This needs no smaller module.
    """
    supports, generator = _supports(groups), torch.Generator().manual_seed(1)
    weights = {name: value.double() for name, value in random_weights(model).items()}
    weights |= masked_weights(supports, weights)
    before = _outputs(model, call, weights)
    for group, support in supports.items():
        leaves = ~torch.cat([support, torch.ones(1, dtype=torch.bool)])
        columns = {(consumer.weight, consumer.dim) for consumer in group.consumers}
        for (name, dim), channels in group.slots.items():
            if name in weights and (name, dim) not in columns:
                noise = torch.rand(weights[name].shape, generator=generator, dtype=torch.float64) + 0.5
                where = along(leaves[channels], dim, noise.shape)
                weights[name] = torch.where(where, weights[name] * noise, weights[name])
    after = _outputs(model, call, weights)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(before, after, strict=True))


def _outputs(model: nn.Module, call: Call, weights: Mapping[str, Tensor]) -> list[Tensor]:
    wide = tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, call)
    outputs = tree_leaves(run(model, wide, weights))
    return [x for x in outputs if isinstance(x, Tensor) and x.is_floating_point()]


def _share(model: nn.Module, groups: tuple[Any, ...]) -> float:
    tensors = named_tensors(model)
    trained = {name for name, _ in model.named_parameters()}
    reached = {name for group in groups for name, _ in group.slots} & trained
    return sum(tensors[name].numel() for name in reached) / parameters(model)


def _child(chosen: str, name: str, graph_only: bool) -> None:
    try:
        row = measure(name, SETS[chosen](), graph_only)
    except Exception as error:  # of any kind: it has its row all the same
        row = Row(name, result=f"{type(error).__name__}: {error}")
    sys.stdout.write(json.dumps(asdict(row)) + "\n")


def _in_a_process(chosen: str, name: str, limit: float, graph_only: bool) -> Row:
    command = [sys.executable, __file__, "--set", chosen, "--child", name, *(["--graph-only"] if graph_only else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return Row(name, seconds=limit, result=f"not done in {limit:.0f} s")
    if done.returncode:
        return Row(name, result=f"died: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else '?'}")
    return Row(**json.loads(done.stdout.splitlines()[-1]))


def _print(rows: list[Row]) -> None:
    table = Table(box=box.MARKDOWN)
    titles = (
        "model", "groups", "leftover", "refused", "reachable", "in module", "as graph", "kept", "graph s", "s", "result"
    )  # fmt: skip
    for title in titles:
        table.add_column(title, justify="left" if title in ("model", "result") else "right")
    for row in rows:
        shares = (f"{share:.3f}" for share in (row.reachable, row.in_module, row.as_graph, row.kept))
        table.add_row(
            row.model, str(row.groups), "" if row.graph is None else f"{row.graph:.0e}", str(row.refused), *shares,
            f"{row.graph_seconds:.1f}", f"{row.seconds:.0f}", row.result[:60],
        )  # fmt: skip
    console = Console(width=160)
    console.print(table)
    _summarise(console, rows)


def _summarise(console: Console, rows: list[Row]) -> None:
    exact = sum(row.result.startswith("exact") for row in rows)
    half, seconds = sum(row.reachable >= 0.5 for row in rows), sorted(row.graph_seconds for row in rows)
    console.print(
        f"exact: {exact} of {len(rows)}; graph wrong: {sum(not (row.graph or 0.0) <= 1e-9 for row in rows)}; half of "
        f"the parameters reachable: {half}; refused groups: {sum(row.refused for row in rows)}; "
        f"seconds for the graph: median {seconds[len(rows) // 2]:.1f}, worst {seconds[-1]:.1f}"
    )


def main(
    chosen: Annotated[str, typer.Option("--set", help=f"Which zoo: {', '.join(SETS)}.")] = "torchvision",
    only: Annotated[str, typer.Option(help="Models to run, comma-separated. Default: all.")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the rows.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help=f"The first {QUICK} models only.")] = False,
    data_root: Annotated[Path | None, typer.Option(help="Not used: the weights are random.")] = None,
    limit: Annotated[float, typer.Option(help="Seconds a model may take.")] = LIMIT,
    graph_only: Annotated[bool, typer.Option("--graph-only", help="Groups only; the module is not shrunk.")] = False,
    child: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Prunes every model of a zoo at random and compares it with the masked one."""
    if child:
        _child(chosen, child, graph_only)
        return
    names = [name for name in only.split(",") if name] or list(SETS[chosen]().names)
    names = names[:QUICK] if quick else names
    console = Console(stderr=True)
    rows: list[Row] = []
    for name in track(names, "models", console=console, transient=True):
        rows.append(_in_a_process(chosen, name, limit, graph_only))
        console.print(f"{name}: {rows[-1].result}, {rows[-1].seconds:.0f} s")
        if json_file:  # what is done is kept
            json_file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    _print(rows)


if __name__ == "__main__":
    typer.run(main)

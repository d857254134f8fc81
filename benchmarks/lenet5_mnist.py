"""LeNet-5 on real MNIST, pruned without retraining: lasso and backward elimination against norms and chance.

Calibrated on 5,000 training images without labels. Needs MNIST and ``weights/lenet5_mnist.safetensors`` in --data-root:

    python benchmarks/lenet5_mnist.py --data-root FOLDER --json rows.json
"""

import json
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import lnr_prune as lnr
from lnr_prune.recipes import data as datasets
from lnr_prune.recipes.data import Data
from lnr_prune.recipes.lenet5 import LeNet5, load_weights, predictions

CALIBRATION_IMAGES = 5_000
# Filters of conv1 and of conv2, rows of fc1.
SIZES: tuple[tuple[int, int, int], ...] = ((10, 25, 100), (8, 20, 60), (6, 16, 40), (5, 12, 30), (4, 9, 20))


@dataclass(frozen=True)
class Method:
    """How channels are chosen, whether their readers are refitted, and over which seeds to average."""

    selector: str
    refit: bool
    seeds: tuple[int, ...] = (0,)


METHODS = {
    "group_lasso": Method("group_lasso", refit=True),
    "backward": Method("backward", refit=True),
    "norm+refit": Method("norm", refit=True),
    "norm": Method("norm", refit=False),
    "random+refit": Method("random", refit=True, seeds=(0, 1, 2)),
    "random": Method("random", refit=False, seeds=(0, 1, 2)),
}


@dataclass(frozen=True)
class Row:
    """One method at one size; shares are fractions of the dense model, accuracies means over the method's seeds."""

    method: str
    selector: str
    refit: bool
    seeds: int
    sizes: str
    parameters: float
    macs: float
    accuracy: float
    agreement: float
    seconds: float


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write the rows to.")] = None,
    only: Annotated[str, typer.Option(help=f"Methods to run, of {', '.join(METHODS)}.")] = ",".join(METHODS),
    quick: Annotated[bool, typer.Option("--quick", help="One size, 500 calibration and 1,000 test images.")] = False,
    data_root: Annotated[
        Path | None, typer.Option(envvar=datasets.DATA_ENVIRONMENT, help="Folder of MNIST/ and weights/.")
    ] = None,
) -> None:
    """Prints one row a method and size."""
    names = [name.strip() for name in only.split(",")]
    if unknown := [name for name in names if name not in METHODS]:
        raise typer.BadParameter(f"unknown method {unknown[0]!r}, expected some of {', '.join(METHODS)}")
    try:
        mnist = datasets.load("mnist", data_root)
        model = load_weights(Path(data_root or "", "weights", "lenet5_mnist.safetensors"))
    except lnr.LnrPruneError as error:
        raise typer.BadParameter(str(error)) from error
    images, sizes = CALIBRATION_IMAGES, SIZES
    if quick:
        mnist = replace(mnist, test_images=mnist.test_images[:1000], test_labels=mnist.test_labels[:1000])
        images, sizes = 500, SIZES[1:2]
    calibration = mnist.train_images[:images].split(250)
    dense = predictions(model, mnist.test_images)
    console = Console(width=100)  # also in a pipe: the table does not fit the usual 80 columns
    cases = [(name, size) for size in sizes for name in names]
    rows = [
        measure(name, size, model, mnist, calibration, dense)
        for name, size in track(cases, console=Console(stderr=True), transient=True)
    ]
    console.print(table(rows, accuracy=share(dense, mnist.test_labels)))
    if json_file:
        json_file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


def measure(
    name: str,
    size: tuple[int, ...],
    model: LeNet5,
    mnist: Data,
    calibration: tuple[Tensor, ...],
    dense: Tensor,
) -> Row:
    """Prunes once a seed."""
    method = METHODS[name]
    keep = dict(zip(("conv1", "conv2", "fc1"), size, strict=True))
    accuracies, agreements, seconds = [], [], []
    for seed in method.seeds:
        begin = time.perf_counter()
        pruned = lnr.prune(
            model,
            calibration,
            lnr.Keep(keep),
            selector=lnr.Random(seed) if method.selector == "random" else method.selector,
            refit=lnr.Refit() if method.refit else None,
            run=lnr.Run(progress=False),
        )
        seconds.append(time.perf_counter() - begin)
        predicted = predictions(pruned.model, mnist.test_images)
        accuracies.append(share(predicted, mnist.test_labels))
        agreements.append(share(predicted, dense))
    report = pruned.report
    return Row(
        name,
        method.selector,
        method.refit,
        len(method.seeds),
        "-".join(map(str, size)),
        report.params_after / report.params_before,
        report.macs_after / report.macs_before,
        statistics.mean(accuracies),
        statistics.mean(agreements),
        statistics.mean(seconds),
    )


def share(predicted: Tensor, wanted: Tensor) -> float:
    """Fraction of equal entries."""
    return float((predicted == wanted).double().mean())


def table(rows: list[Row], accuracy: float) -> Table:
    """The rows, as a table that is also Markdown."""
    title = f"LeNet-5 on MNIST, no retraining; dense {accuracy:.2%}"
    result = Table(title=title, title_justify="left", box=box.MARKDOWN)
    for column in ("selector", "refit", "sizes"):
        result.add_column(column)
    for column in ("params %", "MACs %", "accuracy", "agreement", "seconds"):
        result.add_column(column, justify="right")
    for row in rows:
        selector = row.selector if row.seeds == 1 else f"{row.selector}, {row.seeds} seeds"
        shares = (f"{100 * x:.2f}" for x in (row.parameters, row.macs, row.accuracy, row.agreement))
        result.add_row(selector, "yes" if row.refit else "no", row.sizes, *shares, f"{row.seconds:.1f}")
    return result


if __name__ == "__main__":
    typer.run(main)

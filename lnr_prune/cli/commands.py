"""``lnr-prune inspect``, ``report``, ``bench`` and ``demo``."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from lnr_prune.calibration.calls import Call
from lnr_prune.calibration.data import calibrate
from lnr_prune.calibration.examples import short_example
from lnr_prune.cli.console import answering, check, command_line, title, write
from lnr_prune.cli.data import Source, batches, dtype_of, random_batch
from lnr_prune.cli.images import Look, look_of
from lnr_prune.cli.models import build
from lnr_prune.cli.options import (
    OUTPUT,
    Array,
    BatchSize,
    Column,
    Data,
    Device,
    Drop,
    Html,
    Json,
    Model,
    ModelArg,
    Saved,
    Seed,
    Shape,
    Tokens,
    Weights,
    shape_of,
)
from lnr_prune.collapse.files import load, report_of
from lnr_prune.inspection import inspect as inspect_model
from lnr_prune.recipes.demo import NETWORKS
from lnr_prune.recipes.demo import run as run_demo
from lnr_prune.report.html import percent
from lnr_prune.selection.costs import cost


def inspect(
    model: Model,
    model_arg: ModelArg = None,
    weights: Weights = None,
    device: Device = "cpu",
    shape: Shape = None,
    tokens: Tokens = None,
    data: Data = None,
    array: Array = None,
    column: Column = None,
    drop: Drop = None,
    batch_size: BatchSize = 2,
    seed: Seed = 0,
    draw: Annotated[
        Path | None,
        typer.Option(
            help="Draw the groups to a .dot file, or to .svg, .png or .pdf (needs graphviz).", rich_help_panel=OUTPUT
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show which channels of a model can be pruned, what they cost, and what stays whole and why.

    Nothing is pruned or written.
    """
    with answering(as_json) as say:
        net = build(model, model_arg or (), weights, device)
        inputs = Inputs(model, shape_of(shape), tokens, data, array or (), column or (), drop or (), seed)
        found = inspect_model(net, inputs.batch(net, batch_size))
        if draw is not None:
            found.draw(draw)
        say(found, asdict(found))


def report(saved: Saved, html: Html = None, as_json: Json = False) -> None:
    """Show what was done to a pruned model, from its file."""
    with answering(as_json) as say:
        found = report_of(saved)
        if html is not None:
            check({"--html": html}, {"PRUNED": saved})
            write(html, found.to_html(title=title(str(saved))))
        say(found, found.to_dict())


def demo(
    name: Annotated[str, typer.Argument(help=f"The network: {', '.join(NETWORKS)}.", show_default=False)],
    macs: Annotated[float, typer.Option(help="Share of the multiply-accumulates that is left.")] = 0.25,
    seed: Seed = 0,
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Train a small network on handwritten digits, prune it, and compare: done within seconds, nothing is needed."""
    with answering(as_json) as say:
        if html is not None:
            check({"--html": html}, {})
        found = run_demo(name, macs, seed=seed)
        if html is not None:
            write(html, found.to_html(title=title(name), command=command_line()))
        say(found, found.to_dict())


def bench(
    model: Model,
    saved: Saved,
    model_arg: ModelArg = None,
    weights: Weights = None,
    device: Device = "cpu",
    shape: Shape = None,
    tokens: Tokens = None,
    data: Data = None,
    array: Array = None,
    column: Column = None,
    drop: Drop = None,
    seed: Seed = 0,
    batch_size: Annotated[
        list[int] | None, typer.Option(min=1, help="Samples per forward pass; may be repeated. Default: 1 and 32.")
    ] = None,
    threads: Annotated[
        list[int] | None,
        typer.Option(min=1, help="CPU threads; may be repeated. Default: as many as torch uses."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Passes of each model; their median is reported.")] = 21,
    as_json: Json = False,
) -> None:
    """Compare a pruned model with its original: latency side by side, parameters, MACs."""
    with answering(as_json) as say:
        net = build(model, model_arg or (), weights, device)
        inputs = Inputs(model, shape_of(shape), tokens, data, array or (), column or (), drop or (), seed)
        example = inputs.batch(net, 2)
        models = [net, load(saved, build(model, model_arg or (), device=device), example=example)]
        call = short_example(net, calibrate(net, [example]))
        counts = {
            "parameters": [cost.parameters(each) for each in models],
            "macs": [cost.macs(each, call) for each in models],
            "bytes": [cost.size(each) for each in models],
        }
        runs = []
        for many in threads or [torch.get_num_threads()]:
            for of in batch_size or [1, 32]:
                timed = calibrate(net, [inputs.batch(net, of)]).example()
                original, pruned = _timed(models, timed, many, rounds)
                runs.append({"threads": many, "batch_size": of, "original": original, "pruned": pruned})
        say(_comparison(counts, runs), {**counts, "seconds": runs})


def _timed(models: list[torch.nn.Module], call: Call, threads: int, rounds: int) -> list[float]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return cost.side_by_side(models, call, rounds)
    finally:
        torch.set_num_threads(before)


def _comparison(counts: dict[str, list[int]], runs: list[dict[str, Any]]) -> Table:
    table = Table(title="original and pruned")
    table.add_column("")
    for column in ("original", "pruned", "share"):
        table.add_column(column, justify="right")
    for name, (before, after) in counts.items():
        table.add_row(name, f"{before:,}", f"{after:,}", percent(after / before) if before else "-")
    for run in runs:
        before, after = run["original"], run["pruned"]
        name = f"median time, {run['batch_size']} samples, {run['threads']} threads"
        table.add_row(name, f"{1e3 * before:.3g} ms", f"{1e3 * after:.3g} ms", percent(after / before))
    return table


@dataclass(frozen=True)
class Inputs:
    """The options that say what a model is called with."""

    model: str
    shape: tuple[int, ...] | None
    tokens: int | None
    data: Path | None
    array: Sequence[str]
    column: Sequence[str]
    drop: Sequence[str]
    seed: int

    def batch(self, net: torch.nn.Module, size: int) -> Any:
        """Inputs with ``size`` samples, random or from a file."""
        if self.data is None:
            return random_batch(net, size, self.shape, self.tokens, self.seed)
        look = look_of(net, self.model)[0] if self.data.is_dir() else Look()
        source = Source(self.data, size, size, self.seed, tuple(self.array), tuple(self.column), tuple(self.drop), look)
        return next(iter(batches(source, dtype_of(net))))

"""What the sub-commands of ``lnr-prune`` do, but for the recipe."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from lnr_prune import cost, inspection, page, samples
from lnr_prune import prune as pruning
from lnr_prune.calibration import Call, calibrate, short_example
from lnr_prune.errors import LnrPruneError
from lnr_prune.files import load, report_of
from lnr_prune.options import (
    AMOUNT,
    DATA,
    OUTPUT,
    Array,
    Device,
    Html,
    Json,
    Model,
    ModelArg,
    Shape,
    Tokens,
    Weights,
    amount,
    numbers,
    shape_of,
)
from lnr_prune.report import Report
from lnr_prune.samples import IMAGENET, Source
from lnr_prune.selection import SELECTORS
from lnr_prune.sources import build

Saved = Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A file that lnr-prune prune wrote.")]
Data = Annotated[
    Path | None,
    typer.Option(exists=True, help="Instead, inputs from a .npy, .npz or .safetensors file.", rich_help_panel=DATA),
]


def inspect(
    model: Model,
    model_arg: ModelArg = None,
    weights: Weights = None,
    shape: Shape = None,
    tokens: Tokens = None,
    data: Data = None,
    array: Array = None,
    draw: Annotated[
        Path | None,
        typer.Option(help="Draw the groups to a .dot file, or to .svg, .png, .pdf (needs graphviz).", rich_help_panel=OUTPUT),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show which channels of a model can be pruned, what they cost, and what stays whole and why.

    Nothing is pruned or written.

    \b
    lnr-prune inspect torchvision:resnet18 --shape 3,224,224
    lnr-prune inspect my_models.py:make_net --model-arg width=64 --shape 1,28,28
    """
    with _answering(as_json) as say:
        net = build(model, model_arg or (), weights)
        found = inspection.inspect(net, _batch(net, 2, shape, tokens, data, array))
        if draw is not None:
            found.draw(draw)
        say(found, asdict(found))


def prune(
    model: Model,
    data: Annotated[
        Path,
        typer.Option(
            exists=True,
            help="Unlabelled samples like those the model was trained on: a folder of images, a .npy, .npz or "
            ".safetensors file of inputs, or a text file with one sample a line (with --tokenizer).",
            rich_help_panel=DATA,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="The pruned model, as safetensors. Needed unless --dry-run.", rich_help_panel=OUTPUT),
    ] = None,
    model_arg: ModelArg = None,
    weights: Weights = None,
    device: Device = "cpu",
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help="Channels of every group: a fraction (0.5) or a count (8). Or LAYER=NUMBER, repeated as needed; "
            "other layers stay whole then.",
            rich_help_panel=AMOUNT,
        ),
    ] = None,
    lam: Annotated[
        list[str] | None, typer.Option(help="The penalty; or LAYER=NUMBER.", rich_help_panel=AMOUNT)
    ] = None,
    lam_ratio: Annotated[
        list[str] | None,
        typer.Option(
            help="The penalty as a fraction of the one that removes everything; or LAYER=NUMBER.", rich_help_panel=AMOUNT
        ),
    ] = None,
    params: Annotated[
        float | None, typer.Option(help="Budget: fraction of the parameters.", rich_help_panel=AMOUNT)
    ] = None,
    macs: Annotated[
        float | None, typer.Option(help="Budget: fraction of the multiply-accumulates.", rich_help_panel=AMOUNT)
    ] = None,
    budget_size: Annotated[float | None, typer.Option(help="Budget: fraction of the bytes.", rich_help_panel=AMOUNT)] = None,
    latency: Annotated[
        float | None, typer.Option(help="Budget: fraction of the measured time.", rich_help_panel=AMOUNT)
    ] = None,
    error: Annotated[
        float | None,
        typer.Option(
            help="Budget: as small as possible while the predicted relative squared error of the outputs stays below "
            "this.",
            rich_help_panel=AMOUNT,
        ),
    ] = None,
    round_to: Annotated[
        int | None, typer.Option(help="With a budget: keep multiples of so many channels.", rich_help_panel=AMOUNT)
    ] = None,
    minimum: Annotated[
        int | None, typer.Option(help="With a budget: channels that every group keeps at least.", rich_help_panel=AMOUNT)
    ] = None,
    leave: Annotated[
        list[str] | None,
        typer.Option(help="With a budget: a layer that keeps all its channels. May be repeated.", rich_help_panel=AMOUNT),
    ] = None,
    search: Annotated[
        int | None, typer.Option(help="With a budget: trials of a local search for better sizes.", rich_help_panel=AMOUNT)
    ] = None,
    selector: Annotated[
        str, typer.Option(help=f"How channels are chosen: {', '.join(SELECTORS)}.", rich_help_panel=AMOUNT)
    ] = "group_lasso",
    as_graph: Annotated[
        bool,
        typer.Option(
            "--as-graph",
            help="Make a graph for evaluation only, which also reaches channels whose number the forward holds.",
            rich_help_panel=AMOUNT,
        ),
    ] = False,
    count: Annotated[int, typer.Option("--samples", min=1, help="Samples that are used.", rich_help_panel=DATA)] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples a batch.", rich_help_panel=DATA)] = 32,
    array: Array = None,
    size: Annotated[int, typer.Option(min=1, help="Side that images are scaled and cropped to.", rich_help_panel=DATA)] = 224,
    mean: Annotated[
        str, typer.Option(help="Mean of the colours in [0, 1]; one number for grey images.", rich_help_panel=DATA)
    ] = ",".join(map(str, IMAGENET[0])),
    std: Annotated[
        str, typer.Option(help="Their standard deviation: as the model was trained.", rich_help_panel=DATA)
    ] = ",".join(map(str, IMAGENET[1])),
    tokenizer: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Folder of a Hugging Face tokenizer, for text.", rich_help_panel=DATA),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Longest text, in tokens.", rich_help_panel=DATA)] = 128,
    seed: Annotated[
        int, typer.Option(help="Of the samples and of the random selector: the same seed, the same result.", rich_help_panel=DATA)
    ] = 0,
    report_html: Html = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Do everything but write.", rich_help_panel=OUTPUT)
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a model smaller, verify it, and save it.

    The smaller model is an ordinary one: load it in Python with lnr_prune.load(FILE, a_new_model).

    \b
    Half the multiply-accumulates of a ResNet, calibrated on a folder of images:
      lnr-prune prune torchvision:resnet18 --weights resnet18.pth --data photos/ --macs 0.5 --out small.safetensors
    \b
    Half the channels of every layer of your own model:
      lnr-prune prune my_models.py:Net --weights net.pt --data inputs.npz --array x --keep 0.5 --out small.safetensors
    \b
    What would happen, as JSON:
      lnr-prune prune my_models.py:Net --weights net.pt --data inputs.npy --params 0.3 --dry-run --json
    """
    with _answering(as_json) as say:
        limits = {"params": params, "macs": macs, "size": budget_size, "latency": latency, "error": error}
        details = {"round_to": round_to, "minimum": minimum, "leave": tuple(leave or ()) or None, "search": search}
        wanted = amount({"keep": keep, "lam": lam, "lam_ratio": lam_ratio}, limits, **details)
        targets = {"--out": out, "--report-html": report_html}
        if not dry_run:
            if out is None:
                raise ValueError("where to? Give --out FILE.safetensors, or --dry-run to write nothing")
            _check(targets, {"--weights": weights, "--data": data})
        colours = numbers(mean, "--mean"), numbers(std, "--std")
        source = Source(
            data, count, batch_size, seed, tuple(array or ()), size, colours[0], colours[1], tokenizer, tokens
        )
        net = build(model, model_arg or (), weights).to(device)
        done = pruning.prune(
            net,
            samples.batches(source, samples.dtype_of(net)),
            **wanted,
            selector=selector,
            as_graph=as_graph,
            seed=seed,
            progress=None if sys.stderr.isatty() else _lines(),
        )
        written = {}
        if not dry_run and out is not None:
            done.save(out)
            written["out"] = str(out)
            if report_html is not None:
                _write(report_html, done.report.to_html(title=_title(model)))
                written["report_html"] = str(report_html)
        say(done.report, {**written, "report": done.report.to_dict()})
        if not as_json:
            for path in written.values():
                say(f"wrote {path}", None)


def report(saved: Saved, html: Html = None, as_json: Json = False) -> None:
    """Show what was done to a pruned model, from its file.

    \b
    lnr-prune report small.safetensors --html report.html
    """
    with _answering(as_json) as say:
        found: Report = report_of(saved)
        if html is not None:
            _check({"--html": html}, {"FILE": saved})
            _write(html, found.to_html(title=_title(saved.name)))
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
    batch_size: Annotated[
        list[int] | None, typer.Option(min=1, help="Samples a forward pass; may be repeated. Default: 1 and 32.")
    ] = None,
    threads: Annotated[
        list[int] | None, typer.Option(min=1, help="Threads of the processor; may be repeated. Default: torch's number.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Passes of each model, of which the median counts.")] = 21,
    as_json: Json = False,
) -> None:
    """Compare a pruned model with its original: latency side by side, parameters, MACs.

    \b
    lnr-prune bench torchvision:resnet18 small.safetensors --shape 3,224,224 --batch-size 1 --threads 1
    """
    with _answering(as_json) as say:
        net = build(model, model_arg or (), weights)
        example = _batch(net, 2, shape, tokens, data, array)
        models = [net.to(device), load(saved, build(model, model_arg or ()).to(device), example=example).to(device)]
        call = short_example(net, calibrate(net, [example]))
        counts = {
            "parameters": [cost.parameters(each) for each in models],
            "macs": [cost.macs(each, call) for each in models],
            "bytes": [cost.size(each) for each in models],
        }
        runs = []
        for many in threads or [torch.get_num_threads()]:
            for of in batch_size or [1, 32]:
                timed = calibrate(net, [_batch(net, of, shape, tokens, data, array)]).example()
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
        table.add_row(name, f"{before:,}", f"{after:,}", page.percent(after / before) if before else "-")
    for run in runs:
        before, after = run["original"], run["pruned"]
        name = f"median time, {run['batch_size']} samples, {run['threads']} threads"
        table.add_row(name, f"{1e3 * before:.3g} ms", f"{1e3 * after:.3g} ms", page.percent(after / before))
    return table


def _batch(
    net: torch.nn.Module, size: int, shape: str | None, tokens: int | None, data: Path | None, array: list[str] | None
) -> Any:
    """Inputs for so many samples, random or from a file."""
    if data is None:
        return samples.random_batch(net, size, shape_of(shape), tokens)
    source = Source(data, size, size, arrays=tuple(array or ()))
    return next(iter(samples.batches(source, samples.dtype_of(net))))


Say = Callable[[Any, Any], None]


@contextmanager
def _answering(as_json: bool) -> Iterator[Say]:
    """How results are said, and how errors end: 1 what the library refuses, 2 wrong usage, 130 interrupted."""
    stdout = sys.stdout

    def say(text: Any, data: Any) -> None:
        if as_json:
            stdout.write(json.dumps(data) + "\n")
        else:
            Console(file=stdout).print(text, soft_wrap=isinstance(text, str), highlight=False)

    try:
        with redirect_stdout(sys.stderr):  # whatever the user's code prints
            yield say
    except KeyboardInterrupt:
        typer.echo("interrupted: nothing was left half-written", err=True)
        raise typer.Exit(130) from None
    except (LnrPruneError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _lines() -> Callable[[str], None]:
    """Says what is being done where there is no terminal: one line a kind of step."""
    last = ""

    def show(doing: str) -> None:
        nonlocal last
        kind = doing.partition(" ")[0]
        if kind != last:
            typer.echo(f"{kind} ...", err=True)
            last = kind

    return show


def _check(targets: dict[str, Path | None], sources: dict[str, Path | None]) -> None:
    """Refuses early what could not be written after minutes of work."""
    for option, path in targets.items():
        if path is None:
            continue
        if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise ValueError(f"{option} {path}: expected a file in a folder that exists and can be written to")
        for other, source in sources.items():
            if source is not None and path.exists() and source.exists() and path.samefile(source):
                raise ValueError(f"{option} {path} would overwrite the file of {other}; name another one")


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _title(name: str) -> str:
    return f"{name}, pruned"

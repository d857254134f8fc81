"""``lnr-prune prune``."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from lnr_prune.cli.console import answering, check, lines, title, write
from lnr_prune.cli.data import IMAGENET, Source, batches, dtype_of
from lnr_prune.cli.models import build
from lnr_prune.cli.options import (
    AMOUNT,
    DATA,
    OUTPUT,
    Array,
    Device,
    Html,
    Json,
    Model,
    ModelArg,
    Weights,
    amount,
    numbers,
    refit_of,
    selector_of,
)
from lnr_prune.prune import prune as prune_model
from lnr_prune.runtime.processes import launched
from lnr_prune.runtime.run import Run
from lnr_prune.selection.selectors import SELECTORS


def prune(
    model: Model,
    *,
    model_arg: ModelArg = None,
    weights: Weights = None,
    device: Device = "cpu",
    data: Annotated[
        Path,
        typer.Option(
            exists=True,
            help="Unlabelled samples like those the model was trained on: a folder of images, a .npy, .npz or "
            ".safetensors file of inputs, or a text file with one sample per line (with --tokenizer).",
            rich_help_panel=DATA,
        ),
    ],
    array: Array = None,
    count: Annotated[int, typer.Option("--samples", min=1, help="Number of samples.", rich_help_panel=DATA)] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per batch.", rich_help_panel=DATA)] = 32,
    seed: Annotated[
        int,
        typer.Option(
            help="Seed of the samples and the random selector: the same seed, the same result.", rich_help_panel=DATA
        ),
    ] = 0,
    size: Annotated[
        int, typer.Option(min=1, help="Height and width of images, scaled and cropped.", rich_help_panel=DATA)
    ] = 224,
    mean: Annotated[
        str, typer.Option(help="Mean of the colours in [0, 1]; one number for grey images.", rich_help_panel=DATA)
    ] = ",".join(map(str, IMAGENET[0])),
    std: Annotated[
        str, typer.Option(help="Standard deviation of the colours, as in training.", rich_help_panel=DATA)
    ] = ",".join(map(str, IMAGENET[1])),
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False, help="Folder of a Hugging Face tokenizer, for text.", rich_help_panel=DATA
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Longest text in tokens.", rich_help_panel=DATA)] = 128,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help="Channels to keep in every group: a fraction (0.5) or a count (8). Or LAYER=NUMBER, repeated as "
            "needed; then other layers stay whole.",
            rich_help_panel=AMOUNT,
        ),
    ] = None,
    lam: Annotated[list[str] | None, typer.Option(help="The penalty; or LAYER=NUMBER.", rich_help_panel=AMOUNT)] = None,
    lam_ratio: Annotated[
        list[str] | None,
        typer.Option(
            help="The penalty, as a fraction of the penalty that removes everything; or LAYER=NUMBER.",
            rich_help_panel=AMOUNT,
        ),
    ] = None,
    params: Annotated[
        float | None, typer.Option(help="Budget: fraction of the parameters.", rich_help_panel=AMOUNT)
    ] = None,
    macs: Annotated[
        float | None, typer.Option(help="Budget: fraction of the multiply-accumulates.", rich_help_panel=AMOUNT)
    ] = None,
    budget_size: Annotated[
        float | None, typer.Option(help="Budget: fraction of the bytes.", rich_help_panel=AMOUNT)
    ] = None,
    latency: Annotated[
        float | None, typer.Option(help="Budget: fraction of the measured time.", rich_help_panel=AMOUNT)
    ] = None,
    error: Annotated[
        float | None,
        typer.Option(
            help="Budget: the smallest model whose predicted relative squared error of the outputs stays below this.",
            rich_help_panel=AMOUNT,
        ),
    ] = None,
    round_to: Annotated[
        int | None, typer.Option(help="With a budget: keep multiples of this many channels.", rich_help_panel=AMOUNT)
    ] = None,
    minimum: Annotated[
        int | None,
        typer.Option(help="With a budget: least number of channels in every group.", rich_help_panel=AMOUNT),
    ] = None,
    leave: Annotated[
        list[str] | None,
        typer.Option(
            help="With a budget: a layer that keeps all its channels. May be repeated.", rich_help_panel=AMOUNT
        ),
    ] = None,
    refits: Annotated[
        int | None,
        typer.Option(
            help="With a budget: number of groups whose errors are measured with all layers refitted.",
            rich_help_panel=AMOUNT,
        ),
    ] = None,
    search: Annotated[
        int | None,
        typer.Option(help="With a budget: trials in a local search for better sizes.", rich_help_panel=AMOUNT),
    ] = None,
    selector: Annotated[
        str, typer.Option(help=f"How channels are chosen: {', '.join(SELECTORS)}.", rich_help_panel=AMOUNT)
    ] = "group_lasso",
    swaps: Annotated[
        int | None,
        typer.Option(
            help="With --selector backward: dropped channels tried in place of kept ones.", rich_help_panel=AMOUNT
        ),
    ] = None,
    logits: Annotated[
        bool | None,
        typer.Option(
            "--logits/--no-logits",
            help="Whether the outputs are logits of classes, so that the refit fits probabilities. Default: automatic.",
            rich_help_panel=AMOUNT,
        ),
    ] = None,
    window: Annotated[
        int,
        typer.Option(
            help="Number of layers that are refitted together: 1, or 2 (a layer with the one that makes its inputs: "
            "slower, but better).",
            rich_help_panel=AMOUNT,
        ),
    ] = 1,
    iterations: Annotated[
        int | None, typer.Option(help="With --window 2: iterations. Default: 10.", rich_help_panel=AMOUNT)
    ] = None,
    into: Annotated[
        str,
        typer.Option(
            help="copy: a model of the same class. graph: a graph for evaluation only; it can also lose channels "
            "whose number is fixed in the forward.",
            rich_help_panel=AMOUNT,
        ),
    ] = "copy",
    low_memory: Annotated[
        bool,
        typer.Option(
            "--low-memory",
            help="Gather the statistics of a few layers at a time: slower, with less memory and the same result.",
            rich_help_panel=DATA,
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="File for the pruned model (safetensors). Needed unless --dry-run.", rich_help_panel=OUTPUT),
    ] = None,
    report_html: Html = None,
    work: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="Folder for intermediate results: after a crash, the same command continues from there.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Do everything except writing files.", rich_help_panel=OUTPUT)
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a model smaller, verify it, and save it.

    The smaller model is an ordinary one: load it in Python with lnr_prune.load(FILE, a_new_model).

    Several processes can share the samples: torchrun --nproc-per-node 4 -m lnr_prune prune ...
    """
    with answering(as_json) as say, launched(device) as (device, ranks):
        first = ranks.rank == 0
        wanted = amount(
            {"keep": keep, "lam": lam, "lam_ratio": lam_ratio},
            {"params": params, "macs": macs, "size": budget_size, "latency": latency, "error": error},
            {"round_to": round_to, "minimum": minimum, "leave": tuple(leave or ()) or None},
            {"refits": refits, "search": search},
        )
        if into == "model":
            raise ValueError("--into is copy or graph, got model: the command never changes the model that it reads")
        targets = {"--out": out, "--report-html": report_html}
        if first and not dry_run:
            if out is None:
                raise ValueError("there is no output file: give --out FILE.safetensors, or --dry-run to write nothing")
            check(targets, {"--weights": weights, "--data": data})
        colours = numbers(mean, "--mean"), numbers(std, "--std")
        source = Source(
            data, count, batch_size, seed, tuple(array or ()), size, colours[0], colours[1], tokenizer, tokens
        )
        net = build(model, model_arg or (), weights, device)
        shown = (None if sys.stderr.isatty() else lines()) if first else False
        done = prune_model(
            net,
            batches(source, dtype_of(net), ranks),
            wanted,
            selector=selector_of(selector, swaps, seed),
            refit=refit_of(window, iterations),
            logits=logits,
            into=into,
            run=Run(work, low_memory, shown),
        )
        written = {}
        if not first:
            return
        if not dry_run and out is not None:
            done.save(out)
            written["out"] = str(out)
            if report_html is not None:
                write(report_html, done.report.to_html(title=title(model)))
                written["report_html"] = str(report_html)
        say(done.report, {**written, "report": done.report.to_dict()})
        if not as_json:
            for path in written.values():
                say(f"wrote {path}", None)

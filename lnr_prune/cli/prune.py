"""``lnr-prune prune``."""

import logging
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from lnr_prune.calibration.data import calibrate
from lnr_prune.calibration.examples import short_example
from lnr_prune.cli.console import answering, check, command_line, lines, title, write
from lnr_prune.cli.data import Source, batches, dtype_of, test_texts
from lnr_prune.cli.export import check_export, export
from lnr_prune.cli.images import INTERPOLATIONS, look_of
from lnr_prune.cli.models import build, new_folder, save_folder, tokenizer_of, torchvision_weights
from lnr_prune.cli.options import (
    AMOUNT,
    DATA,
    FILES,
    OUTPUT,
    Agreement,
    Array,
    BatchSize,
    Column,
    Device,
    Drop,
    Export,
    Html,
    Json,
    Model,
    ModelArg,
    Pack,
    Seed,
    TestTexts,
    Tokenizer,
    Weights,
    amount,
    numbers,
    refit_of,
    selector_of,
)
from lnr_prune.cli.recipe import Recipe
from lnr_prune.cli.recipe import write as write_recipe
from lnr_prune.cli.texts import predicted, reads_on, without_cache
from lnr_prune.recipe import Recipe as Settings
from lnr_prune.runtime.processes import launched
from lnr_prune.runtime.run import Run
from lnr_prune.selection.selectors import SELECTORS


def prune(
    context: typer.Context,
    model: Model,
    *,
    model_arg: ModelArg = None,
    weights: Weights = None,
    device: Device = "cpu",
    data: Annotated[
        Path,
        typer.Option(
            exists=True,
            help=f"Unlabelled samples like those the model was trained on: {FILES}.",
            rich_help_panel=DATA,
        ),
    ],
    array: Array = None,
    column: Column = None,
    drop: Drop = None,
    count: Annotated[int, typer.Option("--samples", min=1, help="Number of samples.", rich_help_panel=DATA)] = 512,
    batch_size: BatchSize = 32,
    seed: Seed = 0,
    image_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Height and width of images. Default, as for the next four: as the model was trained, if timm or "
            "torchvision say so, otherwise as for ImageNet.",
            rich_help_panel=DATA,
        ),
    ] = None,
    crop: Annotated[
        float | None, typer.Option(help="Share of a scaled image that is kept, in (0, 1].", rich_help_panel=DATA)
    ] = None,
    interpolation: Annotated[
        str | None, typer.Option(help=f"How images are scaled: {', '.join(INTERPOLATIONS)}.", rich_help_panel=DATA)
    ] = None,
    mean: Annotated[
        str | None,
        typer.Option(help="Mean of the colours in [0, 1]; one number for grey images.", rich_help_panel=DATA),
    ] = None,
    std: Annotated[
        str | None, typer.Option(help="Standard deviation of the colours, as in training.", rich_help_panel=DATA)
    ] = None,
    test: TestTexts = None,
    tokenizer: Tokenizer = None,
    tokens: Annotated[
        int, typer.Option(min=1, help="Longest text in tokens, or of every packed sample.", rich_help_panel=DATA)
    ] = 128,
    pack: Pack = None,
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
    size: Annotated[float | None, typer.Option(help="Budget: fraction of the bytes.", rich_help_panel=AMOUNT)] = None,
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
    tolerance: Agreement = None,
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
        typer.Option(
            help="File for the pruned model (safetensors); of hf:FOLDER, another folder. Needed unless --dry-run.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    report_html: Html = None,
    exported: Export = None,
    recipe: Recipe = None,
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
            {"params": params, "macs": macs, "size": size, "latency": latency, "error": error},
            {"round_to": round_to, "minimum": minimum, "leave": tuple(leave or ()) or None},
            {"refits": refits, "search": search},
            tolerance,
        )
        if into == "model":
            raise ValueError("--into is copy or graph, got model: the command never changes the model that it reads")
        folder = new_folder(model, out) if first and not dry_run and into == "copy" else None
        targets = {"--out": None if folder else out, "--report-html": report_html, "--export": exported}
        if exported is not None:
            check_export(exported)
        if first and not dry_run:
            if out is None:
                raise ValueError("there is no output file: give --out FILE.safetensors, or --dry-run to write nothing")
            check(targets, {"--weights": weights, "--data": data})
        how = selector_of(selector, swaps, seed), refit_of(window, iterations)
        settings = Settings(wanted, *how, logits=logits, into=into)
        net = build(model, model_arg or (), weights, device)
        look, origin = look_of(net, model, torchvision_weights(model_arg or ()))
        given: dict[str, Any] = {
            "size": image_size and (image_size, image_size),
            "crop": crop,
            "interpolation": interpolation,
            "mean": mean and numbers(mean, "--mean"),
            "std": std and numbers(std, "--std"),
        }
        look = replace(look, **{name: value for name, value in given.items() if value is not None})
        if first and data.is_dir():
            typer.echo(f"images: {look} ({origin})", err=True)
        source = Source(
            data, count, batch_size, seed, tuple(array or ()), tuple(column or ()), tuple(drop or ()), look,
            tokenizer or tokenizer_of(model), tokens, reads_on(net) if pack is None else pack, test,
        )  # fmt: skip
        texts = test_texts(source) if reads_on(net) and into == "copy" else []
        if test is not None and not texts:
            raise ValueError("--test is for packed texts of a model that predicts the next token")
        quiet = logging.getLogger("lnr_prune").getEffectiveLevel() >= logging.ERROR
        shown = (None if sys.stderr.isatty() else lines()) if first and not quiet else False
        samples = without_cache(net, batches(source, dtype_of(net), ranks))
        done = settings.prune(net, samples, run=Run(work, low_memory, shown))
        written = {}
        if not first:
            return
        if not dry_run and out is not None:
            if folder is None:
                done.save(out)
            else:
                save_folder(done, folder, source.tokenizer)
            written["out"] = str(out)
            if report_html is not None:
                write(report_html, done.report.to_html(title=title(model), command=command_line()))
                written["report_html"] = str(report_html)
            if exported is not None:
                export(exported, done.model, short_example(net, calibrate(net, samples)))
                written["export"] = str(exported)
            if recipe is not None and not recipe.exists():
                write_recipe(context, recipe, settings)
                written["recipe"] = str(recipe)
        judged = predicted(net, done.model, texts) if texts else None
        of_text = {"text": asdict(judged)} if judged else {}
        say(done.report, {**written, **of_text, "report": done.report.to_dict()})
        if not as_json:
            if judged:
                say(str(judged), None)
            for path in written.values():
                say(f"wrote {path}", None)

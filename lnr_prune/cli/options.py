"""Options that several commands share, and what they mean."""

from pathlib import Path
from typing import Annotated, Any

import typer

from lnr_prune.refit.refit import Refit
from lnr_prune.selection.amount import Keep, Penalty
from lnr_prune.selection.budget import Budget, Effort, Grid
from lnr_prune.selection.selectors import Backward, Random, Selector
from lnr_prune.settings import Amount
from lnr_prune.tolerance import Tolerance

MODEL, DATA, AMOUNT, OUTPUT = "Model", "Inputs", "How much is kept (give one)", "Output"
FILES = (
    "a folder of images; a .npy, .npz or .safetensors file; a table (.csv, .tsv, .parquet); or a text file with one "
    "sample per line (with --tokenizer)"
)
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="The model: package.module:factory, path/to/file.py:factory (a function or class that makes it), "
        "torchvision:NAME, timm:NAME, or hf:FOLDER (saved by Hugging Face's save_pretrained).",
        show_default=False,
    ),
]
ModelArg = Annotated[
    list[str] | None,
    typer.Option(
        help="Argument of the factory, key=value with the value in JSON. May be repeated.", rich_help_panel=MODEL
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        help="The trained weights: a state dict as .safetensors, .pt or .pth. Default: those that the factory gives.",
        rich_help_panel=MODEL,
    ),
]
Device = Annotated[str, typer.Option(help="Where it runs: cpu, cuda, mps ...", rich_help_panel=MODEL)]
Shape = Annotated[
    str | None,
    typer.Option(help="Shape of one sample, such as 3,224,224, for random inputs.", rich_help_panel=DATA),
]
Tokens = Annotated[
    int | None,
    typer.Option(min=1, help="For language models: length of random texts, in tokens.", rich_help_panel=DATA),
]
Array = Annotated[
    list[str] | None,
    typer.Option(
        help="Name of the array that is the model's input. Repeat it for a model that takes several inputs by name.",
        rich_help_panel=DATA,
    ),
]
Saved = Annotated[
    Path,
    typer.Argument(
        metavar="PRUNED", exists=True, dir_okay=False, show_default=False, help="A file that lnr-prune prune wrote."
    ),
]
Data = Annotated[Path | None, typer.Option(exists=True, help=f"Or inputs from a file: {FILES}.", rich_help_panel=DATA)]
Column = Annotated[
    list[str] | None,
    typer.Option(
        help="Column of a table that the model reads; repeat it, in the model's order. Default: all.",
        rich_help_panel=DATA,
    ),
]
Drop = Annotated[
    list[str] | None,
    typer.Option(help="Column of a table that is left out, such as the target. May be repeated.", rich_help_panel=DATA),
]
TestTexts = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        help="Packed texts to judge by. Default: the last tenth of the lines, which are then not fitted to.",
        rich_help_panel=DATA,
    ),
]
Tokenizer = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        file_okay=False,
        help="Folder of a Hugging Face tokenizer, for text. Default: that of hf:FOLDER.",
        rich_help_panel=DATA,
    ),
]
Pack = Annotated[
    bool | None,
    typer.Option(
        "--pack/--pad",
        help="Whether texts are cut from one stream of tokens, or each filled up to the longest one. Default: "
        "packed for models that predict the next token.",
        rich_help_panel=DATA,
    ),
]
Agreement = Annotated[
    float | None,
    typer.Option(
        help="The smallest model (by MACs) that still agrees with the original on all but this share of samples "
        "that it was not fitted to: 0.01. The same class counts, or 1 - the squared error of outputs that are no "
        "classes (--no-logits).",
        rich_help_panel=AMOUNT,
    ),
]
Export = Annotated[
    Path | None,
    typer.Option(
        "--export",
        help="Also write the pruned model as a program that needs no code of the model: a .pt2 (torch.export) or "
        ".onnx file, whose outputs are compared.",
        rich_help_panel=OUTPUT,
    ),
]
Seed = Annotated[
    int, typer.Option(help="Seed of all that is drawn: the same seed, the same result.", rich_help_panel=DATA)
]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples per batch.", rich_help_panel=DATA)]
Json = Annotated[
    bool, typer.Option("--json", help="Print JSON, and nothing else, to standard output.", rich_help_panel=OUTPUT)
]
Html = Annotated[Path | None, typer.Option(help="Also write the report as a web page.", rich_help_panel=OUTPUT)]


def numbers(text: str, option: str) -> tuple[float, ...]:
    """Numbers separated by commas.

    Raises:
        ValueError: If the text is anything else.
    """
    try:
        return tuple(map(float, text.split(",")))
    except ValueError as error:
        raise ValueError(f"{option} takes numbers separated by commas, got {text!r}") from error


def shape_of(text: str | None) -> tuple[int, ...] | None:
    """``3,224,224`` -> (3, 224, 224).

    Raises:
        ValueError: If the text is anything else.
    """
    if text is None:
        return None
    sizes = tuple(map(int, numbers(text, "--shape")))
    if min(sizes) < 1:
        raise ValueError(f"--shape takes positive sizes, got {text!r}")
    return sizes


def amount(
    texts: dict[str, list[str] | None],
    limits: dict[str, float | None],
    grid: dict[str, Any],
    effort: dict[str, Any],
    drop: float | None = None,
) -> Amount:
    """The amount for prune, from the options; exactly one must be given.

    Args:
        texts: "keep", "lam" and "lam_ratio" as they were typed: ``["0.5"]`` or ``["conv1=8", "fc1=0.2"]``.
        limits: Limits of the budget; None = no such limit.
        grid: Sizes that groups may have under the budget or the tolerance; None = default.
        effort: How carefully these are shared among the groups; None = default.
        drop: The tolerance; None = there is none.

    Raises:
        ValueError: If there is no amount or more than one, or if there are details of a budget without a limit.
    """
    given = {name: _amount_of(name, values) for name, values in texts.items() if values}
    wanted, finely, carefully = (_given(of) for of in (limits, grid, effort))
    if (details := {**finely, **carefully}) and not wanted and drop is None:
        raise ValueError(f"--{next(iter(details)).replace('_', '-')} belongs to a budget: give --params, --macs, "
                         "--size, --latency, --error or --tolerance too")  # fmt: skip
    if len(given) + bool(wanted) + (drop is not None) != 1:
        names = "--keep, --lam, --lam-ratio, --tolerance or a budget (--params, --macs, --size, --latency, --error)"
        got = " and ".join([*given, *(["budget"] if wanted else []), *(["tolerance"] if drop is not None else [])])
        raise ValueError(f"expected exactly one amount to keep. Give one of {names}; got {got or 'none'}")
    if wanted:
        return Budget(**wanted, grid=Grid(**finely), effort=Effort(**carefully))
    if drop is not None:
        return Tolerance(drop=drop, grid=Grid(**finely), effort=Effort(**carefully))
    if "keep" in given:
        return Keep(given["keep"])
    return Penalty(given.get("lam"), given.get("lam_ratio"))


def selector_of(name: str, swaps: int | None, seed: int) -> str | Selector:
    """The selector with this name, with its own settings.

    Raises:
        ValueError: If ``swaps`` is given for a selector that makes no swaps.
    """
    if swaps is not None:
        if name != "backward":
            raise ValueError(f"--swaps belongs to --selector backward, got --selector {name}")
        return Backward(swaps)
    return Random(seed) if name == "random" else name


def refit_of(window: int, iterations: int | None) -> Refit:
    """How the layers are refitted.

    Raises:
        ValueError: If iterations are given for a window that has none.
    """
    if iterations is None:
        return Refit(window=window)
    if window == 1:
        raise ValueError("--iterations belongs to --window 2, got --window 1")
    return Refit(window=window, iterations=iterations)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _amount_of(name: str, values: list[str]) -> float | dict[str, float]:
    option = "--" + name.replace("_", "-")
    if len(values) == 1 and "=" not in values[0]:
        return _number(values[0], option)
    pairs = [value.rpartition("=") for value in values]
    if any(not layer for layer, *_ in pairs):
        raise ValueError(f"{option} takes one number, or LAYER=NUMBER as often as needed; got {' '.join(values)}")
    return {layer: _number(value, option) for layer, _, value in pairs}


def _number(text: str, option: str) -> float:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"{option} takes a number, or LAYER=NUMBER; got {text!r}") from error

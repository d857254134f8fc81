"""Options that several commands share, and what they mean."""

from pathlib import Path
from typing import Annotated, Any

import typer

from lnr_prune.allocation import Budget

MODEL, DATA, AMOUNT, OUTPUT = "Model", "Inputs", "How much is kept (give one)", "Output"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Where the model comes from: package.module:factory, path/to/file.py:factory (a function or class that "
        "makes it), torchvision:NAME, timm:NAME, or hf:FOLDER (saved by Hugging Face's save_pretrained).",
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
        help="The trained weights: a state dict as .safetensors, .pt or .pth. Default: what the factory gives.",
        rich_help_panel=MODEL,
    ),
]
Device = Annotated[str, typer.Option(help="Where it runs: cpu, cuda, mps ...", rich_help_panel=MODEL)]
Shape = Annotated[
    str | None,
    typer.Option(help="Shape of one sample, such as 3,224,224: random values of it are used.", rich_help_panel=DATA),
]
Tokens = Annotated[
    int | None,
    typer.Option(min=1, help="For language models: length of a random text, in tokens.", rich_help_panel=DATA),
]
Array = Annotated[
    list[str] | None,
    typer.Option(
        help="Which array of the file is the model's input; repeat it for models that take several, by name.",
        rich_help_panel=DATA,
    ),
]
Saved = Annotated[
    Path,
    typer.Argument(
        metavar="PRUNED", exists=True, dir_okay=False, show_default=False, help="A file that lnr-prune prune wrote."
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(exists=True, help="Instead, inputs from a .npy, .npz or .safetensors file.", rich_help_panel=DATA),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print JSON, and nothing else, to the standard output.", rich_help_panel=OUTPUT)
]
Html = Annotated[Path | None, typer.Option(help="Also write the report as a web page.", rich_help_panel=OUTPUT)]


def numbers(text: str, option: str) -> tuple[float, ...]:
    """Numbers between commas.

    Raises:
        ValueError: If there is anything else.
    """
    try:
        return tuple(map(float, text.split(",")))
    except ValueError as error:
        raise ValueError(f"{option} takes numbers with commas between them, got {text!r}") from error


def shape_of(text: str | None) -> tuple[int, ...] | None:
    """``3,224,224`` -> (3, 224, 224).

    Raises:
        ValueError: If it is anything else.
    """
    if text is None:
        return None
    sizes = tuple(map(int, numbers(text, "--shape")))
    if min(sizes) < 1:
        raise ValueError(f"--shape takes positive sizes, got {text!r}")
    return sizes


def amount(texts: dict[str, list[str] | None], limits: dict[str, float | None], **details: Any) -> dict[str, Any]:
    """The one amount that prune takes: keep, lam, lam_ratio or budget.

    Args:
        texts: "keep", "lam" and "lam_ratio" as they were typed: ``["0.5"]`` or ``["conv1=8", "fc1=0.2"]``.
        limits: Of the budget; None = no such limit.
        details: Further settings of the budget; None = default.

    Raises:
        ValueError: If there is no amount, or more than one, or a detail without a limit.
    """
    given: dict[str, Any] = {name: _amount_of(name, values) for name, values in texts.items() if values}
    wanted: dict[str, Any] = {name: value for name, value in limits.items() if value is not None}
    settings = {name: value for name, value in details.items() if value is not None}
    if wanted:
        given["budget"] = Budget(**wanted, **settings)
    elif settings:
        raise ValueError(f"--{next(iter(settings)).replace('_', '-')} belongs to a budget: give --params, --macs, "
                         "--budget-size, --latency or --error too")  # fmt: skip
    if len(given) != 1:
        names = "--keep, --lam, --lam-ratio or a budget (--params, --macs, --budget-size, --latency, --error)"
        raise ValueError(f"how much is to be kept? Give one of {names}; got {' and '.join(given) or 'none'}")
    return given


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

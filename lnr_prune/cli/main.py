"""The ``lnr-prune`` command."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lnr_prune._version import __version__
from lnr_prune.cli import commands
from lnr_prune.cli.console import command_line
from lnr_prune.cli.options import Device
from lnr_prune.cli.prune import prune
from lnr_prune.errors import LnrPruneError
from lnr_prune.recipes import session
from lnr_prune.recipes.data import DATA_ENVIRONMENT
from lnr_prune.recipes.settings import Settings

app = typer.Typer(
    name="lnr-prune",
    help="Make trained PyTorch models smaller and faster by linear neural reconstruction, without retraining.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
LEVELS = ("debug", "info", "warning", "error")
EXAMPLES: dict[Callable[..., None], tuple[str, ...]] = {
    commands.inspect: (
        "lnr-prune inspect torchvision:resnet18 --shape 3,224,224",
        "lnr-prune inspect my_models.py:make_net --model-arg width=64 --shape 1,28,28",
    ),
    prune: (
        "The same run again, with another amount:",
        "  lnr-prune prune --recipe run.yaml --macs 0.4 --out smaller.safetensors",
        "Half the multiply-accumulates of a ResNet, from a folder of images:",
        "  lnr-prune prune torchvision:resnet18 --weights resnet18.pth --data photos --macs 0.5 --out m.safetensors",
        "Half the channels of every layer of your own model, from arrays:",
        "  lnr-prune prune my_models.py:Net --weights net.pt --data inputs.npz --array x --keep 0.5 "
        "--out m.safetensors",
        "The same, with the samples shared among four processes:",
        "  torchrun --nproc-per-node 4 -m lnr_prune prune my_models.py:Net ...",
        "What would be done to a language model, as JSON:",
        "  lnr-prune prune hf:my-bert --data lines.txt --tokenizer my-bert --params 0.8 --dry-run --json",
    ),
    commands.demo: ("lnr-prune demo cnn --html report.html",),
    commands.report: ("lnr-prune report m.safetensors --html report.html",),
    commands.bench: (
        "lnr-prune bench torchvision:resnet18 m.safetensors --shape 3,224,224 --batch-size 1 --threads 1",
    ),
}


for command, lines in EXAMPLES.items():
    app.command(epilog="\n\n".join(("Examples:", *lines)))(command)


def main() -> None:
    """Entry point of the command."""
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        Console().print(f"lnr-prune {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Also say what is decided on the way.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress, and no warnings.")] = False,
    log_level: Annotated[
        str | None, typer.Option(help=f"What is said on the way: {', '.join(LEVELS)}. -v is info, -q is error.")
    ] = None,
) -> None:
    """Options of the command itself, which stand before the name of a sub-command."""
    asked = [*(["info"] if verbose else []), *(["error"] if quiet else []), *([log_level] if log_level else [])]
    if len(asked) > 1:
        raise typer.BadParameter("give one of -v, -q and --log-level")
    for level in asked:
        if level.lower() not in LEVELS:
            raise typer.BadParameter(f"--log-level {level}: expected one of {', '.join(LEVELS)}")
        logging.basicConfig(format="%(message)s")
        logging.getLogger("lnr_prune").setLevel(level.upper())


@app.command()
def lenet5(
    data: Annotated[
        str,
        typer.Option(help="Images: digits (1,797 real ones, embedded), mnist or fashion (read from --data-root)."),
    ] = "digits",
    data_root: Annotated[
        Path | None,
        typer.Option(
            help="Folder that holds MNIST/raw or FashionMNIST/raw; missing files are downloaded into it. "
            f"Default: the environment variable {DATA_ENVIRONMENT}."
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="Weights of a trained LeNet-5 (safetensors) to start from, instead of training one."),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for plots, results.json and weights; made if it does not exist.")
    ] = Path("lenet5-results"),
    epochs: Annotated[
        int | None, typer.Option(help="Training epochs. Default: 20 for digits, 8 otherwise, as in the reference.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Training batch size. Default: 64 for digits, 256 otherwise.")
    ] = None,
    calibration: Annotated[
        int | None,
        typer.Option(help="Unlabelled training images used for pruning. Default: 5000, or all if there are fewer."),
    ] = None,
    lam: Annotated[
        float,
        typer.Option(
            help="Penalty for fc2 in the reference's units. The library's lam is this number times the number of "
            "columns (500, or 501 with the bias)."
        ),
    ] = 0.01,
    lam_ratio: Annotated[
        float,
        typer.Option(help="Penalty for the whole network, as a fraction of the one at which a layer keeps nothing."),
    ] = 0.1,
    sweep: Annotated[int | None, typer.Option(help="Points of each Pareto sweep. Default: 10.")] = None,
    retrain: Annotated[
        bool, typer.Option(help="Whether to also retrain every point of the sweeps for one epoch.")
    ] = True,
    device: Device = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of everything random: the same seed gives the same results.")] = 0,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="A small run to try things out: 2 epochs, 3 points per sweep, tiny toy problem."),
    ] = False,
) -> None:
    """The reference session: train LeNet-5, prune its last layer and the whole network, plot and save everything."""
    try:
        settings = Settings(
            data=data,
            data_root=data_root,
            weights=weights,
            out=out,
            epochs=epochs,
            batch_size=batch_size,
            calibration=calibration,
            lam=lam,
            lam_ratio=lam_ratio,
            sweep=sweep,
            retrain=retrain,
            device=device,
            seed=seed,
            quick=quick,
            command=command_line(),
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    try:
        session.run(settings)
    except LnrPruneError as error:
        raise typer.BadParameter(str(error)) from error

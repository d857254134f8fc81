"""``--recipe``: the options of a run in a file, which is read if it is there and written if it is not."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from lnr_prune import recipe
from lnr_prune.cli.options import AMOUNT, OUTPUT
from lnr_prune.recipe import RUN
from lnr_prune.runtime.checks import nearest

NEVER = ("recipe", "as_json", "dry_run", "work")  # what is about one call of the command alone
NUMBERED = ("keep", "lam", "lam_ratio")  # a number, or LAYER=NUMBER


def given(context: typer.Context, path: Path | None) -> Path | None:
    """Makes the options in a file the defaults of the command's.

    Raises:
        ValueError: If it is no file of options.
    """
    if path is not None and path.exists():
        try:
            context.default_map = {**(context.default_map or {}), **_read(path, _options(context))}
        except (ValueError, OSError) as error:
            raise typer.BadParameter(str(error)) from error
    return path


Recipe = Annotated[
    Path | None,
    typer.Option(
        dir_okay=False,
        is_eager=True,
        callback=given,
        help="File of options (YAML). If it exists, they are read, and what is typed beside it counts more; if not, "
        "all options of this run are written to it.",
        rich_help_panel=OUTPUT,
    ),
]


def write(context: typer.Context, path: Path, settings: recipe.Recipe) -> None:
    """Writes what was asked for: the settings as `lnr_prune.Recipe` has them, and the rest for the command line.

    Raises:
        ValueError: If a setting cannot be written.
        OSError: If the file cannot be written.
    """
    known, panels = settings.options, {p.name: getattr(p, "rich_help_panel", None) for p in context.command.params}
    rest = {
        option: _plain(context.params[name])
        for option, name in _options(context).items()
        if panels[name] != AMOUNT and option not in known and _typed(context, name)
    }
    recipe.write(path, {**known, RUN: rest} if rest else known)


def _read(path: Path, names: Mapping[str, str]) -> dict[str, Any]:
    """Parameter -> value."""
    entries = recipe.read(path)
    of_run = entries.pop(RUN, None) or {}
    if not isinstance(of_run, dict):
        raise ValueError(f"{path}: {RUN} holds {of_run!r}, expected options such as data: photos")
    values = {str(name).replace("-", "_"): value for name, value in {**entries, **of_run}.items()}
    for name in values:
        if name not in names:
            raise ValueError(f"{path}: {name!r} is no option of this command; {nearest(name, names)}")
    return {names[name]: _texts(value) if name in NUMBERED else value for name, value in values.items()}


def _options(context: typer.Context) -> dict[str, str]:
    """Option, without its dashes -> parameter."""
    named = [(max(parameter.opts, key=len), str(parameter.name)) for parameter in context.command.params]
    return {option.lstrip("-").replace("-", "_"): name for option, name in named if name not in NEVER}


def _typed(context: typer.Context, name: str) -> bool:
    """Whether the user said it, here or in the file."""
    source = context.get_parameter_source(name)
    return source is not None and source.name in ("COMMANDLINE", "DEFAULT_MAP")


def _texts(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [f"{layer}={number}" for layer, number in value.items()]
    return [str(value)]


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return list(map(_plain, value))
    return str(value) if isinstance(value, Path) else value

"""How the sub-commands print, exit and write files."""

import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from lnr_prune.errors import LnrPruneError
from lnr_prune.runtime.disk import put
from lnr_prune.runtime.progress import EVERY

OPTIONS = (  # what the library calls its arguments -> what they are called here
    (r"^budget (\w+) must", r"--\1 must"),
    (r"^(keep|lam|leave) (?=names|must)", r"--\1 "),
    (r"^(into|window|iterations|seed|swaps|minimum|refits|search) must", r"--\1 must"),
    (r"^drop must", "--tolerance must"),
    (r"^round_to must", "--round-to must"),
    (r"^penalty's ratio", "--lam-ratio"),
    (r"^unknown selector", "--selector: unknown selector"),
    (r"\binto='(\w+)'", r"--into \1"),
    (r"run=Run\(low_memory=True\)", "--low-memory"),
    (r"Effort\(search=\.\.\.\)", "--search"),
    (r"Keep\({name: \.\.\.}\)", "--keep LAYER=NUMBER"),
    (r"with a work folder, all", "with --work, all"),
    (r", or lnr_prune\.Batches\(data, inputs\)", ""),
)
LOG_WIDTH = 120  # of tables if there is no terminal
Say = Callable[[Any, Any], None]


@contextmanager
def answering(as_json: bool) -> Iterator[Say]:
    """Prints results, and turns errors into exit codes: 1 the library refuses, 2 wrong usage, 130 interrupted."""
    stdout = sys.stdout

    def say(text: Any, data: Any) -> None:
        if as_json:
            stdout.write(json.dumps(data) + "\n")
        else:
            console = Console(file=stdout, width=None if stdout.isatty() else LOG_WIDTH, markup=False, highlight=False)
            console.print(text, soft_wrap=isinstance(text, str))

    try:
        with redirect_stdout(sys.stderr):  # for whatever the user's code prints
            yield say
    except KeyboardInterrupt:
        typer.echo("interrupted: nothing was left half-written", err=True)
        raise typer.Exit(130) from None
    except (LnrPruneError, OSError) as error:
        typer.echo(f"error: {in_options(str(error))}", err=True)
        raise typer.Exit(1) from error
    except ValueError as error:
        raise typer.BadParameter(in_options(str(error))) from error


def in_options(message: str) -> str:
    """An error of the library, in the words of the command line."""
    for argument, option in OPTIONS:
        message = re.sub(argument, option, message)
    return message


def lines(clock: Callable[[], float] = time.monotonic) -> Callable[[str], None]:
    """Prints what is being done if there is no terminal: each kind of step, and every ten seconds the step itself."""
    last, since = "", 0.0

    def show(doing: str) -> None:
        nonlocal last, since
        kind = doing.partition(" ")[0]
        if kind != last or clock() - since >= EVERY:
            typer.echo(doing if kind == last else f"{kind} ...", err=True)
            last, since = kind, clock()

    return show


def check(targets: dict[str, Path | None], sources: dict[str, Path | None]) -> None:
    """Refuses at the start what could not be written after minutes of work."""
    given = {option: path for option, path in targets.items() if path is not None}
    if len({path.resolve() for path in given.values()}) < len(given):
        raise ValueError(f"{' and '.join(given)} name the same file")
    for option, path in given.items():
        other_kind = path.exists() and not path.is_file()  # a folder, a device, a pipe
        if other_kind or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise ValueError(f"{option} {path}: expected a file in a folder that exists and can be written to")
        for other, source in sources.items():
            if source is not None and path.exists() and source.exists() and path.samefile(source):
                raise ValueError(f"{option} {path} would overwrite the file of {other}; name another one")


def write(path: Path, text: str) -> None:
    """Writes a text file, completely or not at all."""
    put(path, lambda part: Path(part).write_text(text, encoding="utf-8"))


def command_line() -> str:
    """What was typed."""
    return shlex.join(["lnr-prune", *sys.argv[1:]])


def title(name: str) -> str:
    """Title of a report's page, from the end of a path."""
    return f"{Path(name).name}, pruned"

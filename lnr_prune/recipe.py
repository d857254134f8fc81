"""How a model is pruned, as a file: the settings of `prune` in YAML, under the names that the command line has."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from lnr_prune.prune import prune
from lnr_prune.pruned import Pruned
from lnr_prune.refit.refit import Refit
from lnr_prune.runtime.checks import nearest
from lnr_prune.runtime.disk import StrPath, put
from lnr_prune.runtime.run import Run
from lnr_prune.selection.amount import Keep, Penalty
from lnr_prune.selection.budget import Budget, Effort, Grid
from lnr_prune.selection.selectors import SELECTORS, Selector
from lnr_prune.settings import Amount, Settings
from lnr_prune.tolerance import Tolerance

RUN = "run"  # what the command line alone reads: the model, the data and the files
RENAMED = {Penalty: {"ratio": "lam_ratio"}, Effort: {"samples": "effort_samples"}, Tolerance: {"drop": "tolerance"}}
WORDS = ("selector", "into", "solver")  # all other values are numbers, flags, or names of layers
Plain = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """The settings of `prune` that its result depends on, for a file; see there.

    The file has them under the names of the command line's options (``macs: 0.5``), and only those that are not the
    defaults. ``lnr-prune prune --recipe run.yaml`` reads and writes the same file; what only the command line knows,
    such as the model and the data, stands there under ``run:``.

    Attributes:
        amount: How much is kept: a `Keep`, a `Penalty`, a `Budget`, or a `Tolerance` without a function.
        selector: How channels are chosen.
        refit: How the layers are refitted; None = they are not.
        bias: Whether the consumers' biases are refitted, too.
        logits: Whether the model's output is the logits of classes.
        into: What is shrunk.

    Raises:
        ValueError, TypeError: If a setting is of the wrong type, or cannot be combined with another one.

    Example:
        >>> import pathlib, tempfile, lnr_prune as lnr
        >>> recipe = lnr.Recipe(lnr.Budget(macs=0.5), selector=lnr.Backward(swaps=2))
        >>> recipe.save(path := f"{tempfile.mkdtemp()}/run.yaml")
        >>> print(pathlib.Path(path).read_text(), end="")
        macs: 0.5
        selector: backward
        swaps: 2
        >>> lnr.Recipe.load(path) == recipe
        True
    """

    amount: Amount
    selector: str | Selector = "group_lasso"
    refit: Refit | None = Refit()
    bias: bool = True
    logits: bool | None = None
    into: str = "copy"

    def __post_init__(self) -> None:
        Settings.of(*(getattr(self, field.name) for field in fields(self)))

    def prune(self, model: nn.Module, data: Any, *, also: Any = None, run: Run = Run()) -> Pruned:
        """`lnr_prune.prune` with these settings."""
        settings = {field.name: getattr(self, field.name) for field in fields(self)}
        return prune(model, data, **settings, also=also, run=run)

    def save(self, path: StrPath) -> None:
        """Writes a YAML file.

        Raises:
            ValueError: If a setting is an object of your own, which a file cannot hold.
            OSError: If the file cannot be written.
        """
        write(path, self.options)

    @classmethod
    def load(cls, path: StrPath) -> "Recipe":
        """The recipe in a YAML file; its section ``run:`` is the command line's, and not read.

        Raises:
            ValueError, TypeError: If it is not a recipe; the message begins with the file's name.
            OSError: If it cannot be read.
        """
        entries = read(path)
        entries.pop(RUN, None)
        try:
            return cls.of(entries)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{path}: {error}") from error

    @property
    def options(self) -> Plain:
        """The settings that are not the defaults, by the names of the command line's options."""
        found = _options_of(self.amount)
        kinds = {type(selector): name for name, selector in SELECTORS.items()}
        selector = SELECTORS[self.selector] if isinstance(self.selector, str) else self.selector
        if type(selector) not in kinds:
            raise ValueError(f"a recipe cannot hold the selector {selector!r}, which is not one of the library's")
        if (name := kinds[type(selector)]) != "group_lasso":
            found["selector"] = name
        found |= _options_of(selector) | ({"refit": False} if self.refit is None else _options_of(self.refit))
        return found | {name: getattr(self, name) for name in _changed(self) if name in ("bias", "logits", "into")}

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Recipe":
        """The recipe with these options.

        Raises:
            ValueError, TypeError: If an option is unknown or out of range, or if they do not say how much is kept.
        """
        left = {name: value if name in WORDS else _number(value) for name, value in options.items()}
        selector = SELECTORS.get(left.get("selector", "group_lasso"))
        chosen: Any = left.pop("selector", "group_lasso")
        if selector is not None and (given := _taken(type(selector), left)):
            chosen = type(selector)(**given)
        refit = None if left.pop("refit", True) is False else Refit(**_taken(Refit, left))
        rest = {name: left.pop(name) for name in ("bias", "logits", "into") if name in left}
        amounts = _amounts(left)
        if left:
            raise ValueError(f"unknown option {next(iter(left))!r}; {nearest(str(next(iter(left))), option_names())}")
        if len(amounts) != 1:
            got = " and ".join(type(amount).__name__ for amount in amounts) or "none"
            raise ValueError(f"expected one amount: keep, lam, lam_ratio, tolerance or a budget (macs ...); got {got}")
        return cls(amounts[0], chosen, refit, **rest)


def read(path: StrPath) -> Plain:
    """The entries of a YAML file, with _ for - in their names.

    Raises:
        ValueError: If it is not YAML, or not a mapping.
        OSError: If it cannot be read.
    """
    try:
        entries = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{path} holds {entries!r}, expected options such as macs: 0.5")
    return {str(name).replace("-", "_"): value for name, value in entries.items()}


def write(path: StrPath, entries: Mapping[str, Any]) -> None:
    """Writes a YAML file, completely or not at all."""
    text = yaml.safe_dump(dict(entries), sort_keys=False, allow_unicode=True)
    put(path, lambda part: Path(part).write_text(text, encoding="utf-8"))


def option_names() -> list[str]:
    """All options that a recipe may have."""
    kinds = (Penalty, Grid, Effort, Budget, Tolerance, Refit, *map(type, SELECTORS.values()))
    own = ["keep", "selector", "refit", "bias", "logits", "into"]
    return [*own, *(name for kind in kinds for name in _fields(kind).values())]


def _amounts(left: Plain) -> list[Amount]:
    """The amounts that options speak of, which are taken from them."""
    amounts: list[Amount] = []
    if "keep" in left:
        amounts.append(Keep(left.pop("keep")))
    if given := _taken(Penalty, left):
        amounts.append(Penalty(**given))
    grid, effort = _taken(Grid, left), _taken(Effort, left)
    if "tolerance" in left:
        amounts.append(Tolerance(**_taken(Tolerance, left), grid=Grid(**grid), effort=Effort(**effort)))
        grid, effort = {}, {}
    limits = _taken(Budget, left)
    if grid or effort or limits:
        amounts.append(Budget(**limits, grid=Grid(**grid), effort=Effort(**effort)))
    return amounts


def _changed(settings: Any) -> list[str]:
    """The fields that are not the defaults."""
    usual = {field.name: field.default for field in fields(settings)}
    for selector in SELECTORS.values():  # whose fields may hold objects where the default is their name
        if type(selector) is type(settings):
            usual = vars(selector)
    return [name for name, value in usual.items() if getattr(settings, name) != value]


def _options_of(settings: Any) -> Plain:
    """Settings by the names of options, without the defaults."""
    if isinstance(settings, Keep):
        return {"keep": _plain(settings.channels)}
    found: Plain = {"tolerance": settings.drop} if isinstance(settings, Tolerance) else {}
    for name in _changed(settings):
        value = getattr(settings, name)
        if isinstance(value, Grid | Effort):
            found |= _options_of(value)
        else:
            found[RENAMED.get(type(settings), {}).get(name, name)] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, tuple):
        return list(map(_plain, value))
    if isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"a recipe cannot hold {value!r}: give it in Python")


def _taken(kind: type, left: Plain) -> Plain:
    """The options of some settings, taken from ``left``, under the names of their fields."""
    return {field: left.pop(option) for field, option in _fields(kind).items() if option in left}


def _fields(kind: type) -> dict[str, str]:
    """Field -> option."""
    return {
        field.name: RENAMED.get(kind, {}).get(field.name, field.name)
        for field in fields(kind)
        if field.name not in ("grid", "effort")
    }


def _number(value: Any) -> Any:
    """YAML takes 1e-3 for a text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value

"""A network in a few stages, each with its cost: the modules whose names begin alike."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lnr_prune.report.rows import ModuleCost

ENOUGH, MOST = 6, 16  # stages


@dataclass(frozen=True)
class Stage:
    """Some modules, and what they cost together.

    Attributes:
        name: What the modules' names begin with; "" for the whole network.
        modules: The modules, in the model's order.
    """

    name: str
    modules: tuple[ModuleCost, ...]

    def total(self, cost: str) -> int:
        """The sum of one of `ModuleCost`'s numbers."""
        return sum(getattr(module, cost) or 0 for module in self.modules)


def stages(modules: Sequence[ModuleCost]) -> list[Stage]:
    """The network in a few stages: what costs most is divided until there are enough, unless its parts are too many."""
    parts = [Stage("", tuple(module for module in modules if module.params_before or module.macs_before))]
    whole = {cost: parts[0].total(cost) or 1 for cost in ("params_before", "macs_before")}

    def weight(stage: Stage) -> float:
        return sum(stage.total(cost) / all_of for cost, all_of in whole.items())

    while 0 < len(parts) < ENOUGH:
        divided = [(stage, _parts(stage)) for stage in sorted(parts, key=weight, reverse=True)]
        fits = ((old, new) for old, new in divided if new != [old] and len(parts) - 1 + len(new) <= MOST)
        old, new = next(fits, (parts[0], []))
        if not new:
            break
        at = parts.index(old)
        parts[at : at + 1] = new
    return [_named(stage) for stage in parts if stage.modules]


def _parts(stage: Stage) -> list[Stage]:
    """The stage, divided by the next part of its modules' names."""
    depth = len(stage.name.split(".")) if stage.name else 0
    parts: dict[str, list[ModuleCost]] = {}
    for module in stage.modules:
        parts.setdefault(".".join(module.name.split(".")[: depth + 1]), []).append(module)
    return [Stage(name, tuple(found)) for name, found in parts.items()]


def _named(stage: Stage) -> Stage:
    return stage if stage.name else replace(stage, name="the model itself")

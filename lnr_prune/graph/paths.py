"""The paths that data takes through a model: several traces with the same owners.

A forward may branch on what it is given: an optional argument, the size of an image, a flag. Other methods have paths
of their own, and so has training, with its auxiliary heads. Each path is traced, and whatever reads a channel on any of
them reads it. Layers that the calibration data never comes to shrink too, but cannot be refitted.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from lnr_prune.errors import GraphError
from lnr_prune.graph.module import Example, calling
from lnr_prune.graph.rules import Propagation, Site, logger, propagate
from lnr_prune.graph.trace import trace


@dataclass(frozen=True, eq=False)
class Paths:
    """The traces of a model, which share their owners.

    Attributes:
        calibrated: Paths that the calibration data takes; the first is that of the example.
        others: Paths that it does not take: those of other methods, and of training.
    """

    calibrated: tuple[Propagation, ...]
    others: tuple[Propagation, ...] = ()

    @property
    def all(self) -> tuple[Propagation, ...]:
        """All paths."""
        return (*self.calibrated, *self.others)

    @property
    def main(self) -> Propagation:
        """The path of the example."""
        return self.calibrated[0]

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """Name -> parameter or buffer that some path has."""
        return {name: tensor for state in self.all for name, tensor in state.trace.tensors.items()}

    def uses(self, name: str) -> int:
        """How often a tensor is read, itself or a view of it, on all paths together; making a view is no use of it."""
        return sum(_uses(state, name) for state in self.all)

    @cached_property
    def calibrated_sites(self) -> tuple[Site, ...]:
        """Where weights are applied on the way of the calibration data, each once, in an order that suits all paths."""
        return tuple(self._own(site) for site in _merged([state.sites for state in self.calibrated]))

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The same on all paths; those that the calibration data does not come to are last."""
        rest = (self._own(site) for state in self.others for site in state.sites)
        return (*self.calibrated_sites, *rest)

    def times(self, weight: str) -> int:
        """How often a weight is applied on the path on which it is applied most often."""
        return max(Counter(site.weight for site in state.sites)[weight] for state in self.calibrated)

    def applied_only(self, weight: str) -> bool:
        """Whether a weight is used for nothing else than to be applied."""
        return self.uses(weight) == sum(site.weight == weight for state in self.all for site in state.sites)

    def _own(self, site: Site) -> Site:
        """The site, without its bias if that is used elsewhere too: then it must stay as it is."""
        if site.bias is None:
            return site
        alike = sum(
            (site.weight, site.bias) == (other.weight, other.bias) for state in self.all for other in state.sites
        )
        return site if alike == self.uses(site.bias) else replace(site, bias=None)


def follow(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], also: Sequence[Example] = ()) -> Paths:
    """Traces a call of the model, other calls that take other paths, and training if that uses further parameters.

    Raises:
        GraphError: If the first call cannot be traced. Of the others, what cannot be traced can only be tried out.
    """
    main = propagate(trace(model, args, kwargs))
    calibrated, others = [main], list[Propagation]()
    for example in also:
        if example.traced:
            with calling(model, example.method):
                found = _extended(main, model, *example.call, what=str(example))
            (calibrated if example.calibrated else others).extend(found)
    if any(_unused([*calibrated, *others])):
        others.extend(_extended(main, model, args, kwargs, what="training mode", training=True))
    return Paths(tuple(calibrated), tuple(others))


def _extended(
    main: Propagation,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    what: str,
    training: bool = False,
) -> list[Propagation]:
    """Another path with the owners of the main one; nothing if it cannot be traced."""
    try:
        return [propagate(trace(model, args, kwargs, training=training), main.owners)]
    except GraphError:
        logger.warning("%s could not be traced: parameters that only it uses stay whole", what)
        return []


def _uses(state: Propagation, name: str) -> int:
    values = [node for node, other in state.trace.names.items() if other == name]
    values += [node for node, view in state.views.items() if view.name == name and state.is_view(node)]
    return sum(not state.is_view(user) for node in values for user in node.users)


def _unused(states: Sequence[Propagation]) -> Iterator[str]:
    """Names of parameters that none of these paths reads."""
    used = {name for state in states for node, name in state.trace.names.items() if node.users}
    for name in dict.fromkeys(name for state in states for name in state.trace.names.values()):
        if name not in used and isinstance(states[0].trace.tensors[name], nn.Parameter):
            yield name


def unused_weights(paths: Paths) -> tuple[str, ...]:
    """Names of the weights, of two dimensions or more, that no path reads."""
    return tuple(name for name in _unused(paths.all) if paths.tensors[name].dim() > 1)


def _merged(paths: Sequence[Sequence[Site]]) -> list[Site]:
    """All sites, each once, in an order in which every path's own order is kept where that is possible."""
    merged: list[Site] = []
    for sites in paths:
        place = 0  # behind the sites that this path has passed
        for site in sites:
            if site in merged:
                place = max(place, merged.index(site) + 1)
            else:
                merged.insert(place, site)
                place += 1
    return merged

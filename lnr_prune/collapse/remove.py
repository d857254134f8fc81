"""Removal: takes the planned channels out, and puts them back if the result does not equal the masked model."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

from torch import Tensor, nn

from lnr_prune.calibration.calls import Call
from lnr_prune.collapse.collapse import collapse, restore_point
from lnr_prune.collapse.graph_module import pruned_graph
from lnr_prune.collapse.plan import Plan
from lnr_prune.collapse.verify import Reference
from lnr_prune.errors import VerificationError
from lnr_prune.graph.groups import Graph
from lnr_prune.graph.module import Example

logger = logging.getLogger("lnr_prune")


def remove(
    model: nn.Module,
    target: nn.Module | None,
    plan: Plan,
    masked: Mapping[str, Tensor],
    example: Call,
    *,
    better: Iterable[Plan] = (),
    also: Sequence[Example] = (),
    training: bool,
) -> tuple[nn.Module, Plan]:
    """The model without the planned channels, verified, and the plan that it follows.

    Args:
        model: The whole model.
        target: The module that is shrunk, a copy of the model or the model itself; it is restored if anything fails.
            None = a graph is made instead.
        plan: What is kept.
        masked: Full-size weights of the masked model.
        example: Arguments of one forward pass.
        better: Plans that keep the same and change more ints of submodules: the first one that passes is followed.
        also: Other calls that are compared, too; not if a graph is made, which has one path only.
        training: Whether to compare in training mode as well.

    Raises:
        VerificationError: If the smaller model does not equal the masked one.
    """
    if target is None:
        if any(other.traced for other in also):
            logger.warning("the graph has the path of the first batch only: it cannot run batches that take another")
        return pruned_graph(model, plan, masked, example), plan
    reference = Reference(model, masked, example, also=also, training=training)
    for each in better:
        with suppress(VerificationError):
            _take_out(target, each, masked, reference)
            return target, each
    _take_out(target, plan, masked, reference)
    return target, plan


def _take_out(target: nn.Module, plan: Plan, masked: Mapping[str, Tensor], reference: Reference) -> None:
    restore = restore_point(target)
    try:
        collapse(target, plan, masked)
        reference.check(target)
    except BaseException:
        restore()
        raise


def warn_of_unused(graph: Graph, plan: Plan, tensors: Mapping[str, Tensor]) -> None:
    """Warns of layers that no traced path came to, if they may read channels that were removed."""
    widths = {tensors[name].shape[dim] for name, dims in plan.indices.items() for dim in dims}
    at_risk = [
        name
        for name in graph.unused
        if any(size % width == 0 for size in _weight(name, tensors).shape[:2] for width in widths if width > 1)
    ]
    if at_risk:
        logger.warning(
            "no call that was traced used %s: if they read channels that were removed, they no longer run. Name the "
            "methods that use them, as in also={'embed': [batch]}",
            ", ".join(map(repr, at_risk)),
        )


def _weight(layer: str, tensors: Mapping[str, Tensor]) -> Tensor:
    return tensors[layer] if layer in tensors else tensors[f"{layer}.weight"]

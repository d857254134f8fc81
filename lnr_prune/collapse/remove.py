"""Removal: takes the planned channels out, and puts them back if the result does not equal the masked model."""

from collections.abc import Mapping

from torch import Tensor, nn

from lnr_prune.calibration.calls import Call
from lnr_prune.collapse.collapse import collapse, restore_point
from lnr_prune.collapse.graph_module import pruned_graph
from lnr_prune.collapse.plan import Plan
from lnr_prune.collapse.verify import Reference


def remove(
    model: nn.Module,
    target: nn.Module | None,
    plan: Plan,
    masked: Mapping[str, Tensor],
    example: Call,
    *,
    training: bool,
) -> nn.Module:
    """The model without the planned channels, verified.

    Args:
        model: The whole model.
        target: The module that is shrunk, a copy of the model or the model itself; it is restored if anything fails.
            None = a graph is made instead.
        plan: What is kept.
        masked: Full-size weights of the masked model.
        example: Arguments of one forward pass.
        training: Whether to compare in training mode as well.

    Raises:
        VerificationError: If the smaller model does not equal the masked one.
    """
    if target is None:
        return pruned_graph(model, plan, masked, example)
    reference = Reference(model, masked, example, training=training)
    restore = restore_point(target)
    try:
        collapse(target, plan, masked)
        reference.check(target)
    except BaseException:
        restore()
        raise
    return target

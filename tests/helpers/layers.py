"""Layers of a network with their adapters, as the library's inner functions take them."""

from torch import Tensor, nn

from lnr_prune.calibration.adapter import AdaptedLayer
from lnr_prune.calibration.reading import adapted
from lnr_prune.graph.groups import find_groups


def layers_of(model: nn.Module, x: Tensor) -> dict[str, AdaptedLayer]:
    """All that a forward pass of x calls: weight's name -> layer."""
    return {layer.weight: adapted(layer, bias=True) for layer in find_groups(model, (x,), {}).layers}

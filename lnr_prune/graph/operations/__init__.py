"""What operations do to the owners of the channels that go through them.

Each module registers its rules: for operations that only move data (``moves``), that apply weights (``layers``), that
multiply activations (``products``), that mix along some axes (``norms``), and that work on images (``spatial``),
and that draw random numbers (``noise``).
Pointwise operations need none, see `lnr_prune.graph.rules`. What has no rule freezes the channels that it touches.
"""

from lnr_prune.graph.operations import layers, moves, noise, norms, products, spatial

__all__ = ["layers", "moves", "noise", "norms", "products", "spatial"]

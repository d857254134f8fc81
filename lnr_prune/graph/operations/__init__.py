"""What operations do to the owners of the channels that go through them.

Each module registers its rules: for operations that only move data (``moves``), that read or write at indices
(``indices``), that apply weights (``layers``), that multiply activations (``products``), that mix along some axes
(``norms``) or reduce them (``reductions``), that work on images (``spatial``), that draw random numbers (``noise``),
and for recurrent layers (``recurrent``). Pointwise operations need none, see `lnr_prune.graph.rules`. What has no rule
freezes the channels that it touches.
"""

from lnr_prune.graph.operations import indices, layers, moves, noise, norms, products, recurrent, reductions, spatial

__all__ = ["indices", "layers", "moves", "noise", "norms", "products", "recurrent", "reductions", "spatial"]

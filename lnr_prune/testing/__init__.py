"""The public contract of adapters, and random networks to test with: for us and for third parties.

What comes in: an adapter, with a model that it reads. What goes out of `check_adapter` is nothing, or an AdapterError
that names the promise that is broken. `networks` is a hypothesis strategy of random networks made of the patterns of
real ones; `random_network` draws one from a seed, `make_network` builds the one that was drawn.
"""

from lnr_prune.testing.adapters import check_adapter
from lnr_prune.testing.networks import PATTERNS, make_network, networks, random_network

__all__ = ["PATTERNS", "check_adapter", "make_network", "networks", "random_network"]

"""The public contract of adapters, and random networks to test with, for this package and for third parties.

What comes in: an adapter, with a model that it can read. `check_adapter` returns nothing, or raises an AdapterError
that names the broken promise. `networks` is a hypothesis strategy for random networks, made of patterns of real ones;
`random_network` draws a network from a seed, and `make_network` builds the network that was drawn.
"""

from lnr_prune.testing.adapters import check_adapter
from lnr_prune.testing.networks import Network, make_network, networks, random_network
from lnr_prune.testing.patterns import PATTERNS

__all__ = ["PATTERNS", "Network", "check_adapter", "make_network", "networks", "random_network"]

"""
4. Write your own adapter
=========================

An adapter tells the method how to read one kind of layer: what is x, what is y, which columns of x belong to
which channel, and how a new matrix becomes weights. Everything else (groups, solvers, refit, removal) is done for
you. This one is part of the package, whole:

.. literalinclude:: /../adapters/lnr_adapters/columns.py
   :language: python

"""

# %%
# One of your own
# ---------------
# The smallest change of variables that shows every method: it reads ``2 x``, so its matrix is half the weight, and a
# matrix is doubled when it is written. The solutions are scaled too, so this one prunes as the package's own does
# with half the penalty.

import torch
from torch import nn

import lnr_prune as lnr
from lnr_prune.calibration.adapter import adapters, unregister
from lnr_prune.testing import check_adapter

ours = adapters()["columns_bias"]


class Doubled:
    """``y = (W / 2) (2 x) + b``, the bias as a last column that is not penalised."""

    name = "doubled"

    def matches(self, consumer):
        """Where ours is: it steps aside below, because exactly one adapter must fit a layer."""
        return ours.matches(consumer)

    def inputs(self, consumer, call, rows=None):
        x = call.input.reshape(-1, call.input.shape[-1])
        x = x if rows is None else x[rows]
        return torch.cat([2 * x, x.new_ones(len(x), 1)], dim=1)

    def outputs(self, consumer, call, rows=None):
        y = call.output.reshape(-1, call.output.shape[-1])
        return y if rows is None else y[rows]

    def groups(self, consumer, weight):
        return torch.cat([consumer.channels, consumer.channels.new_tensor([-1])])

    def matrix(self, consumer, weight, bias):
        weight = weight if consumer.dim == 1 else weight.T
        return torch.cat([weight / 2, bias[:, None]], dim=1)

    def write(self, consumer, M, weight):
        new, bias = 2 * M[:, :-1], M[:, -1]
        return new if consumer.dim == 1 else new.T, bias


# %%
# The contract
# ------------
# `check_adapter` tries everything that the library relies on, on a model of yours, in float64: that no other
# adapter fits, that ``y = M x`` holds, that samples are independent, that every channel has its columns, that
# writing M back gives the layer, and that pruning equals masking.

unregister("columns_bias")
doubled = Doubled()
lnr.register(doubled)
model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
check_adapter(doubled, model, torch.randn(64, 8))
print("the contract holds")

# %%
# A mistake is named. This one forgets the factor on the way back:


class Forgetful(Doubled):
    name = "forgetful"

    def write(self, consumer, M, weight):
        return M[:, :-1], M[:, -1]


unregister("doubled")
lnr.register(forgetful := Forgetful())
try:
    check_adapter(forgetful, model, torch.randn(64, 8))
except lnr.AdapterError as error:
    print(error)

# %%
# In use
# ------
# `prune` finds the adapter by asking each of them whether it matches.

unregister("forgetful")
lnr.register(doubled)
pruned = lnr.prune(model, [torch.randn(512, 8)], lnr.Keep(0.5))
print(pruned.model)

# %%
# Back to how it was:

unregister("doubled")
lnr.register(ours)

# %%
# In a package of yours
# ---------------------
# Register at import, and name the module in ``pyproject.toml``; the library imports it when it looks for adapters.
#
# .. code-block:: toml
#
#     [project.entry-points."lnr_prune.adapters"]
#     mine = "my_package.my_adapters"

"""Whole sessions on real data, run by the ``lnr-prune`` command.

``session`` runs the whole reference session on LeNet-5: train (``lenet5``) on real digits (``data``), prune the last
layer and the whole network, sweep, and compare solvers on a toy problem (``toy``). ``settings`` says what can be set,
and ``results`` and ``plots`` show what was found. ``demo`` trains and prunes small networks within seconds. Recipes
need the ``recipes`` extra; the library does not.
"""

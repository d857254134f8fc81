"""Whole sessions on real data, run by the ``lnr-prune`` command.

``session`` is the reference session on LeNet-5, in one run: train (``lenet5``) on real digits (``data``), prune the
last layer and the whole network, sweep, compare solvers on a problem with a known answer (``toy``); ``settings`` is
what it may be asked, ``results`` and ``plots`` what it shows. Recipes need the ``recipes`` extra; the library does not.
"""

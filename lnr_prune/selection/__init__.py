"""How many channels every group keeps, and which.

What comes in: what the user asks for (`Keep` and `Penalty` in ``amount``, `Budget` in ``budget``) and groups with their
second moments. Under a budget, ``curves`` measures the error that pruning a group causes in the outputs (on held-out
samples, see ``honest``), and ``cost_model`` says what the group costs in parameters or multiply-accumulates.
``allocation`` divides the budget, and ``search`` tries it out on real networks (``trials``). ``cost`` counts and times
a model, and ``memory`` knows beforehand how much memory is needed. ``selectors`` choose the channels of one group,
``select`` those of all groups. What goes out: a support for every group.
"""

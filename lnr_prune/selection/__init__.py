"""How many channels every group keeps, and which.

What comes in: what the user asks for (`Keep` and `Penalty` in ``amount``, `Budget` in ``budget``) and groups with their
second moments. Under a budget, ``curves`` measures the error that pruning a group causes in the outputs (on held-out
samples, see ``honest``), and ``costs`` says what the group costs in parameters or multiply-accumulates. ``allocation``
divides the budget, and ``search`` tries it out on real networks (``trials``). ``selectors`` choose the channels of one
group, ``select`` those of all groups. What goes out: a support for every group.
"""

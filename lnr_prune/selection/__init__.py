"""How many channels every group keeps, and which.

What comes in: what the user asks for (`Keep` and `Penalty` in ``amount``, `Budget` in ``budget``) and groups with their
second moments. Under a budget ``curves`` measures what every group costs the outputs, ``cost_model`` what it costs in
parameters or multiply-accumulates, ``allocation`` divides the budget, and ``search`` tries it out with real networks
(``trials``); ``cost`` counts and times a model, ``memory`` knows beforehand what all this needs. ``selectors`` choose
the channels of one group, ``select`` those of all. What goes out: a support for every group.
"""

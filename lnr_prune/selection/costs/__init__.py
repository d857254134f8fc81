"""What a model costs, and what its pruning costs.

In: a model, its channel groups and an example. Out: parameters, multiply-accumulates, bytes and times (``cost``), at
any sizes of the groups (``cost_model``); and how much memory (``memory``) and time (``forecast``) a prune needs.
"""

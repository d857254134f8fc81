"""Every way of pruning a network to a budget that the accuracy benchmark compares."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

import lnr_prune as lnr
from benchmarks.library import peers
from benchmarks.library.sentences import EMBEDDINGS
from benchmarks.library.tasks import Task
from lnr_prune.selection.selectors import Selector

Level = tuple[str, float]
"""What is limited, "params" or "macs", and the share of it that may be left."""
Method = Callable[[list[Any], int], nn.Module]
"""Calibration batches and a seed -> the pruned network."""

LEVELS: dict[str, tuple[Level, ...]] = {
    "lenet5": (("params", 0.11), ("params", 0.034), ("params", 0.018), ("params", 0.010)),
    **{f"resnet{depth}": tuple(("macs", share) for share in (2 / 3, 0.5, 0.4, 1 / 3)) for depth in (20, 32, 44, 56)},
    # of the parameters outside the embeddings; uniform, the second is half of the MLPs and three quarters of the heads
    "minilm": tuple(("params", EMBEDDINGS + (1 - EMBEDDINGS) * share) for share in (0.7, 0.583912, 0.4)),
    "efficientnet_lite0": (("macs", 0.8), ("macs", 0.65)),
    "digits_mlp": (("macs", 0.25), ("macs", 0.1), ("macs", 0.05)),
    "digits_cnn": (("macs", 0.5), ("macs", 0.25), ("macs", 0.1)),
}
SELECTORS: dict[str, Callable[[int], Selector]] = {
    "group_lasso": lambda _: lnr.Lasso(),
    "backward": lambda _: lnr.Backward(),
    "backward, 8 swaps": lambda _: lnr.Backward(swaps=8),
    "norm": lambda _: lnr.Norm(),
    "random": lnr.Random,
}
"""Seed -> the selector."""


def methods(task: Task, level: Level, *, search: int = 0, refits: int = 100, iterations: int = 10) -> dict[str, Method]:
    """Name -> (batches, seed) -> the pruned network.

    Args:
        task: The network and its data.
        level: The budget.
        search: Trials of a local search, in a row of its own; 0 = no such row.
        refits: Groups for which budgets measure what the refit leaves; 100 = all.
        iterations: Of the row whose refit has a window of two layers.
    """
    kind, share = level
    graph = peers.graph_of(task)
    sizes = peers.uniform(task, graph, kind, share)
    limits: dict[str, Any] = {kind: share}
    budget = lnr.Budget(**limits, effort=lnr.Effort(samples=task.measured, refits=refits))

    def ours(name: str, amount: lnr.Budget | lnr.Keep, window: int = 1) -> Method:
        def prune(batches: list[Any], seed: int) -> nn.Module:
            return lnr.prune(
                task.model, batches, amount, selector=SELECTORS[name](seed),
                refit=lnr.Refit(window=window, iterations=iterations), logits=task.logits, run=lnr.Run(progress=False),
            ).model  # fmt: skip

        return prune

    def peer(criterion: str, sharing: str, finish: str) -> Method:
        def prune(batches: list[Any], seed: int) -> nn.Module:
            scores = peers.scores_of(criterion, task, graph, seed)
            kept = peers.highest(task, graph, kind, share, scores) if sharing == "global" else sizes
            return peers.finished(task, graph, kept, scores, batches, finish)

        return prune

    every = {f"budget, {name}": ours(name, budget) for name in ("group_lasso", "backward", "norm")}
    every["budget, backward, window 2"] = ours("backward", budget, window=2)
    if search:
        searched = replace(budget, effort=replace(budget.effort, search=search))
        every[f"budget, backward, {search} trials"] = ours("backward", searched)
    every |= {f"uniform, {name}": ours(name, lnr.Keep(sizes)) for name in SELECTORS}
    for criterion in peers.criteria(task):
        for sharing in ("uniform", "global"):
            for finish in peers.finishes(task):
                every[f"peer, {sharing}, {criterion}, {finish}"] = peer(criterion, sharing, finish)
    return every

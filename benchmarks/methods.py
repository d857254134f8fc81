"""Every way of pruning a network to a budget that the accuracy benchmark compares."""

from collections.abc import Callable
from typing import Any

from torch import nn

import lnr_prune as lnr
from benchmarks import peers
from benchmarks.sentences import EMBEDDINGS
from benchmarks.tasks import Task

Level = tuple[str, float]
"""What is limited, "params" or "macs", and the share of it that may be left."""
Method = Callable[[list[Any], int], nn.Module]
"""Calibration batches and a seed -> the pruned network."""

LEVELS: dict[str, tuple[Level, ...]] = {
    "lenet5": (("params", 0.11), ("params", 0.034), ("params", 0.018), ("params", 0.010)),
    **{f"resnet{depth}": tuple(("macs", share) for share in (2 / 3, 0.5, 0.4, 1 / 3)) for depth in (20, 32, 44, 56)},
    # of the parameters outside the embeddings; uniform, the second is half of the MLPs and three quarters of the heads
    "minilm": tuple(("params", EMBEDDINGS + (1 - EMBEDDINGS) * share) for share in (0.7, 0.583912, 0.4)),
    "digits_mlp": (("macs", 0.25), ("macs", 0.1), ("macs", 0.05)),
    "digits_cnn": (("macs", 0.5), ("macs", 0.25), ("macs", 0.1)),
}
TANDEM = 10
SELECTORS = ("group_lasso", "backward", "backward_swap", "norm", "random")


def methods(task: Task, level: Level, search: int) -> dict[str, Method]:
    """Name -> (batches, seed) -> the pruned network; ``search`` trials in a row of its own, 0 = no such row."""
    kind, share = level
    graph = peers.graph_of(task)
    sizes = peers.uniform(task, graph, kind, share)

    def ours(selector: str, **amount: Any) -> Method:
        return lambda batches, seed: (
            lnr.prune(
                task.model, batches, selector=selector, logits=task.logits, seed=seed, progress=False, **amount
            ).model
        )

    def peer(criterion: str, sharing: str, finish: str) -> Method:
        def prune(batches: list[Any], seed: int) -> nn.Module:
            scores = peers.scores_of(criterion, task, graph, seed)
            kept = peers.highest(task, graph, kind, share, scores) if sharing == "global" else sizes
            return peers.finished(task, graph, kept, scores, batches, finish)

        return prune

    every = {
        f"budget, {name}": ours(name, budget=budget_of(task, level)) for name in ("group_lasso", "backward", "norm")
    }
    every["budget, backward, tandem"] = ours("backward", budget=budget_of(task, level), tandem=TANDEM)
    if search:
        every[f"budget, backward, {search} trials"] = ours("backward", budget=budget_of(task, level, search))
    every |= {f"uniform, {name}": ours(name, keep=sizes) for name in SELECTORS}
    for criterion in peers.criteria(task):
        for sharing in ("uniform", "global"):
            for finish in peers.finishes(task):
                every[f"peer, {sharing}, {criterion}, {finish}"] = peer(criterion, sharing, finish)
    return every


def budget_of(task: Task, level: Level, search: int = 0) -> lnr.Budget:
    """The library's budget."""
    limits: dict[str, Any] = dict([level])
    return lnr.Budget(samples=task.measured, refits=100, search=search, **limits)  # of all groups


def is_peer(method: str) -> bool:
    """Whether a method has nothing of ours in it."""
    return method.startswith("peer, ") and not method.endswith(", refit")

"""The peers' ways to choose channels, at the sizes of a budget, and three ways to finish the network after it.

Equal shares of the inner channels, or (as Torch-Pruning's global pruning) the highest of all groups' normalised scores.
Torch-Pruning's graph also finds the heads of an attention, and scores them; "bn_scale" is for networks with batch norms
only. Its own removal is not used: the channels that it would choose are taken out by ours.
"""

import copy
import importlib.util
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.library.tasks import Task
from lnr_prune.calibration.calls import samples_in, shortened
from lnr_prune.calibration.data import calibrate
from lnr_prune.calibration.reading import read_in_passes
from lnr_prune.collapse.collapse import collapse
from lnr_prune.collapse.plan import make_plan
from lnr_prune.collapse.trial import shrinkable
from lnr_prune.graph.groups import Graph, find_groups
from lnr_prune.refit.network import refit_network
from lnr_prune.selection.costs.cost_model import cost_of

TORCH_PRUNING = {
    "magnitude": "GroupMagnitudeImportance",
    "taylor": "GroupTaylorImportance",
    "bn_scale": "BNScaleImportance",
    "fpgm": "FPGMImportance",
}
TAYLOR = 8  # labelled batches that its gradients are summed over

Scores = Mapping[str, Tensor]
"""Name of a group -> importance of each of its channels, of mean one."""
Sizes = Mapping[str, float]
"""Name of a group -> channels kept; groups that are not named stay whole."""


def graph_of(task: Task) -> Graph:
    """The groups that the module itself can lose channels of."""
    example = shortened(task.example)
    graph = find_groups(task.model, *example)
    return replace(graph, groups=shrinkable(copy.deepcopy(task.model), graph.groups, example)[0])


def limit(task: Task, graph: Graph, kind: str, share: float) -> tuple[Callable[[Sizes], float], float]:
    """What the network costs at these sizes of some groups, and what a share of the whole network's cost is."""
    cost = cost_of(task.model, graph, kind, samples_in(shortened(task.example)))

    def spent(sizes: Sizes) -> float:
        return cost({group: sizes.get(group.name, group.size) for group in graph.groups})  # type: ignore[misc]

    return spent, share * spent({})


def uniform(task: Task, graph: Graph, kind: str, share: float) -> dict[str, int]:
    """Equal shares of the inner channels, as close to the budget as whole channels allow.

    The shares that meet the budget exactly are rounded down; then, while one fits, another channel goes to the group
    that is furthest below its share.
    """
    spent, most = limit(task, graph, kind, share)
    whole = {group.name: group.size for group in graph.groups}

    def shrunk(removed: float) -> dict[str, float]:
        return {name: max(1.0, whole[name] * (1 - removed * weight)) for name, weight in task.inner.items()}

    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if spent(shrunk(middle)) <= most else (middle, high)
    ideal = shrunk(high)
    sizes = {name: int(size + 1e-6) for name, size in ideal.items()}
    while True:
        more = {name: {**sizes, name: size + 1} for name, size in sizes.items() if size < whole[name]}
        fitting = [name for name, raised in more.items() if spent(raised) <= most]
        if not fitting:
            return sizes
        sizes = more[min(fitting, key=lambda name: (sizes[name] - ideal[name]) / whole[name])]


def highest(task: Task, graph: Graph, kind: str, share: float, scores: Scores) -> dict[str, int]:
    """How many channels each group keeps if those of the lowest scores leave, whatever group they are of."""
    spent, most = limit(task, graph, kind, share)
    every = torch.cat(list(scores.values())).sort().values

    def above(threshold: Tensor) -> dict[str, int]:
        return {name: max(1, int((of_group >= threshold).sum())) for name, of_group in scores.items()}

    low, high = 0, len(every) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if spent(above(every[middle])) <= most else (middle + 1, high)
    return above(every[high])


def scores_of(criterion: str, task: Task, graph: Graph, seed: int) -> Scores:
    """Importance of every inner channel: "l1" is the filters' L1 norm, the others are Torch-Pruning's."""
    groups = {group.name: group for group in graph.groups}
    if criterion == "l1":
        scores = {name: _l1(task.model, groups[name].producers) for name in task.inner}
    else:
        scores = _torch_pruning(TORCH_PRUNING[criterion], task, seed)
    # a head's score is the mean of its rows', as Torch-Pruning has it
    scores = {name: score.detach().reshape(groups[name].size, -1).mean(1) for name, score in scores.items()}
    return {name: score / score.mean() for name, score in scores.items()}


def _l1(model: nn.Module, producers: Iterable[str]) -> Tensor:
    return torch.stack([model.get_parameter(f"{name}.weight").abs().flatten(1).sum(1) for name in producers]).sum(0)


def _torch_pruning(importance: str, task: Task, seed: int) -> dict[str, Tensor]:
    pruning: Any = importlib.import_module("torch_pruning")
    model = copy.deepcopy(task.model).requires_grad_(True)
    if "Taylor" in importance:
        for batch in itertools.islice(task.epoch(seed), TAYLOR):
            task.loss(model, batch).backward()
    args, kwargs = shortened(task.example)
    dependencies = pruning.DependencyGraph().build_dependency(model, example_inputs=kwargs or args)
    score, scores = getattr(pruning.importance, importance)(), {}
    for name in task.inner:
        layer = model.get_submodule(name)
        prune = pruning.prune_conv_out_channels if isinstance(layer, nn.Conv2d) else pruning.prune_linear_out_channels
        rows = list(range(len(layer.get_parameter("weight"))))
        scores[name] = score(dependencies.get_pruning_group(layer, prune, idxs=rows))
    return scores


def criteria(task: Task) -> tuple[str, ...]:
    """What can be asked of this network here."""
    if not importlib.util.find_spec("torch_pruning"):
        return ("l1",)
    return ("l1", *(name for name in TORCH_PRUNING if name != "bn_scale" or batch_norms(task.model)))


def finishes(task: Task) -> tuple[str, ...]:
    """What may follow."""
    return ("raw", "bn", "refit") if batch_norms(task.model) else ("raw", "refit")


def batch_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    """All that there are."""
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def finished(
    task: Task, graph: Graph, sizes: Mapping[str, int], scores: Scores, batches: Iterable[Any], finish: str
) -> nn.Module:
    """The network with the channels of the highest scores: "raw", with "bn" statistics of its own, or our "refit"."""
    data = calibrate(task.model, batches)
    supports = {group: _largest(scores[group.name], sizes[group.name]) for group in graph.groups if group.name in sizes}
    weights: Mapping[str, Tensor] = {}
    if finish == "refit":
        passes = read_in_passes(task.model, [], list(supports), data, bias=True)
        repeated = passes.moments_of(graph.repeated)
        weights = refit_network(task.model, graph, supports, data, logits=task.logits, repeated=repeated).weights
    model = copy.deepcopy(task.model)
    collapse(model, make_plan(supports), weights)
    if finish == "bn":
        for norm in batch_norms(model):
            norm.reset_running_stats()
            norm.momentum = None  # averages over all batches
            norm.train()
        with torch.no_grad():
            for args, kwargs in data:
                model(*args, **kwargs)
    return model.eval()


def _largest(scores: Tensor, count: int) -> Tensor:
    support = torch.zeros(len(scores), dtype=torch.bool)
    support[scores.argsort(descending=True, stable=True)[:count]] = True
    return support

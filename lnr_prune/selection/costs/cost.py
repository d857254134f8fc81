"""What a model costs: parameters, multiply-accumulates, bytes and time."""

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from statistics import median

import torch
from torch import nn
from torch.utils.benchmark import Timer
from torch.utils.benchmark.utils.timer import timer as now
from torch.utils.flop_counter import FlopCounterMode

from lnr_prune.calibration.calls import Call, forward, fresh, run, samples_in
from lnr_prune.calibration.visible.recurrent import VisibleRecurrence
from lnr_prune.calibration.watch import LayerCall, watch
from lnr_prune.graph.groups import Graph
from lnr_prune.graph.module import evaluating, unfused_attention


def parameters(model: nn.Module) -> int:
    """Number of parameters; shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def size(model: nn.Module) -> int:
    """Bytes of the parameters and buffers; shared ones count once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def macs(model: nn.Module, example: Call) -> int:
    """Multiply-accumulates of contractions (linear layers, convolutions, attention) for one sample.

    One sample is one entry of the first axis of the first tensor of ``example``.
    """
    return macs_by_module(model, example)[0]


def macs_by_module(model: nn.Module, example: Call) -> tuple[int, dict[str, int]]:
    """`macs`, and those of every module by itself, without the modules inside of it, in order of execution."""
    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}  # torch knows the GPUs'
    with FlopCounterMode(display=False, custom_mapping=attention) as counter, VisibleRecurrence():
        run(model, example)
    of_one = 2 * max(1, samples_in(example))
    root = type(model).__name__  # which torch's names begin with
    counts = {name: sum(operations.values()) for name, operations in counter.get_flop_counts().items()}
    found = {name.removeprefix(root).removeprefix("."): count for name, count in counts.items() if name != "Global"}
    inside = Counter[str]()
    for name, count in found.items():
        if name:
            inside[name.rpartition(".")[0]] += count
    each = {name: (count - inside[name]) // of_one for name, count in found.items()}
    return int(counter.get_total_flops() // of_one), each


def _attention_flops(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: object, **__: object) -> int:
    """Operations of the scores and of the weighted sums, from the shapes."""
    return 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def counted(model: nn.Module, graph: Graph, example: Call) -> Graph:
    """The graph of a model; where multiply-accumulates depend on the data, they are those of the example.

    A mask may pick the rows that a layer is applied to: how many they are, only the data says.
    """
    if not graph.estimated:
        return graph
    found, transposed = Counter[str](), {each.weight for each in graph.layers if "transpose" in each.op}

    def see(name: str, layer: LayerCall) -> None:
        where = layer.input if name in transposed else layer.output
        channels = where.shape[-1 if layer.weight.dim() == 2 else 1]
        found[name] += where.numel() // channels * layer.weight.numel()

    watch(model, example, graph.estimated, see)
    return replace(graph, macs={**graph.macs, **found})


def latency(model: nn.Module, example: Call, seconds: float = 0.5) -> float:
    """Median time of a forward pass in evaluation mode, in seconds, on the model's device and threads."""
    timer = Timer(
        "forward(model, fresh(example))",
        globals={"forward": forward, "fresh": fresh, "model": model, "example": example},
        num_threads=torch.get_num_threads(),
    )
    with evaluating(model), unfused_attention():
        return float(timer.blocked_autorange(min_run_time=seconds).median)


def side_by_side(models: Sequence[nn.Module], example: Call, rounds: int = 5) -> list[float]:
    """Median time of a forward pass of each model, in seconds, after one pass to warm up.

    The models take turns in every round, so that whatever else the machine does slows down all of them alike.
    """
    times: list[list[float]] = [[] for _ in models]
    with ExitStack() as stack:
        stack.enter_context(unfused_attention())
        for model in models:
            stack.enter_context(evaluating(model))
            forward(model, fresh(example))
        for _ in range(rounds):
            for model, taken in zip(models, times, strict=True):
                call, begin = fresh(example), now()
                forward(model, call)
                taken.append(now() - begin)
    return [median(taken) for taken in times]

"""How much memory a prune needs, known before the data is read: bytes for the statistics, the solves and the refit."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor

from lnr_prune.calibration.adapter import AdaptedLayer
from lnr_prune.calibration.reading import adapted_layers
from lnr_prune.errors import LnrPruneError
from lnr_prune.graph.groups import ChannelGroup, Graph
from lnr_prune.graph.weights import tensor_named
from lnr_prune.refit.network import refitted_layers
from lnr_prune.refit.refit import Refit

logger = logging.getLogger("lnr_prune")
SOLVE = (8, 16)  # copies of R, (d, d), and of B, (h, d), that a solve makes; measured: the group lasso makes most
REFIT = (12, 15)  # the same for a layer's refit, including its moments
JOINT = (6, 7)  # for each of two layers refitted together; as many of (h, h), and 2 more of (h, d) per iteration
PASS = 0.5  # in low memory, moments of at most this share of the largest solve's bytes are gathered at a time
FLOAT64 = 8
SHOWN = 3  # layers that an error names


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that are alive at once. Activations, which depend on the batches, and the model come on top.

    Attributes:
        layers: Weight's name -> bytes of its second moments, ``16 d^2`` for both halves of the samples.
        passes: The groups whose second moments are in memory together, pass by pass.
        lasting: Groups whose second moments stay in memory from the start.
        at_once: Bytes of the second moments that are in memory together.
        later: Bytes of the second moments that are still in memory during a refit.
        solve: More bytes for the group that needs most, ``8 (8 d^2 + 16 h d)`` summed over its consumers.
        largest: Name of that group.
        refit: Bytes for the layer that needs most when it is refitted, ``8 (12 d^2 + 15 h d)``. If it is refitted
            with another, ``8 (6 d^2 + 6 h^2 + (7 + 2 iterations) h d)`` for each of the two. 0 = there is no refit.
        refitted: Name of that layer.
    """

    layers: Mapping[str, int]
    passes: tuple[tuple[ChannelGroup, ...], ...]
    lasting: tuple[ChannelGroup, ...]
    at_once: int
    later: int
    solve: int
    largest: str
    refit: int
    refitted: str

    @property
    def total(self) -> int:
        """What the selection needs, or the refit, whichever is more."""
        return max(self.at_once + self.solve, self.later + self.refit)

    def __str__(self) -> str:
        refit = f", {_gigabytes(self.refit)} to refit layer {self.refitted!r}" if self.refit else ""
        passes = f", in {len(self.passes)} passes" if len(self.passes) > 1 else ""
        return (
            f"{_gigabytes(self.total)} ({_gigabytes(self.at_once)} for the second moments of {len(self.layers)} "
            f"layers{passes}, {_gigabytes(self.solve)} to solve group {self.largest!r}{refit})"
        )

    def check(self, available: int | None, low: "MemoryPlan") -> None:
        """Refuses a prune that does not fit into memory.

        Args:
            available: Bytes that are available; None = not known.
            low: The plan for low memory, which is advised if it fits.

        Raises:
            LnrPruneError: The message says what is needed, what is available, and what to do.
        """
        logger.info("memory: %s; available: %s", self, "not known" if available is None else _gigabytes(available))
        if available is None or self.total <= available:
            return
        most = sorted(self.layers, key=lambda name: -self.layers[name])[:SHOWN]
        named = ", ".join(f"{name.removesuffix('.weight')!r} {_gigabytes(self.layers[name])}" for name in most)
        if low.total <= available:
            advice = f"give run=Run(low_memory=True), which needs {_gigabytes(low.total)}"
        elif self.refit > available:
            advice = "do without the refit: refit=None"
        elif self.solve + max(self.layers.values(), default=0) <= available:
            advice = "prune a few groups at a time: Keep({name: ...}) reads the layers of these groups only"
        else:
            advice = "leave that group whole: Keep({name: ...}) names those that are pruned"
        raise LnrPruneError(
            f"pruning needs {self}, but {_gigabytes(available)} are available (the largest: {named}). Free memory, "
            f"use a larger machine, or {advice}"
        )


def memory_plan(
    graph: Graph,
    groups: Sequence[ChannelGroup],
    tensors: Mapping[str, Tensor],
    *,
    bias: bool,
    refit: Refit | None = Refit(),
    tried: bool = False,
    low_memory: bool = False,
) -> MemoryPlan:
    """The plan for groups of a model.

    Args:
        graph: The model's channel groups.
        groups: The groups that may be pruned, in order of execution.
        tensors: The model's tensors.
        bias: Whether biases are refitted.
        refit: How the layers are refitted; None = not at all.
        tried: Whether the layers are also refitted before the channels are chosen.
        low_memory: Whether the moments are gathered for a few groups at a time: for at least one group, and for no more
            than need `PASS` of the largest solve's bytes. Else for all groups at once.
    """
    iterations = 0 if refit is None else refit.joint_iterations
    readers = {group: adapted_layers(group, bias) for group in groups}
    layers = {layer.consumer.weight: _bytes(layer, tensors, (2, 0)) for of in readers.values() for layer in of}
    solves = {group.name: sum(_bytes(layer, tensors, SOLVE) for layer in of) for group, of in readers.items()}
    reached = {} if refit is None else refitted_layers(graph, groups, bias)
    refits = {layer.consumer.name: _bytes(layer, tensors, REFIT) for layer in reached.values()}
    for group, of in readers.items() if iterations else ():
        makers = [_bytes_jointly(reached[weight], tensors, iterations) for weight, _ in group.rows if weight in reached]
        for layer in (layer for layer in of if makers and layer.consumer.weight in reached):
            together = max(makers) + _bytes_jointly(layer, tensors, iterations)
            refits[layer.consumer.name] = max(refits[layer.consumer.name], together)
    (largest, solve), (refitted, most) = (
        max(of.items(), key=itemgetter(1), default=("", 0)) for of in (solves, refits)
    )

    def moments(some: Iterable[ChannelGroup]) -> int:
        return sum(layers[weight] for weight in {layer.consumer.weight for group in some for layer in readers[group]})

    passes: list[tuple[ChannelGroup, ...]] = [()]
    for group in groups:
        if low_memory and passes[-1] and moments((*passes[-1], group)) > PASS * solve:
            passes.append(())
        passes[-1] = (*passes[-1], group)
    again = tuple(g for g in groups if any(layer.consumer.weight in graph.repeated for layer in readers[g]))
    lasting = again if len(passes) > 1 else tuple(groups)
    at_once = max(map(moments, passes)) + (moments(again) if len(passes) > 1 else 0)
    later = moments(lasting if tried else again)
    return MemoryPlan(layers, tuple(passes), lasting, at_once, later, solve, largest, most, refitted)


def _bytes(layer: AdaptedLayer, tensors: Mapping[str, Tensor], copies: tuple[int, int]) -> int:
    """Bytes of so many copies of R, (d, d), and of B, (h, d)."""
    h, d = shape_of(layer, tensors)
    return FLOAT64 * (copies[0] * d * d + copies[1] * h * d)


def _bytes_jointly(layer: AdaptedLayer, tensors: Mapping[str, Tensor], iterations: int) -> int:
    h, d = shape_of(layer, tensors)
    return FLOAT64 * (JOINT[0] * (d * d + h * h) + (JOINT[1] + 2 * iterations) * h * d)


def shape_of(layer: AdaptedLayer, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Numbers of rows and columns of a layer's matrix, (h, d)."""
    return tensor_named(tensors, layer.consumer.weight).shape[1 - layer.consumer.dim], len(layer.groups(tensors))


def available_memory(device: torch.device) -> int | None:
    """Bytes that are available on a device now; None if the system does not say."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(
            device
        )  # torch holds it, and reuses it
        return int(torch.cuda.mem_get_info(device)[0] + cached)
    found = [left for left in (_of_machine(), _of_group()) if left is not None]
    return min(found, default=None)


def _of_machine() -> int | None:
    """Linux's own estimate."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return None


def _of_group(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container's limit leaves; pages that only cache files count as free."""
    try:
        limit, used = (int((folder / f"memory.{name}").read_text(encoding="ascii")) for name in ("max", "current"))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        return limit - used + int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
    except (OSError, ValueError):  # no limit is "max"
        return None


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"

"""What a prune needs in memory, known before the data is read: bytes for the statistics and for the solve."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lnr_prune.errors import LnrPruneError
from lnr_prune.registry import Pair

logger = logging.getLogger("lnr_prune")

COPIES = 12  # of a layer's second moments that are alive while it is solved or refitted, its own among them; measured
FLOAT64 = 8
SHOWN = 3  # layers that an error names


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that are alive at once.

    Attributes:
        layers: Weight's name -> bytes of its second moments, ``8 d^2``.
        solve: Bytes besides for the group that needs most, ``8 ((COPIES - 1) d^2 + 3 h d)`` summed over its
            consumers.
        largest: Name of that group.
    """

    layers: Mapping[str, int]
    solve: int
    largest: str

    @property
    def statistics(self) -> int:
        """Bytes of all second moments."""
        return sum(self.layers.values())

    @property
    def total(self) -> int:
        """Statistics and solve."""
        return self.statistics + self.solve

    def __str__(self) -> str:
        return (
            f"{_gigabytes(self.total)} ({_gigabytes(self.statistics)} for the second moments of {len(self.layers)} "
            f"layers, {_gigabytes(self.solve)} to solve group {self.largest!r})"
        )

    def check(self, available: int | None) -> None:
        """Refuses what does not fit.

        Raises:
            LnrPruneError: It says what is needed, what there is, and what to do.
        """
        logger.info("memory: %s; available: %s", self, "not known" if available is None else _gigabytes(available))
        if available is None or self.total <= available:
            return
        most = sorted(self.layers, key=lambda name: -self.layers[name])[:SHOWN]
        named = ", ".join(f"{name.removesuffix('.weight')!r} {_gigabytes(self.layers[name])}" for name in most)
        advice = (
            "prune a few groups at a time: keep={name: ...} reads the layers of these groups only"
            if self.solve + max(self.layers.values()) <= available
            else "leave that group whole: keep={name: ...} names those that are pruned"
        )
        raise LnrPruneError(
            f"pruning needs {self}, but {_gigabytes(available)} are available (the largest: {named}). Free memory, "
            f"use a larger machine, or {advice}"
        )


def memory_plan(groups: Mapping[str, Sequence[Pair]], tensors: Mapping[str, Tensor]) -> MemoryPlan:
    """The plan for groups, name -> their consumers."""
    layers: dict[str, int] = {}
    solves = {"": 0}
    for name, pairs in groups.items():
        solves[name] = 0
        for pair in pairs:
            weight = tensors[pair.consumer.weight]
            d, h = len(pair.groups(tensors)), weight.shape[1 - pair.consumer.dim]
            layers[pair.consumer.weight] = FLOAT64 * d * d
            solves[name] += FLOAT64 * ((COPIES - 1) * d * d + 3 * h * d)
    largest = max(solves, key=lambda name: solves[name])
    return MemoryPlan(layers, solves[largest], largest)


def available_memory(device: torch.device) -> int | None:
    """Bytes that can be had on a device now; None where nobody says."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
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
    """What a container's limit leaves; pages that only cache files can be had back."""
    try:
        limit, used = (int((folder / f"memory.{name}").read_text(encoding="ascii")) for name in ("max", "current"))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        return limit - used + int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
    except (OSError, ValueError):  # no limit is "max"
        return None


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"

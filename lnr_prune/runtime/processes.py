"""Calibration on several processes, and how they exchange values through torch.distributed.

Within a process group, every rank calls `lnr_prune.prune` with the same model and arguments, and with its own shard of
the calibration data. Sums over samples are summed over the ranks. One rank chooses each group's channels, all ranks
solve the same equations of the refit, and all end with the same pruned model. If the shards consist of whole batches
and follow one another, the result is the one that a single process gives.

The processes that prune together are a `Ranks` object, which is passed to every step that needs it; `ALONE` is a single
process, for which every method is the identity. Ranks communicate only in `Ranks.all_gather`, or right after it. What
only one rank knows must never decide whether it takes part. A rank that fails, wherever it is, sends its error to the
others at their next exchange (`Ranks.together`), so all of them raise it. If a rank is killed, or does not answer
within the process group's timeout, the others end with a `RankError`.

The default process group is used, with any backend. With NCCL, first set each rank's device by `torch.cuda.set_device`.
Each rank holds a whole model, which may be spread over devices (``device_map`` of accelerate, whose hooks move the
inputs). A wrapped or sharded model is refused, see `lnr_prune.graph.module.plain`: give the module inside
DistributedDataParallel, or load the full state dict of a model under FSDP into a plain model.
"""

import gc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils._pytree import tree_map

from lnr_prune.errors import RankError
from lnr_prune.runtime.digest import digest_of

Value = TypeVar("Value")
TIMEOUT = timedelta(minutes=30)  # how long a rank of the command waits for the others: longer than a solve


@dataclass(frozen=True)
class Ranks:
    """The processes that prune together, as one of them sees them.

    Attributes:
        rank: Which of them this is.
        size: How many there are.

    Example:
        >>> ALONE.all_gather("hello")
        ['hello']
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def of_process_group(cls) -> "Ranks":
        """The ranks of torch.distributed's default process group; a single one if there is no group."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within, either all ranks succeed or all raise.

        Raises:
            RankError: If another rank has failed, or is lost. An error that all ranks share is raised as it is.
        """
        try:
            yield
        except RankError:  # the others know it already
            raise
        except Exception as error:
            self.all_gather(None, error=error)
            raise
        self.all_gather(None)

    def all_gather(self, value: Value, *, error: Exception | None = None) -> list[Value]:
        """The values of all ranks, in rank order.

        Args:
            value: This rank's value, which must be picklable. Tensors come back on the kind of device that they were
                on.
            error: The error that this rank has failed with, if it has no value.

        Raises:
            RankError: If a rank has failed, or is lost.
        """
        if self.size == 1:
            return [value]
        text = None if error is None else (type(error).__name__, str(error))
        answers: list[Any] = [None] * self.size
        said = _each_tensor(value, Tensor, lambda tensor: _Sent(tensor.detach().cpu(), tensor.device.type))
        with self._connected():
            dist.all_gather_object(answers, (text, said))
        failed = {index: text for index, (text, _) in enumerate(answers) if text is not None}
        if error is not None and len(failed) == self.size and len(set(failed.values())) == 1:
            raise error
        if failed:
            what = "; ".join(f"rank {index}: {kind}: {text}" for index, (kind, text) in failed.items())
            raise RankError(f"{len(failed)} of {self.size} ranks failed. {what}") from error
        return [_each_tensor(answer, _Sent, lambda sent: sent.tensor.to(sent.device)) for _, answer in answers]

    def all_sum(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Sums over the ranks; tensors must have the same shapes on all of them, and may be overwritten."""
        return self._reduced(tensors, dist.all_reduce)

    def broadcast(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The first rank's values; tensors must have the same shapes on all ranks."""
        return self._reduced(tensors, lambda tensor: dist.broadcast(tensor, 0))

    def share_out(self, tasks: Sequence[Callable[[], Value]]) -> list[Value]:
        """The results of all tasks; each task is done by one rank, in turn (round robin)."""
        done = self.all_gather([task() for task in tasks[self.rank :: self.size]])
        return [done[index % self.size][index // self.size] for index in range(len(tasks))]

    def shard(self, items: Sequence[Value]) -> Sequence[Value]:
        """This rank's part of items that all ranks have: consecutive ones, in rank order."""
        start, end = (-(-len(items) * index // self.size) for index in (self.rank, self.rank + 1))
        return items[start:end]

    def before(self, count: int | None) -> tuple[int, int | None]:
        """Sum of the counts of the earlier ranks, and of all ranks; 0 and None if a count is unknown."""
        counts = self.all_gather(count)
        known = [each for each in counts if each is not None]
        return (sum(known[: self.rank]), sum(known)) if len(known) == len(counts) else (0, None)

    def check_same(self, what: str, value: object) -> None:
        """Checks that all ranks have the same value.

        Raises:
            ValueError: If they do not.
        """
        values = self.all_gather(value)
        for index, other in enumerate(values):
            if other != values[0]:
                raise ValueError(f"rank {index} has other {what} than rank 0: give all ranks the same")

    def checksums(self, model: nn.Module) -> Mapping[str, str]:
        """Name of every parameter and buffer -> SHA-256 of its values; empty for a single process."""
        if self.size == 1:
            return {}
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return {name: digest_of({name: tensor}) for name, tensor in tensors.items() if not tensor.is_meta}  # offloaded

    def _reduced(self, tensors: Sequence[Tensor], collective: Callable[[Tensor], Any]) -> tuple[Tensor, ...]:
        if self.size == 1:
            return tuple(tensors)
        device = {"gloo": "cpu", "nccl": "cuda"}.get(dist.get_backend())
        there = [tensor.detach().to(device or tensor.device).contiguous() for tensor in tensors]
        self.all_gather(None)
        with self._connected():
            for tensor in there:
                collective(tensor)
        return tuple(result.to(tensor.device) for result, tensor in zip(there, tensors, strict=True))

    @contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RankError(
                f"rank {self.rank} has lost the others: one of the {self.size} has ended, or did not answer within the "
                f"process group's timeout ({str(error).splitlines()[0]}). Start all of them again"
            ) from error


ALONE = Ranks()
"""A single process, even if there is a process group."""


@contextmanager
def launched(device: str) -> Iterator[tuple[str, Ranks]]:
    """Opens a process group if torchrun has started this process; within, all ranks are `Ranks.together`.

    Args:
        device: Where the model is to run. With "cuda", every process of a machine gets its own GPU.

    Yields:
        The device of this process, and the ranks.
    """
    ranks = Ranks.of_process_group()
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys() or ranks.size > 1:
        yield device, ranks
        return
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", timeout=TIMEOUT)
    try:
        ranks = Ranks.of_process_group()
        with ranks.together():
            yield device, ranks
    finally:
        dist.destroy_process_group()
        gc.collect()  # ends the group's threads: freeing a tensor in one while Python exits would abort the process


@dataclass(frozen=True, eq=False)
class _Sent:
    tensor: Tensor
    device: str


def _each_tensor(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """The value with the function applied to every tensor in it; ``kind`` is the type of the tensors."""

    def of(leaf: Any) -> Any:
        if isinstance(leaf, kind):
            return function(leaf)
        if (
            is_dataclass(leaf) and not isinstance(leaf, type) and type(leaf).__module__.startswith("lnr_prune")
        ):  # one of our results
            return replace(
                leaf, **{each.name: _each_tensor(getattr(leaf, each.name), kind, function) for each in fields(leaf)}
            )
        return leaf

    return tree_map(of, value)

"""Calibration on several processes: what they tell one another, through torch.distributed.

Within a process group every rank calls `lnr_prune.prune` with the same model and arguments and a shard of its own of
the calibration data. Sums over samples are summed over the ranks, each group's channels are chosen by one rank, the
refit's equations are solved by all alike, and all end with the same pruned model. Shards of whole batches that follow
one another give what one process gives. Without a process group, or within `alone`, all functions are the identity.

Ranks meet in `everyone` alone, or right behind it. A rank that fails, wherever it is, answers the meeting that the
others wait at with its error (`together`), so all of them raise it. A rank that is killed, or does not answer within
the process group's timeout, ends the others with a `RankError`.

The default process group is used, of any backend; with NCCL set each rank's device first, by `torch.cuda.set_device`.
Each rank holds a whole model, which may be spread over devices (``device_map`` of accelerate, whose hooks move the
inputs). A wrapped or sharded one is refused, see `whole`: give the module inside of DistributedDataParallel, or load
the full state dict of a model under FSDP into a plain one.
"""

import gc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, is_dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils._pytree import tree_map

from lnr_prune.errors import GraphError, RankError
from lnr_prune.record import digest_of

Value = TypeVar("Value")
TIMEOUT = timedelta(minutes=30)  # of what a rank of the command waits for: longer than a solve
WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")

_alone: ContextVar[bool] = ContextVar("alone", default=False)


def ranks() -> int:
    """Number of processes that prune together."""
    return 1 if _alone.get() or not (dist.is_available() and dist.is_initialized()) else dist.get_world_size()


def rank() -> int:
    """Which of them this is."""
    return dist.get_rank() if ranks() > 1 else 0


@contextmanager
def alone() -> Iterator[None]:
    """Within, this process prunes by itself, whatever process group there is.

    Example:
        >>> with alone():
        ...     ranks()
        1
    """
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


@contextmanager
def launched(device: str) -> Iterator[str]:
    """The process group of the processes that torchrun has started, if it has; within, they are `together`.

    Args:
        device: Where the model is to run. With "cuda" every process of a machine gets a GPU of its own.

    Yields:
        The device of this process.
    """
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys() or ranks() > 1:
        yield device
        return
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", timeout=TIMEOUT)
    try:
        with together():
            yield device
    finally:
        dist.destroy_process_group()
        gc.collect()  # ends the group's threads: one that frees a tensor while Python ends would abort the process


@contextmanager
def together() -> Iterator[None]:
    """All ranks leave this well, or all raise.

    Raises:
        RankError: If another rank has failed, or is lost. An error that all ranks have alike is raised as it is.
    """
    try:
        yield
    except RankError:  # the others know
        raise
    except Exception as error:
        everyone(None, error=error)
        raise
    everyone(None)


def everyone(value: Value, *, error: Exception | None = None) -> list[Value]:
    """The values of all ranks, in their order.

    Args:
        value: What this rank has to say: something that can be pickled. Tensors come back on the kind of device that
            they are on.
        error: What this rank has failed with, instead.

    Raises:
        RankError: If a rank has failed, or is lost.
    """
    if ranks() == 1:
        return [value]
    text = None if error is None else (type(error).__name__, str(error))
    answers: list[Any] = [None] * ranks()
    said = _each_tensor(value, Tensor, lambda tensor: _Sent(tensor.detach().cpu(), tensor.device.type))
    with _connected():
        dist.all_gather_object(answers, (text, said))
    failed = {index: text for index, (text, _) in enumerate(answers) if text is not None}
    if error is not None and len(failed) == ranks() and len(set(failed.values())) == 1:
        raise error
    if failed:
        what = "; ".join(f"rank {index}: {kind}: {text}" for index, (kind, text) in failed.items())
        raise RankError(f"{len(failed)} of {ranks()} ranks failed. {what}") from error
    return [_each_tensor(answer, _Sent, lambda sent: sent.tensor.to(sent.device)) for _, answer in answers]


def summed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Sums over the ranks, of tensors that have the same shapes on all; these may be overwritten."""
    return _reduced(tensors, dist.all_reduce)


def shared(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The first rank's values of tensors that all have, up to rounding."""
    return _reduced(tensors, lambda tensor: dist.broadcast(tensor, 0))


def spread(tasks: Sequence[Callable[[], Value]]) -> list[Value]:
    """The results of all tasks, each of which one rank does: round robin."""
    count = ranks()
    done = everyone([task() for task in tasks[rank() :: count]])
    return [done[index % count][index // count] for index in range(len(tasks))]


def shard(items: Sequence[Value]) -> Sequence[Value]:
    """This rank's part of what all ranks have: consecutive items, the first rank's first."""
    start, end = (-(-len(items) * index // ranks()) for index in (rank(), rank() + 1))
    return items[start:end]


def before(count: int | None) -> tuple[int, int | None]:
    """Sum of the earlier ranks' numbers, and of all; 0 and None if one is not known."""
    counts = everyone(count)
    known = [each for each in counts if each is not None]
    return (sum(known[: rank()]), sum(known)) if len(known) == len(counts) else (0, None)


def same(what: str, value: object) -> None:
    """Checks that all ranks have the same.

    Raises:
        ValueError: If they do not.
    """
    values = everyone(value)
    for index, other in enumerate(values):
        if other != values[0]:
            raise ValueError(f"rank {index} has other {what} than rank 0: give all ranks the same")


def checksums(model: nn.Module) -> Mapping[str, str]:
    """Name of every parameter and buffer -> SHA-256 of its values; empty in a single process."""
    if ranks() == 1:
        return {}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: digest_of({name: tensor}) for name, tensor in tensors.items() if not tensor.is_meta}  # offloaded


def whole(model: nn.Module) -> None:
    """Checks that a model is not wrapped or sharded.

    Raises:
        GraphError: If it is; the message says what to give instead.
    """
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind in WRAPPERS and type(module).__module__.startswith("torch."):
            path = "model" + "".join(f".{part}" for part in name.split(".") if part)
            raise GraphError(
                f"{path} is wrapped in {kind}: prune the plain module inside, {path}.module (under FSDP: a plain copy "
                "with the full state dict), with all ranks in their process group, and wrap the pruned model again"
            )
    sharded = next((name for name, tensor in model.named_parameters() if hasattr(tensor, "placements")), None)
    if sharded is not None:
        raise GraphError(
            f"the parameter {sharded!r} is sharded over processes (a DTensor): load the full state dict into a plain "
            "model, prune that on every rank, and shard the pruned one"
        )


def _reduced(tensors: Sequence[Tensor], collective: Callable[[Tensor], Any]) -> tuple[Tensor, ...]:
    if ranks() == 1:
        return tuple(tensors)
    device = {"gloo": "cpu", "nccl": "cuda"}.get(dist.get_backend())
    there = [tensor.detach().to(device or tensor.device).contiguous() for tensor in tensors]
    everyone(None)
    with _connected():
        for tensor in there:
            collective(tensor)
    return tuple(result.to(tensor.device) for result, tensor in zip(there, tensors, strict=True))


@contextmanager
def _connected() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RankError(
            f"rank {rank()} has lost the others: one of the {ranks()} has ended, or did not answer within the process "
            f"group's timeout ({str(error).splitlines()[0]}). Start all of them again"
        ) from error


@dataclass(frozen=True, eq=False)
class _Sent:
    tensor: Tensor
    device: str


def _each_tensor(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """The value with a function of every tensor in it; tensors are of this kind."""

    def of(leaf: Any) -> Any:
        if isinstance(leaf, kind):
            return function(leaf)
        if (
            is_dataclass(leaf) and not isinstance(leaf, type) and type(leaf).__module__.startswith("lnr_prune")
        ):  # a result of ours
            return replace(
                leaf, **{each.name: _each_tensor(getattr(leaf, each.name), kind, function) for each in fields(leaf)}
            )
        return leaf

    return tree_map(of, value)

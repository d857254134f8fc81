"""Calibration data: any iterable of batches -> calls of the model."""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lnr_prune.calibration.calls import Call, Inputs, _checked, _moved, check_model, run, samples_in, shortened
from lnr_prune.errors import CalibrationError
from lnr_prune.runtime.digest import digest
from lnr_prune.runtime.processes import ALONE, Ranks

SAMPLES = 256  # on which outputs are compared, unless more are asked for


@dataclass(frozen=True, eq=False)
class Calibration:
    """Batches that can be gone through again and again, as calls of one model.

    Attributes:
        batches: The data, re-iterable.
        as_call: Turns a batch into the model's arguments.
    """

    batches: Iterable[Any]
    as_call: Inputs

    def __iter__(self) -> Iterator[Call]:
        for batch in self.batches:
            call = self.as_call(batch)
            if samples_in(call):  # the last batch of a filtered data set may be empty
                yield call

    @cached_property
    def samples(self) -> int | None:
        """Number of samples, where that can be known without reading the data: lists and data loaders."""
        if isinstance(self.batches, Sequence):
            return sum(samples_in(batch) for batch in self.batches)
        sampler = getattr(self.batches, "sampler", None)
        return len(sampler) if isinstance(sampler, Sized) else None

    def example(self) -> Call:
        """The arguments of the first batch.

        Raises:
            CalibrationError: If there is none.
        """
        for call in self:
            return call
        raise CalibrationError("the calibration data holds no batch; give at least one batch of inputs")


@dataclass(frozen=True)
class Batches:
    """Data whose batches have a form of their own.

    Attributes:
        data: An iterable of batches.
        inputs: Turns a batch into ``(args, kwargs)`` of the model.

    Raises:
        TypeError: If inputs cannot be called.

    Example:
        >>> import torch
        >>> data = Batches([{"image": torch.zeros(2, 3), "id": 7}], lambda batch: ((batch["image"],), {}))
    """

    data: Any
    inputs: Inputs

    def __post_init__(self) -> None:
        if not callable(self.inputs):
            raise TypeError(f"inputs must be a function of a batch that returns (args, kwargs), got {self.inputs!r}")


def calibrate(model: nn.Module, data: Any) -> Calibration:
    """Reads calibration data for a model.

    Args:
        model: The model; tensors are moved to the device of its parameters.
        data: An iterable of batches. A batch is a tensor; a tuple or list, of which as many leading entries
            are taken as the model's forward requires (so the label of a pair is ignored); or a dict of keyword
            arguments (entries called "label" or "labels" are left out unless forward names them). A single
            tensor or dict is one batch. `Batches` say themselves what makes a call of a batch of any other form. What
            can be gone through only once is kept in memory. Batches without samples are passed over.

    Raises:
        TypeError: If model is no module.
        CalibrationError: If data is not iterable; while iterating, if a batch cannot be read.
    """
    check_model(model)
    read = data.inputs if isinstance(data, Batches) else _reader(model)
    data = data.data if isinstance(data, Batches) else data
    if isinstance(data, Tensor | Mapping):
        data = [data]
    if not isinstance(data, Iterable):
        raise CalibrationError(
            f"calibration data must be an iterable of batches, got {type(data).__name__}; wrap a batch in a list"
        )
    once = isinstance(data, Iterator) or (not isinstance(data, Sized) and iter(data) is iter(data))
    batches = list(data) if once else data
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))

    def as_call(batch: Any) -> Call:
        moved: Call = tree_map(lambda leaf: _moved(leaf, device), _checked(read(batch)))
        return moved

    return Calibration(batches, as_call)


def short_example(model: nn.Module, data: Calibration) -> Call:
    """Arguments of a small forward pass: the first batch, cut to two samples where the model allows."""
    example = data.example()
    short = shortened(example)
    try:
        run(model, short)
    except CalibrationError:
        run(model, example)
        return example
    return short


def _reader(model: nn.Module) -> Inputs:
    parameters = inspect.signature(model.forward).parameters
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [name for name, p in parameters.items() if p.kind in positional and p.default is p.empty]
    count = max(1, len(required))

    def read(batch: Any) -> Call:
        if isinstance(batch, Tensor):
            return (batch,), {}
        if isinstance(batch, Mapping):
            kept = {k: v for k, v in batch.items() if k in parameters or k not in ("label", "labels")}
            return (), kept
        if isinstance(batch, tuple | list) and len(batch) >= count:
            return tuple(batch[:count]), {}
        size = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise CalibrationError(
            f"a batch is a {type(batch).__name__}{size}, expected a tensor, a dict of keyword arguments or a tuple "
            f"that starts with forward's {count} required arguments {tuple(required)}; wrap the "
            "data in lnr_prune.Batches(data, inputs)"
        )

    return read


@dataclass(frozen=True, eq=False)
class FixedCalibration(Calibration):
    """Calibration data that has to be the same in every pass, else a CalibrationError says which batch is not."""

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """SHA-256 of every batch, as a call of the model; the first pass tells."""
        return tuple(map(digest, super().__iter__()))

    def __iter__(self) -> Iterator[Call]:
        number = -1
        for number, call in enumerate(super().__iter__()):
            if self.digests[number : number + 1] != (digest(call),):
                raise self._other(number)
            yield call
        if number + 1 < len(self.digests):
            raise self._other(number + 1)

    def _other(self, number: int) -> CalibrationError:
        return CalibrationError(
            f"batch {number} of the calibration data is not what it was in the first pass; with a work folder all "
            "passes must give the same: turn off shuffling and random augmentation, or give list(loader), drawn with "
            "a fixed seed. A model that writes into its inputs needs clones of them"
        )


def first_samples(data: Iterable[Call], samples: int = SAMPLES, ranks: Ranks = ALONE) -> list[Call]:
    """The first batches, the first rank's before the second's, until they hold so many samples; all ranks get all."""
    calls, sizes = list[Call](), list[int]()
    for call in data:
        calls.append(call)
        sizes.append(samples_in(call))
        if sum(sizes) >= samples:
            break
    chosen, count = list[tuple[int, int]](), 0
    for source, of_rank in enumerate(ranks.all_gather(sizes)):
        for index, size in enumerate(of_rank):
            if count < samples:
                chosen.append((source, index))
                count += size
    known = ranks.all_gather({index: calls[index] for source, index in chosen if source == ranks.rank})
    return [known[source][index] for source, index in chosen]

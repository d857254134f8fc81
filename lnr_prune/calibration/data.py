"""Calibration data: any iterable of batches -> calls of the model."""

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lnr_prune.calibration.calls import Call, Inputs, _checked, _moved, samples_in, shortened
from lnr_prune.calibration.forms.samples import batched
from lnr_prune.calibration.forms.values import as_tensors, remedy
from lnr_prune.calibration.places import Counts, Place, attended, everything, halves
from lnr_prune.errors import CalibrationError
from lnr_prune.graph.module import check_model
from lnr_prune.runtime.digest import digest
from lnr_prune.runtime.processes import ALONE, Ranks

SAMPLES = 256  # outputs are compared on so many samples, unless more are asked for


@dataclass(frozen=True, eq=False)
class Calibration:
    """Batches that can be iterated over again and again, as calls of one model.

    Attributes:
        batches: The data, re-iterable.
        as_call: Turns a batch into the model's arguments.
        counts: Says which positions of a call count.
    """

    batches: Iterable[Any]
    as_call: Inputs
    counts: Counts = everything

    def __iter__(self) -> Iterator[Call]:
        for batch in self.batches:
            call = self.as_call(batch)
            if samples_in(call):  # the last batch of a filtered data set may be empty
                yield call

    @cached_property
    def samples(self) -> int:
        """Number of samples. This takes a pass over the data, unless a data loader's sampler knows it."""
        sampler = getattr(self.batches, "sampler", None)
        if isinstance(sampler, Sized):
            return len(sampler)
        return sum(map(samples_in, Calibration.__iter__(self)))

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
    """Data whose batches have a custom form.

    Attributes:
        data: An iterable of batches.
        inputs: Turns a batch into ``(args, kwargs)`` of the model.
        counts: Called with the model's arguments, it says which positions count, (samples, positions) bool; all others
            are padding. Default: where ``attention_mask``, if the model has such an argument, is not zero.

    Raises:
        TypeError: If inputs or counts cannot be called.

    Example:
        >>> import torch
        >>> data = Batches([{"image": torch.zeros(2, 3), "id": 7}], lambda batch: ((batch["image"],), {}))
    """

    data: Any
    inputs: Inputs
    counts: Callable[..., Tensor] | None = None

    def __post_init__(self) -> None:
        if not (self.counts is None or callable(self.counts)):
            raise TypeError(
                f"counts must be a function of the model's arguments that returns a mask, got {self.counts!r}"
            )
        if not callable(self.inputs):
            raise TypeError(f"inputs must be a function of a batch that returns (args, kwargs), got {self.inputs!r}")


def calibrate(model: nn.Module, data: Any) -> Calibration:
    """Reads calibration data for a model.

    Args:
        model: The model; tensors are moved to the device of its parameters.
        data: An iterable of batches. A batch is a tensor or an array, a tuple or list, or a dict of keyword arguments.
            Of a tuple or list, the first entries are taken, as many as the model's forward requires: the label of a
            pair is ignored. Of a dict, "label" and "labels" are left out, unless forward names them. A single tensor,
            array or dict is one batch. Data sets of samples (a torch or Hugging Face Dataset, a data frame, a list of
            rows) are read in batches of 64, in their order. Values of type float64 become the model's type. For
            batches of any other form, give `Batches`, which are taken as they are. Data that can be read only once is
            kept in memory. Batches without samples are skipped.

    Raises:
        TypeError: If model is not a module.
        CalibrationError: If data is not iterable; while iterating, if a batch cannot be read.
    """
    check_model(model)
    counts = _attended(model)
    if isinstance(data, Batches):
        counts = counts if data.counts is None else partial(_counted, data.counts)
        read, data, wide = data.inputs, data.data, False
    else:
        discrete = any(isinstance(part, nn.Embedding | nn.EmbeddingBag) for part in model.modules())
        read = _reader(model, discrete)
        data = batched(data, inspect.signature(model.forward).parameters, discrete)
        wide = True
    data = [data] if isinstance(data, Tensor | Mapping | np.ndarray) else data
    if not isinstance(data, Iterable) or isinstance(data, str | os.PathLike):
        raise CalibrationError(
            f"calibration data must be an iterable of batches, got {type(data).__name__}; {remedy(data)}"
        )
    once = isinstance(data, Iterator) or (not isinstance(data, Sized) and iter(data) is iter(data))
    batches = list(data) if once else data
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    narrow = _narrow_type(model) if wide else None

    def moved(leaf: Any) -> Any:
        leaf = _moved(leaf, device)
        return leaf.to(narrow) if narrow and isinstance(leaf, Tensor) and leaf.dtype == torch.float64 else leaf

    def as_call(batch: Any) -> Call:
        call: Call = tree_map(moved, _checked(read(batch)))
        return call

    return Calibration(batches, as_call, counts)


def _attended(model: nn.Module) -> Counts:
    """What `attended` says of a call, of which some arguments are given by their places."""
    names = list(inspect.signature(model.forward).parameters)
    return lambda call: attended({**dict(zip(names, call[0], strict=False)), **call[1]})


def _counted(given: Callable[..., Tensor], call: Call) -> Tensor:
    """What the user's function says of a call, once it is known to be a mask."""
    mask, samples = given(*call[0], **call[1]), samples_in(call)
    if not isinstance(mask, Tensor) or mask.is_floating_point() or mask.shape[:1] != (samples,) or mask.dim() > 2:
        got = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise CalibrationError(
            f"counts() returned {got}, expected a bool tensor of shape (samples, positions), here ({samples}, ...): "
            "True where a position counts"
        )
    return mask != 0


def _narrow_type(model: nn.Module) -> torch.dtype | None:
    """The type that a model computes in, None if some of it is of type float64."""
    types = [t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    return None if torch.float64 in types else next(iter(types), None)


def _reader(model: nn.Module, discrete: bool) -> Inputs:
    parameters = inspect.signature(model.forward).parameters
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [name for name, p in parameters.items() if p.kind in positional and p.default is p.empty]
    count = max(1, len(required))

    def read(given: Any) -> Call:
        batch = as_tensors(given, discrete)
        if isinstance(batch, Tensor):
            return (batch,), {}
        if isinstance(batch, Mapping):
            kept = {k: v for k, v in batch.items() if k in parameters or k not in ("label", "labels")}
            return (), kept
        if isinstance(batch, tuple | list) and len(batch) >= count and not isinstance(batch[0], str):
            return tuple(batch[:count]), {}
        size = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        first = batch[0] if size and isinstance(next(iter(batch), None), str) else batch
        raise CalibrationError(
            f"a batch is a {type(batch).__name__}{size}, expected a tensor, a dict of keyword arguments or a tuple "
            f"that starts with forward's {count} required arguments {tuple(required)}; {remedy(first)}"
        )

    return read


@dataclass(frozen=True, eq=False)
class FixedCalibration(Calibration):
    """Calibration data that must be the same in every pass; if not, a CalibrationError names the batch that differs."""

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """SHA-256 of every batch, as a call of the model, taken in the first pass."""
        return tuple(map(self._digest, super().__iter__()))

    def __iter__(self) -> Iterator[Call]:
        number = -1
        for number, call in enumerate(super().__iter__()):
            if self.digests[number : number + 1] != (self._digest(call),):
                raise self._other(number)
            yield call
        if number + 1 < len(self.digests):
            raise self._other(number + 1)

    def _digest(self, call: Call) -> str:
        mask = self.counts(call)
        return digest(call) if mask is None else digest((call, mask))

    def _other(self, number: int) -> CalibrationError:
        return CalibrationError(
            f"batch {number} of the calibration data is not what it was in the first pass; with a work folder, all "
            "passes must give the same batches: turn off shuffling and random augmentation, or give list(loader), "
            "drawn with a fixed seed"
        )


def first_samples(data: Iterable[Call], samples: int = SAMPLES, ranks: Ranks = ALONE) -> list[Call]:
    """The first batches that hold ``samples`` samples together, in order of the ranks; every rank gets all of them."""
    calls, count = list[Call](), 0
    for call in data:
        calls.append(call)
        count += samples_in(call)
        if count >= samples:
            break
    return _shared(calls, samples, ranks)


def first_of_each_half(
    data: Calibration, samples: int | None = SAMPLES, ranks: Ranks = ALONE
) -> tuple[list[Call], list[Call]]:
    """Samples to fit on, and as many to judge by; see `lnr_prune.calibration.places`. Every rank gets all of them.

    Args:
        data: The calibration data. The first samples of each half are taken.
        samples: How many of each half; None = all.
        ranks: The processes that prune together.
    """
    wanted = data.samples if samples is None else samples
    found: tuple[list[Call], list[Call]] = ([], [])
    counts = [0, 0]
    for judges, piece in _pieces(data, ranks):
        if counts[judges] < wanted:
            found[judges].append(piece)
            counts[judges] += samples_in(piece)
        if min(counts) >= wanted:
            break
    fit, judge = (_shared(calls, wanted, ranks) for calls in found)
    return fit, judge


def each_half(data: Calibration, ranks: Ranks = ALONE) -> tuple[Calibration, Calibration]:
    """This process's samples to fit on, and those to judge by: all of them, as in `first_of_each_half`."""
    found: tuple[list[Call], list[Call]] = ([], [])
    for judges, piece in _pieces(data, ranks):
        found[judges].append(piece)
    fit, judge = (Calibration(calls, lambda call: call, data.counts) for calls in found)
    return fit, judge


def _pieces(data: Calibration, ranks: Ranks) -> Iterator[tuple[bool, Call]]:
    """This process's batches, each cut into samples that judge (True) and others."""
    first, total = ranks.before(data.samples)
    for call in data:
        place = Place(first, samples_in(call), total or 0)
        yield from halves(call, place)
        first += place.size


def _shared(calls: Sequence[Call], samples: int, ranks: Ranks) -> list[Call]:
    """The first ``samples`` samples of all ranks, in order of the ranks."""
    chosen, count = list[tuple[int, int, int]](), 0
    for source, sizes in enumerate(ranks.all_gather([samples_in(call) for call in calls])):
        for index, size in enumerate(sizes):
            if count < samples:
                chosen.append((source, index, samples - count))
                count += size
    mine = {index: shortened(calls[index], left) for source, index, left in chosen if source == ranks.rank}
    known = ranks.all_gather(mine)
    return [known[source][index] for source, index, _ in chosen]

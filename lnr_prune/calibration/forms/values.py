"""Arrays, data frames and lists of numbers as tensors, and what to write for what cannot become one."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lnr_prune.errors import CalibrationError

NUMBERS = "biufc"  # kinds of numpy's types that are numbers


def as_tensors(batch: Any, discrete: bool) -> Any:
    """A batch whose arrays and data frames are tensors; so are its lists of numbers, if it holds no array or tensor.

    Args:
        batch: Any nesting of lists, tuples and dicts; what else it holds stays as it is.
        discrete: Whether the model reads whole numbers, such as tokens. If not, those of frames and lists, which were
            not meant as a type, become real ones.

    Raises:
        CalibrationError: If a frame holds anything but numbers, or a list has rows of different lengths.
    """
    if isinstance(batch, Mapping):
        batch = dict(batch)
    if any(isinstance(leaf, Tensor | np.ndarray) or is_frame(leaf) for leaf in tree_leaves(batch)):
        return tree_map(lambda leaf: _of_array(leaf, discrete), batch)
    return tree_map(lambda leaf: _of_list(leaf, discrete), batch, is_leaf=_is_list)


def is_frame(value: Any) -> bool:
    """Whether it is a data frame, such as those of pandas and polars."""
    return hasattr(value, "columns") and hasattr(value, "to_numpy")


def depth(value: Any) -> int:
    """How deep a list of numbers is nested: 1 for a row, 0 for a number, -1 for anything else."""
    if isinstance(value, int | float | np.number):
        return 0
    inner = {depth(item) for item in value} if isinstance(value, list | tuple) else {-1}
    return inner.pop() + 1 if len(inner) == 1 and -1 not in inner else -1


def of_frame(frame: Any, discrete: bool) -> Tensor:
    """A tensor of a data frame's rows.

    Raises:
        CalibrationError: If a column holds anything but numbers.
    """
    columns = {name: np.asarray(frame[name].to_numpy()) for name in frame.columns}
    for name, column in columns.items():
        if column.dtype.kind not in NUMBERS:
            raise CalibrationError(
                f"column {name!r} of the data frame is of type {frame[name].dtype}, expected numbers: leave it out "
                f"(frame.drop(columns=[{name!r}])), or encode it as it was in training"
            )
    return _typed(_of_numbers(np.column_stack(list(columns.values()))), discrete)


def remedy(value: Any) -> str:
    """What to write for a value that is no batch."""
    if isinstance(value, str):
        return "turn texts into tokens, such as tokenizer(texts, padding=True, return_tensors='pt')"
    if isinstance(value, os.PathLike):
        return "read the file first, such as numpy.load(path); the command line reads files: lnr-prune prune --data"
    if type(value).__module__.startswith("PIL."):
        return "turn images into tensors by the model's own transform, as in training"
    for method in ("toarray", "to_pandas"):  # sparse matrices, tables of pyarrow
        if hasattr(value, method):
            return f"give x.{method}()"
    return "wrap a batch in a list, or data of any other form in lnr_prune.Batches(data, inputs)"


def _of_array(value: Any, discrete: bool) -> Any:
    if is_frame(value):
        return of_frame(value, discrete)
    if isinstance(value, np.ndarray) and value.dtype.kind in NUMBERS:
        return _of_numbers(value)
    return value


def _of_numbers(array: "np.ndarray[Any, Any]") -> Tensor:
    kind = array.dtype.newbyteorder("=")  # torch has the machine's own order only, and few unsigned types
    return torch.from_numpy(np.array(array, np.int64 if kind.kind == "u" and kind.itemsize > 1 else kind))


def _is_list(value: Any) -> bool:
    return depth(value) > 0


def _of_list(value: Any, discrete: bool) -> Any:
    if not _is_list(value):
        return value
    try:
        return _typed(torch.tensor(value), discrete)
    except (TypeError, ValueError) as error:
        raise CalibrationError(
            f"a list of numbers cannot become a tensor: {error}. Pad its rows to one length, or give a loader whose "
            "collate_fn does it"
        ) from error


def _typed(numbers: Tensor, discrete: bool) -> Tensor:
    real = numbers.is_floating_point() or numbers.is_complex() or discrete
    return numbers if real else numbers.to(torch.get_default_dtype())

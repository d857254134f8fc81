"""Data sets whose items are single samples, as batches."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, default_collate

from lnr_prune.calibration.forms.values import as_tensors, depth, is_frame, of_frame, remedy
from lnr_prune.errors import CalibrationError

BATCH = 64  # samples that are read together, unless the user's own loader says it
LOADER = "give a DataLoader of it with the collate_fn that you trained with"


def batched(data: Any, arguments: Collection[str], discrete: bool) -> Any:
    """Batches of a data set of samples, in its order; all other data is returned as it is.

    Args:
        data: A data frame, a `torch.utils.data.Dataset`, one of Hugging Face's data sets, or a list of rows, which are
            lists of numbers, alone, with their label, or by name.
        arguments: Names of the model's arguments. Other columns of Hugging Face's data sets are left out.
        discrete: Whether the model reads whole numbers, see `as_tensors`.

    Raises:
        CalibrationError: If a frame holds anything but numbers, or a data set has no column that the model reads; while
            iterating, if samples cannot be put together.
    """
    if is_frame(data):
        return of_frame(data, discrete).split(BATCH)
    columns = _columns(data, arguments)
    if not (columns or isinstance(data, Dataset) or _holds_rows(data)):
        return data

    def together(samples: Sequence[Any]) -> Any:
        return _together(samples, columns, discrete, type(data).__name__)

    generator = torch.Generator()  # a loader draws a seed in every pass, and would draw it from the user's generator
    return DataLoader(data, batch_size=BATCH, collate_fn=together, generator=generator)


def _columns(data: Any, arguments: Collection[str]) -> list[str]:
    """The columns of one of Hugging Face's data sets that the model reads; [] for anything else."""
    if not (hasattr(data, "with_format") and hasattr(data, "column_names")):
        return []
    if not hasattr(data, "__len__"):
        raise CalibrationError("the data set is a stream: give some of its rows, such as list(data.take(512))")
    if columns := [name for name in data.column_names if name in arguments]:
        return columns
    raise CalibrationError(
        f"the data set has the columns {', '.join(data.column_names)}, the model reads {', '.join(arguments)}: map the "
        "tokenizer or the image processor over it first"
    )


def _holds_rows(data: Any) -> bool:
    """Whether it is a list whose items are single samples, made of plain numbers."""
    if not (isinstance(data, list | tuple) and len(data)):
        return False
    first = data[0]
    if any(isinstance(leaf, Tensor | np.ndarray) or is_frame(leaf) for leaf in tree_leaves(first)):
        return False
    if isinstance(first, Mapping):
        parts = list(first.values())
    else:  # a row, or a row and its label
        parts = list(first) if isinstance(first, list | tuple) and depth(first) < 0 else [first]
    return {depth(part) for part in parts} - {0, -1} == {1}


def _together(samples: Sequence[Any], columns: Sequence[str], discrete: bool, name: str) -> Any:
    """The samples as one batch."""
    if columns:
        samples = [{column: sample[column] for column in columns} for sample in samples]
    try:
        return default_collate([as_tensors(sample, discrete) for sample in samples])
    except (TypeError, RuntimeError, KeyError) as error:
        leaves = (leaf for leaf in tree_leaves(samples[0]) if not isinstance(leaf, Tensor | np.ndarray | int | float))
        advice = next((remedy(leaf) for leaf in leaves if not isinstance(leaf, str)), LOADER)
        why = str(error).splitlines()[0]
        raise CalibrationError(f"the samples of {name} cannot be put together in batches ({why}): {advice}") from error

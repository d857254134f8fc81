"""Checks of what `prune` is given, before any work is done."""

import math
import numbers
import os
from typing import Any

import numpy as np
import torch
from torch import nn

from lnr_prune.errors import GraphError
from lnr_prune.graph import named_tensors


def check_flags(**flags: Any) -> None:
    """Refuses anything but True and False: "no" would count as true.

    Raises:
        TypeError: It names the argument.
    """
    for name, value in flags.items():
        if not isinstance(value, bool | np.bool_):
            raise TypeError(f"{name} must be True or False, got {value!r}")


def check_settings(*, ridge: Any, seed: Any, tandem: Any, progress: Any, work: Any) -> None:
    """Refuses numbers out of range, a progress that is no function, a work that is no path.

    Raises:
        ValueError, TypeError: It names the argument.
    """
    if ridge is not None:
        if isinstance(ridge, bool) or not isinstance(ridge, numbers.Real):
            raise TypeError(f"ridge must be a number, or None to choose it, got {ridge!r}")
        if not (math.isfinite(ridge) and float(ridge) >= 0):
            raise ValueError(f"ridge must be >= 0 and finite, got {ridge}")
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
        raise TypeError(f"seed must be an int, got {seed!r}")
    if not -(2**63) <= int(seed) < 2**64:
        raise ValueError(f"seed must be in [-2^63, 2^64), got {seed}")
    if isinstance(tandem, bool) or not isinstance(tandem, numbers.Integral):
        raise TypeError(f"tandem must be an int, the number of iterations, got {tandem!r}")
    if tandem < 0:
        raise ValueError(f"tandem must be at least 0, got {tandem}")
    if not (progress is None or isinstance(progress, bool) or callable(progress)):
        raise TypeError(f"progress must be True, False, None or a function of a text, got {progress!r}")
    if not (work is None or isinstance(work, str | os.PathLike)):
        raise TypeError(f"work must be the path of a folder, or None, got {work!r}")


def check_values(model: nn.Module) -> None:
    """Refuses a model whose parameters have no values, or values that are not finite.

    Raises:
        GraphError: It names the parameter.
    """
    for name, tensor in named_tensors(model).items():
        if tensor.is_meta:
            raise GraphError(
                f"{name!r} is on the meta device, where tensors have no values: load the model's weights first"
            )
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            bad = int((~torch.isfinite(parameter)).sum())
            raise GraphError(
                f"{bad:,} of the {parameter.numel():,} values of parameter {name!r} are NaN or Inf: "
                "load a checkpoint whose values are finite"
            )

"""Optional packages, which only some features need."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from contextlib import suppress
from types import ModuleType

import torch

from lnr_prune.errors import LnrPruneError


def needed(package: str, install: str | None = None) -> ModuleType:
    """Imports an optional package; ``install`` is its name in the package index, if that is another one.

    Raises:
        LnrPruneError: If it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        package = install or package
        raise LnrPruneError(f"this needs {package}, which is not installed: run pip install {package}") from error


def require(module: str) -> ModuleType:
    """Imports a module of the ``recipes`` extra.

    Raises:
        LnrPruneError: If it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        raise LnrPruneError(
            f"this recipe needs {package}, which is not installed: run pip install 'lnr-prune[recipes]'."
        ) from error


def import_torchvision() -> ModuleType:
    """Imports torchvision, even if its CUDA build is installed next to a CPU-only torch."""
    try:
        return require("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        _declare_torchvision_operators()
        return require("torchvision")


def import_transformers() -> ModuleType:
    """Imports transformers, which imports torchvision for some models.

    Raises:
        LnrPruneError: If it is not installed.
    """
    with suppress(LnrPruneError):
        import_torchvision()
    return needed("transformers")


@functools.cache  # the declarations live as long as the object that made them
def _declare_torchvision_operators() -> torch.library.Library:
    """Lets a torchvision built for CUDA be imported next to a CPU-only torch.

    Its compiled operators fail to load there. The import then stops at the fake kernels of two of them, with
    "operator torchvision::nms does not exist". Declaring the two schemas is enough: data sets call neither.
    """
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library

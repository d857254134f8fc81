"""Real digits for the recipes: scikit-learn's embedded 8x8 digits, MNIST and Fashion-MNIST.

scikit-learn, torchvision and matplotlib come with the ``recipes`` extra and are imported only when they are needed.
The library itself never needs them.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lnr_prune.errors import LnrPruneError
from lnr_prune.runtime.optional import import_torchvision, require

DATA_ENVIRONMENT = "LNR_PRUNE_DATA"
TORCHVISION_NAMES = {"mnist": "MNIST", "fashion": "FashionMNIST"}
NAMES = ("digits", *TORCHVISION_NAMES)


# Mean and standard deviation of the training pixels, as published: trained weights expect exactly these numbers.
NORMALISATION = {"mnist": (0.1307, 0.3081), "fashion": (0.2860, 0.3530)}
DIGITS_TEST_SIZE = 360


@dataclass(frozen=True)
class Data:
    """Normalised (n, 1, 28, 28) images and their labels, split for training and testing."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def to(self, device: str) -> Data:
        """The same on a device.

        Raises:
            LnrPruneError: If the device cannot be used.
        """
        try:
            moved = [x.to(device) for x in (self.train_images, self.train_labels, self.test_images, self.test_labels)]
        except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
            raise LnrPruneError(f"cannot use the device {device!r}: {error}") from error
        return Data(self.name, *moved)


def load(name: str = "digits", root: str | Path | None = None) -> Data:
    """Loads a data set by name.

    Args:
        name: "digits" (embedded, no file needed), "mnist" or "fashion".
        root: Folder that holds ``MNIST/raw`` or ``FashionMNIST/raw``. Default: the environment variable
            ``LNR_PRUNE_DATA``. torchvision downloads missing files into it.

    Raises:
        ValueError: If no data set has this name.
        LnrPruneError: If the files, or the package that reads them, are missing.
    """
    if name == "digits":
        return _load_digits()
    if name not in TORCHVISION_NAMES:
        raise ValueError(f"unknown data set: got {name!r}, expected one of {', '.join(NAMES)}")
    train, test = _open_torchvision(TORCHVISION_NAMES[name], _data_root(name, root))
    mean, deviation = NORMALISATION[name]
    images = [(part.data[:, None].float() / 255 - mean) / deviation for part in (train, test)]
    return Data(name, images[0], train.targets, images[1], test.targets)


def batches(images: Tensor, labels: Tensor, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of (images, labels) batches, in an order drawn from the seed."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    for index in order.split(size):
        yield images[index], labels[index]


def _load_digits() -> Data:
    pixels, labels = require("sklearn.datasets").load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    images = functional.interpolate(images, size=(28, 28), mode="bilinear", align_corners=False)
    # The split does not depend on the user's seed, so that test accuracies of different runs stay comparable.
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = order[:DIGITS_TEST_SIZE], order[DIGITS_TEST_SIZE:]
    images = (images - images[train].mean()) / images[train].std()
    targets = torch.tensor(labels)
    return Data("digits", images[train], targets[train], images[test], targets[test])


def _data_root(name: str, root: str | Path | None) -> Path:
    given = root or os.environ.get(DATA_ENVIRONMENT)
    if not given:
        raise LnrPruneError(
            f"no folder for the data set {name!r}: give one with --data-root or the environment variable "
            f"{DATA_ENVIRONMENT}. It holds {TORCHVISION_NAMES[name]}/raw; missing files are downloaded."
        )
    folder = Path(given)
    if not folder.is_dir():
        raise LnrPruneError(f"the data folder must exist: got {str(folder)!r}. Create it, or name another one.")
    return folder


def _open_torchvision(dataset: str, root: Path) -> tuple[Any, Any]:
    opener = getattr(import_torchvision().datasets, dataset)
    raw = root / dataset / "raw"
    with tempfile.TemporaryDirectory() as scratch:
        try:
            # torchvision reads only unzipped files, and unzips in place, which a read-only folder does not allow.
            if not os.access(raw if raw.is_dir() else root, os.W_OK):
                shutil.copytree(raw, Path(scratch, dataset, "raw"), copy_function=shutil.copyfile)
                root = Path(scratch)
            return opener(root, train=True, download=True), opener(root, train=False, download=True)
        except (OSError, RuntimeError) as error:
            raise LnrPruneError(
                f"could not read {dataset}: expected {raw} to hold its four .gz files, and torchvision could not "
                f"download them ({error}). Put them there, or use --data digits."
            ) from error

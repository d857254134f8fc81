"""The reference session on the Caffe LeNet-5: train, prune fc2, prune the whole network, sweep, compare solvers.

The reference divides its second moments by the number of columns d of the pruned layer (the bias column
included), the library does not: the reference's ``lam`` is ``lam * d`` here.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from lnr_prune.errors import LnrPruneError
from lnr_prune.recipes import data as datasets
from lnr_prune.recipes.data import Data

LEARNING_RATE = 1e-3
CALIBRATION_BATCH = 250
LAM_EXPONENTS = (-4.0, -1.0)  # the reference's sweep of fc2
LAM_RATIO_EXPONENTS = (-3.0, 0.0)  # at 10**0 = 1, lambda_max, nothing is left to keep
WHOLE = "whole network"
FC2 = "fc2, with bias"

Advance = Callable[[str], None]
Classifier = Callable[[Tensor], Tensor]


class LeNet5(nn.Module):
    """The Caffe LeNet-5, 431,080 parameters at the default widths; a pruned one is narrower.

    Args:
        conv1: Filters of the first convolution.
        conv2: Filters of the second one.
        fc1: Outputs of the first linear layer.
    """

    def __init__(self, conv1: int = 20, conv2: int = 50, fc1: int = 500) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, conv1, 5)
        self.conv2 = nn.Conv2d(conv1, conv2, 5)
        self.fc1 = nn.Linear(16 * conv2, fc1)
        self.fc2 = nn.Linear(fc1, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, 1, 28, 28) -> logits (n, 10)."""
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        return self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Settings:
    """What a session may be asked; None stands for a default that depends on the data and on ``quick``.

    Attributes:
        data: "digits", "mnist" or "fashion".
        data_root: Folder of MNIST or Fashion-MNIST.
        weights: Trained weights (safetensors) to load instead of training.
        out: Folder for everything that is written.
        epochs: Passes over the training images.
        batch_size: Images a training step.
        calibration: Training images used for calibration.
        lam: The reference's penalty, for fc2.
        lam_ratio: Penalty of the whole network, as a fraction of every layer's lambda_max.
        sweep: Points of each Pareto sweep.
        retrain: Whether each point of the sweeps is also retrained for one epoch.
        seed: Of initialisation, shuffling and the toy problem.
        quick: A small session, for tests.
    """

    data: str = "digits"
    data_root: Path | None = None
    weights: Path | None = None
    out: Path = Path("lenet5-results")
    epochs: int | None = None
    batch_size: int | None = None
    calibration: int | None = None
    lam: float = 0.01
    lam_ratio: float = 0.1
    sweep: int | None = None
    retrain: bool = True
    seed: int = 0
    quick: bool = False

    def __post_init__(self) -> None:
        if self.data not in datasets.NAMES:
            raise ValueError(f"unknown data set: got {self.data!r}, expected one of {', '.join(datasets.NAMES)}")
        for name, least in (("epochs", 1), ("batch_size", 1), ("calibration", 2), ("sweep", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for name in ("lam", "lam_ratio"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")

    def resolved(self) -> dict[str, int]:
        """The numbers that this session uses for those given as None."""
        digits = self.data == "digits"
        default = {"epochs": 15 if digits else 8, "batch_size": 64 if digits else 256, "calibration": 5000, "sweep": 10}
        if self.quick:
            default |= {"epochs": 3, "calibration": 300, "sweep": 3}
        return {name: getattr(self, name) or value for name, value in default.items()}


@dataclass(frozen=True)
class Compression:
    """One pruning, in the reference's steps.

    Attributes:
        name: What was pruned.
        lam: The penalty given to the library; a fraction of lambda_max for the whole network.
        columns_kept: Consumer -> fraction of its input channels kept.
        sparse_accuracy: With the lasso's sparse matrices at full size.
        collapsed_accuracy: The same, once the zero channels are removed: equal.
        widths: Producer -> channels left, after debias.
        compression_rate: Parameters left, of the whole network, as a fraction.
        macs_rate: Multiply-accumulates left, likewise.
        accuracy: After debias.
    """

    name: str
    lam: float
    columns_kept: Mapping[str, float]
    sparse_accuracy: float
    collapsed_accuracy: float
    widths: Mapping[str, int]
    compression_rate: float
    macs_rate: float
    accuracy: float


@dataclass(frozen=True)
class Point:
    """One point of a Pareto sweep; ``all_zero`` where lam keeps nothing, so the library kept one channel."""

    lam: float
    widths: Mapping[str, int]
    compression_rate: float
    accuracy: float
    accuracy_retrained: float | None
    all_zero: bool


def train_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, data: Data, batch_size: int, seed: int) -> float:
    """One pass over the training images; returns the accuracy on the way."""
    correct = 0
    model.train()
    for images, labels in datasets.batches(data.train_images, data.train_labels, batch_size, seed):
        logits = model(images)
        optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
        correct += int((logits.argmax(1) == labels).sum())
    model.eval()
    return correct / len(data.train_labels)


def predictions(model: Classifier, images: Tensor) -> Tensor:
    """Predicted classes."""
    with torch.no_grad():
        return torch.cat([model(batch).argmax(1) for batch in images.split(1000)])


def accuracy(model: Classifier, data: Data) -> float:
    """Accuracy on the test images."""
    return float((predictions(model, data.test_images) == data.test_labels).double().mean())


def load_weights(path: Path) -> LeNet5:
    """A LeNet-5 with the weights of a safetensors file, narrower if they are those of a pruned one.

    Raises:
        LnrPruneError: If the file does not hold a LeNet-5.
    """
    try:
        state = load_file(path)
        model = LeNet5(*(len(state[f"{layer}.weight"]) for layer in ("conv1", "conv2", "fc1")))
        model.load_state_dict(state)
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise LnrPruneError(
            f"could not load {str(path)!r}: expected a safetensors file with the weights and biases of conv1, conv2, "
            f"fc1 and fc2 of a LeNet-5 ({error}). Leave out --weights to train one."
        ) from error
    return model.eval()


def mass_distribution(model: LeNet5) -> dict[str, float]:
    """Layer -> its share of all parameters."""
    counts = {name: sum(p.numel() for p in layer.parameters()) for name, layer in model.named_children()}
    return {name: count / sum(counts.values()) for name, count in counts.items()}

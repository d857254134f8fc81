"""Small networks, trained in seconds on scikit-learn's handwritten digits, to see what pruning does."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lnr_prune.prune import prune
from lnr_prune.recipes import lenet5
from lnr_prune.recipes.data import Data, load
from lnr_prune.recipes.lenet5 import accuracy, adam, train_epoch
from lnr_prune.report.report import Report
from lnr_prune.runtime.checks import nearest
from lnr_prune.runtime.run import Run
from lnr_prune.selection.budget import Budget, Effort

EPOCHS, BATCH = 10, 64


class Block(nn.Module):
    """``relu(x + conv(relu(conv(x))))``: a residual block, whose sum ties the channels of several layers."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, channels, height, width) of features, and back."""
        inner = self.norm1(self.conv1(x)).relu()
        return (x + self.norm2(self.conv2(inner))).relu()


def mlp() -> nn.Module:
    """Two hidden layers."""
    hidden = [nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(128, 10))


def cnn() -> nn.Module:
    """Three convolutions and a pooled classifier."""
    layers: list[nn.Module] = []
    for before, after in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, stride=2, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4, 10))


def resnet() -> nn.Module:
    """Two residual blocks."""
    stem = [nn.Conv2d(1, 24, 5, stride=4, bias=False), nn.BatchNorm2d(24), nn.ReLU()]
    return nn.Sequential(*stem, Block(24, 32), Block(24, 32), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 10))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "cnn": cnn, "resnet": resnet, "lenet5": lenet5.LeNet5}


def trained(name: str, data: Data, epochs: int = EPOCHS, seed: int = 0) -> nn.Module:
    """The network of this name, trained on the data, in evaluation mode.

    Raises:
        ValueError: If there is none of this name.
    """
    if name not in NETWORKS:
        raise ValueError(f"there is no demo {name!r}; {nearest(name, NETWORKS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = NETWORKS[name]()
    optimizer = adam(model)
    for epoch in range(epochs):
        train_epoch(model, optimizer, data, BATCH, seed + epoch)
    return model.eval()


def run(name: str, macs: float = 0.25, epochs: int = EPOCHS, seed: int = 0) -> Report:
    """Trains a network, prunes it to a share of its MACs, and reports both, with their accuracies.

    Raises:
        ValueError: If there is no network of this name, or no such share.
        LnrPruneError: If scikit-learn, which has the digits, is not installed.
    """
    budget, data = Budget(macs=macs, effort=Effort(samples=512)), load("digits")
    model = trained(name, data, epochs, seed)
    pruned = prune(model, data.train_images.split(256), budget, selector="backward", run=Run(progress=False))
    values = accuracy(model, data), accuracy(pruned.model, data)
    return pruned.report.with_metric("test accuracy", *values)

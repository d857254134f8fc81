"""The problems that solvers are compared on: six synthetic families, and second moments of real activations."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.library.networks import load
from benchmarks.library.sentences import load_minilm, of_equal_length, read_pairs
from lnr_prune import Block, GroupLasso
from lnr_prune.calibration.moments import SecondMoments


def linear_toy(d: int, h: int, rank: int) -> GroupLasso:
    """The practical session's own test problem: ``x`` of low rank, ``y = W x``, second moments divided by d."""
    x = _randn(10_000, rank) @ _randn(rank, d)
    y = x @ _randn(d, h)
    n = len(x) * d
    return GroupLasso((Block(x.T @ x / n, y.T @ x / n, float(y.square().sum()) / n),))


def activations(
    channels: int, width: int, h: int, activation: Callable[[Tensor], Tensor], samples: int = 8192
) -> GroupLasso:
    """Activations of ``width`` columns a channel, driven by latent factors of falling size, with channel scales.

    Factor j has standard deviation j^-3/4; columns of a channel share half of their variance, and every column has
    noise of its own of 0.3 %, so that R is invertible, with a condition number of 1e5 and more.
    """
    d = channels * width
    factors = min(d, 512)
    z = _randn(samples, factors) / torch.arange(1, factors + 1, dtype=torch.float64) ** 0.75
    mixing = (_randn(factors, channels).repeat_interleave(width, 1) + _randn(factors, d)) / 2**0.5
    x = z @ mixing
    x = activation(x / x.std(0) + 0.5 * _randn(channels).repeat_interleave(width)) + 3e-3 * _randn(samples, d)
    x = x * (0.5 * _randn(channels)).exp().repeat_interleave(width)
    y = x @ _randn(d, h) / d**0.5
    groups = torch.arange(channels).repeat_interleave(width)
    return GroupLasso((Block(x.T @ x / samples, y.T @ x / samples, float(y.square().sum()) / samples, groups),))


def _randn(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64)


FAMILIES: dict[str, Callable[[], GroupLasso]] = {
    "A": lambda: linear_toy(100, 200, 80),
    "B": lambda: linear_toy(500, 200, 450),
    "C": lambda: activations(50, 16, 500, F.relu),
    "D": lambda: activations(256, 9, 256, F.relu),
    "E": lambda: activations(3072, 1, 768, F.gelu),
    "F": lambda: activations(768, 1, 192, F.gelu),
}


def real_problems(root: Path) -> dict[str, Callable[[], GroupLasso]]:
    """Name -> second moments of a trained network's activations on real data; weights and data lie in root."""
    return {
        "lenet5 conv2": lambda: moments(*_network("lenet5", root, 2000), "conv2", 25),
        "lenet5 fc1": lambda: moments(*_network("lenet5", root, 2000), "fc1", 16),
        "resnet20 layer3.0.conv2": lambda: moments(*_network("resnet20", root, 500), "layer3.0.conv2", 9),
        "resnet20 layer2.2.conv2": lambda: moments(*_network("resnet20", root, 500), "layer2.2.conv2", 9),
        "minilm layer.0 ffn": lambda: moments(*_minilm(root), "encoder.layer.0.output.dense", 1),
        "minilm layer.5 ffn": lambda: moments(*_minilm(root), "encoder.layer.5.output.dense", 1),
    }


def moments(model: nn.Module, batches: Iterable[Any], name: str, width: int) -> GroupLasso:
    """The problem of one layer: ``width`` columns a channel, a bias that is not penalised, its own outputs kept."""
    layer = model.get_submodule(name)
    sums: list[SecondMoments] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        x = args[0]
        if isinstance(layer, nn.Conv2d):
            padding = layer.padding if isinstance(layer.padding, tuple) else (0, 0)
            x = F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride).transpose(1, 2).flatten(0, 1)
            y = y.flatten(2).transpose(1, 2)
        x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[2 if y.dim() > 2 else 1])
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        sums[:] = [sums[0] + SecondMoments.of(x, y)] if sums else [SecondMoments.of(x, y)]

    handle = layer.register_forward_hook(hook)
    with torch.no_grad():
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)
    handle.remove()
    d = len(sums[0].xx) - 1
    groups = torch.arange(d // width).repeat_interleave(width)
    return GroupLasso((sums[0].block(torch.cat([groups, torch.tensor([-1])])),))


def _network(name: str, root: Path, images: int) -> tuple[nn.Module, Iterable[Tensor]]:
    trained = load(name, root)
    return trained.model, trained.train[:images].split(100)


def _minilm(root: Path) -> tuple[nn.Module, Iterable[Any]]:
    model, tokenizer = load_minilm()
    sentences = read_pairs(root / "stsbenchmark" / "sts-train.csv").first[:600]
    return model.bert, [call for _, call in of_equal_length(tokenizer, sentences)]

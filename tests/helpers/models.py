"""Small networks, one for each thing that the graph must understand."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lnr_prune.runtime import noise


class ReferenceLeNet5(nn.Module):
    """The reference session's style: a list of lambdas that close over self, called in a loop over steps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5)
        self.conv2 = nn.Conv2d(6, 10, 5)
        self.fc1 = nn.Linear(160, 20)
        self.fc2 = nn.Linear(20, 10)
        self.layers = [self.conv1, self.conv2, self.fc1, self.fc2]
        self.layer_forward: list[Callable[[Tensor], Tensor]] = [
            lambda x: F.relu(F.max_pool2d(self.conv1(x), 2)),
            lambda x: F.relu(F.max_pool2d(self.conv2(x), 2)).view(x.size(0), -1),
            lambda x: F.relu(self.fc1(x)),
            lambda x: self.fc2(x),
        ]

    def forward(self, x: Tensor, steps: int = 4) -> Tensor:
        for i in range(steps):
            x = self.layer_forward[i](x)
        return x


class FixedView(nn.Module):
    """A forward that holds the size of its flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3)
        self.conv2 = nn.Conv2d(6, 4, 3)
        self.fc = nn.Linear(4 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        return self.fc(x.view(-1, 64))


class Residual(nn.Module):
    """Residual sum, depthwise convolution, concatenation and a squeeze-and-excitation gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 8, 1)
        self.side = nn.Conv2d(8, 4, 3, padding=1)
        self.squeeze = nn.Linear(12, 6)
        self.excite = nn.Linear(6, 12)
        self.head = nn.Linear(12 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.point(self.depthwise(x).relu())
        x = torch.cat([x, self.side(x)], 1)
        gate = self.excite(self.squeeze(x.mean((2, 3))).relu()).sigmoid()
        return self.head(F.max_pool2d(x * gate[:, :, None, None], 2).flatten(1))


class Functional(nn.Module):
    """Raw parameters and functional calls; one of the weights is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(8, 5) / 2)
        self.w2 = nn.Parameter(torch.randn(5, 8) / 2)
        self.scale = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = F.linear(F.relu(F.linear(x, self.w1) * self.scale), self.w2)
        return x


def mlp(*sizes: int, bias: bool = True) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for d, h in pairwise(sizes):
        layers += [nn.Linear(d, h, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Sequential:
    """Convolutions of every geometry, batch norm, pooling, dropout, flatten, linear; takes (n, 2, 12, 12)."""
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, (3, 2), padding=(2, 0), dilation=(2, 1)),
        nn.BatchNorm2d(8),
        nn.Hardswish(),
        nn.Conv2d(8, 6, 3, padding="same"),
        nn.AvgPool2d(2),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(36, 10),
        nn.GELU(),
        nn.Linear(10, 4),
    )


Net = TypeVar("Net", bound=nn.Module)


def randomised(model: Net, seed: int = 0) -> Net:
    """Batch-norm statistics and scales that hide nothing; in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                    assert tensor is not None
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    model.eval()
    return model


def outputs(model: nn.Module, x: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """What a model gives, perhaps with other weights; all models draw the same random numbers."""
    with torch.no_grad(), noise.seeded(x), noise.InOrder():
        return functional_call(model, dict(weights or {}), (x,))

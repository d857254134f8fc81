"""Random networks made of the patterns of real ones, to test the graph core with."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lnr_prune.errors import LnrPruneError
from lnr_prune.testing.layers import SIDE, Block, conv
from lnr_prune.testing.patterns import PATTERNS

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

Recipe = tuple[str, int, list["Recipe"]]
"""A pattern, its width, and for "branches" the recipes of one of its two branches."""


def build(recipes: list[Recipe], channels: int) -> tuple[nn.Sequential, int]:
    """A module of patterns in sequence, and its number of output channels."""
    blocks: list[nn.Module] = []
    for name, width, inside in recipes:
        if name == "branches":
            left, left_channels = build(inside, channels)
            right = conv(channels, width, 1)
            blocks.append(Block(lambda x, a, b: torch.cat([b(x), a(x)], 1), a=left, b=right))
            channels = left_channels + width
        else:
            block, channels = PATTERNS[name](channels, width)
            blocks.append(block)
    return nn.Sequential(*blocks), channels


class Network(nn.Module):
    """Two parts in sequence; where there is a second input, a residual layer in between reads it."""

    def __init__(self, first: nn.Module, second: nn.Module, join: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second, self.join = first, second, join

    def forward(self, x: Tensor, side: Tensor | None = None) -> Tensor:
        """Images (n, 3, h, w), and (n, 1, h, w) if ``join`` is a layer -> three scores."""
        x = self.first(x)
        if side is not None and self.join is not None:
            x = x + self.join(torch.cat([x, side], 1)).relu()
        return self.second(x)  # type: ignore[no-any-return]

    def batches(self, x: Tensor) -> list[dict[str, Tensor]]:
        """A batch of every kind that the network takes, with these images."""
        return [{"x": x}, *([{"x": x, "side": x[:, :1].flip(3)}] if self.join is not None else ())]


def make_network(
    recipes: list[Recipe], channels: int, flat: bool, seed: int, side: bool = False
) -> tuple[Network, Tensor]:
    """An image classifier made of patterns, in evaluation mode, and a batch of two inputs for it.

    Weights, scales and batch-norm statistics are random and away from zero, so that they hide no mistake. With
    ``side`` it takes an optional second input, which another layer reads: `Network.batches` gives both kinds.
    """
    before, middle = build(recipes[: len(recipes) // 2], channels)
    after, last = build(recipes[len(recipes) // 2 :], middle)
    head = [nn.Flatten(), nn.Linear(last * SIDE**2, 3)] if flat else [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    after = nn.Sequential(*after, *head, *([] if flat else [nn.Linear(last, 3)]))
    first = nn.Sequential(conv(3, channels), *before)
    model = Network(first, after, conv(middle + 1, middle) if side else None).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                value = torch.rand(tensor.shape, generator=generator) + 0.5
                if tensor.dim() > 1:
                    value = (value - 1) * 3 / max(1, tensor[0].numel()) ** 0.5
                tensor.copy_(value * (0.2 if name.endswith("bias") else 1))
    return model, torch.randn(2, 3, SIDE, SIDE, generator=generator)


def random_network(seed: int, depth: int = 5) -> tuple[Network, Tensor]:
    """`make_network` of ``depth`` random patterns; every other one takes a second input.

    Example:
        >>> model, x = random_network(seed=0)
        >>> model(x).shape
        torch.Size([2, 3])
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    def recipe(depth: int) -> Recipe:
        name = [*PATTERNS, "branches"][draw(0, len(PATTERNS) + 1)]
        return name, draw(2, 6), [recipe(depth - 1) for _ in range(draw(1, 3))] if name == "branches" and depth else []

    return make_network([recipe(2) for _ in range(depth)], draw(3, 7), bool(draw(0, 2)), seed, bool(draw(0, 2)))


def networks(max_patterns: int = 6) -> "SearchStrategy[tuple[Network, Tensor]]":
    """A hypothesis strategy: random image classifiers, in evaluation mode, with a batch of two inputs.

    A network is a sequence of patterns of real networks: convolutions, residual and dense blocks, channel
    shuffles, gates, every layout of attention, recurrent layers, mixtures of experts, shared and computed weights,
    random numbers, branches of patterns, a second input ... A failing example shrinks to the few patterns that
    matter. ``make_network`` is called with what was drawn.

    Args:
        max_patterns: Largest number of patterns in sequence.

    Raises:
        LnrPruneError: If hypothesis is not installed.
    """
    try:
        from hypothesis import strategies as st
    except ImportError as error:
        raise LnrPruneError("networks() needs hypothesis: pip install hypothesis") from error

    def rows(inside: "SearchStrategy[list[Recipe]]", size: int) -> "SearchStrategy[list[Recipe]]":
        plain = st.tuples(st.sampled_from(list(PATTERNS)), st.integers(2, 5), none)
        branches = st.tuples(st.just("branches"), st.integers(2, 5), inside)
        return st.lists(plain | branches, min_size=1, max_size=size)

    none: SearchStrategy[list[Recipe]] = st.builds(list)
    recipes = rows(rows(none, 2), max_patterns)
    return st.builds(make_network, recipes, st.integers(3, 6), st.booleans(), st.integers(0, 2**16), st.booleans())

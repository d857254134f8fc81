"""Random group-lasso problems with the samples they summarise, as hypothesis strategies."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from lnr_prune import Block, GroupLasso
from tests.helpers.references import Case, Consumer

seeds = st.integers(0, 2**32 - 1)
ratios = st.floats(-4, -0.05).map(lambda exponent: 10.0**exponent)
"""lam as a fraction of lambda_max."""


def make_case(
    *,
    seed: int = 0,
    consumers: int = 1,
    groups: int = 6,
    samples: int = 60,
    unpenalised: int = 0,
    weighted: bool = False,
    deficient: bool = False,
    dead: bool = False,
    constant: bool = False,
    duplicated: bool = False,
    linear: bool = False,
    uneven: bool = True,
) -> Case:
    """Consumers that share ``groups`` groups of 1 to 4 columns, in a random order.

    The first of the unpenalised columns is the constant 1 of a bias. Where asked, x has half the rank,
    group 1 is dead (0), group 2 constant, the last group a copy of group 0, and y exactly linear in x.
    Uneven columns have a mean and a scale of their own, which makes R badly conditioned.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    def consumer() -> Consumer:
        widths = torch.randint(1, 5, (groups,), generator=generator)
        if duplicated:
            widths[-1] = widths[0]
        group = torch.arange(groups).repeat_interleave(widths)
        d, h = len(group), int(torch.randint(1, 5, (), generator=generator))
        rank = (d + 1) // 2 if deficient else d
        x = randn(samples, rank) @ randn(rank, d) / rank**0.5
        if uneven:
            x = (x + randn(d)) * randn(d).exp()
        if dead and groups > 1:
            x[:, group == 1] = 0
        if constant and groups > 2:
            x[:, group == 2] = x[0, group == 2]
        if duplicated and groups > 2:
            x[:, group == groups - 1] = x[:, group == 0]
        free = torch.cat([torch.ones(samples, 1, dtype=torch.float64), randn(samples, 1)], dim=1)[:, :unpenalised]
        x, group = torch.cat([x, free], dim=1), torch.cat([group, torch.full((unpenalised,), -1)])
        y = x @ randn(len(group), h) / d**0.5
        if not linear:
            y = y.relu() + 0.1 * randn(samples, h)
        order = torch.randperm(len(group), generator=generator)
        return Consumer(x[:, order], y, group[order])

    weights = 0.5 + 2 * torch.rand(groups, dtype=torch.float64, generator=generator)
    return Case(tuple(consumer() for _ in range(consumers)), weights if weighted else torch.ones_like(weights))


def cases(**fixed: int | bool) -> st.SearchStrategy[Case]:
    """Random cases; options of `make_case` that are given are fixed."""
    options: dict[str, st.SearchStrategy[int | bool]] = {
        "seed": seeds,
        "consumers": st.integers(1, 3),
        "groups": st.integers(1, 12),
        "samples": st.integers(3, 60),
        "unpenalised": st.integers(0, 2),
    }
    flags = ("weighted", "deficient", "dead", "constant", "duplicated", "linear", "uneven")
    options |= {name: st.booleans() for name in flags} | {name: st.just(value) for name, value in fixed.items()}
    return st.builds(make_case, **options)


def twins() -> GroupLasso:
    """Six groups, two and two equal: they enter together."""
    (block,) = make_case(groups=3).problem.blocks
    R, B = block.R.repeat(2, 2), block.B.repeat(1, 2)
    return GroupLasso((Block(R, B, block.t, torch.cat([block.groups, block.groups + 3])),))

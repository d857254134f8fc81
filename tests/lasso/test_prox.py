"""The proximal operator: what defines it, and what it must leave alone."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lnr_prune import prox_group_lasso
from tests.helpers import references
from tests.helpers.strategies import seeds


@dataclass(frozen=True, eq=False, repr=False)
class Point:
    matrices: tuple[Tensor, ...]
    other: tuple[Tensor, ...]
    groups: tuple[Tensor, ...]
    thresholds: Tensor


def make_point(*, seed: int, consumers: int, n_groups: int, whole: bool) -> Point:
    """Small random matrices whose columns lie in random groups, -1 included; ``whole`` numbers make ties."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        values = 2 * torch.randn(*size, dtype=torch.float64, generator=generator)
        return values.round() if whole else values

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    shapes = [(integer(1, 4), integer(1, 9)) for _ in range(consumers)]
    return Point(
        tuple(draw(*shape) for shape in shapes),
        tuple(draw(*shape) for shape in shapes),
        tuple(torch.randint(-1, n_groups, (d,), generator=generator) for _, d in shapes),
        draw(n_groups).abs(),
    )


def points(*whole: bool) -> st.SearchStrategy[Point]:
    sizes = {"consumers": st.integers(1, 3), "n_groups": st.integers(1, 5)}
    return st.builds(make_point, seed=seeds, whole=st.sampled_from(whole), **sizes)


def vector(matrices: tuple[Tensor, ...], groups: tuple[Tensor, ...], g: int) -> Tensor:
    return torch.cat([M[:, group == g].flatten() for M, group in zip(matrices, groups, strict=True)])


@given(points(False, True))
def test_optimality_exact_zeros_and_unpenalised_columns(p: Point) -> None:
    result = prox_group_lasso(p.matrices, p.thresholds, p.groups)
    for g, t in enumerate(p.thresholds):
        m, u = vector(p.matrices, p.groups, g), vector(result, p.groups, g)
        if m.norm() <= t:
            assert not u.any()
        else:  # 0 is in the subdifferential: m - u = t u / ||u||
            torch.testing.assert_close(m - u, t * u / u.norm())
    assert torch.equal(vector(result, p.groups, -1), vector(p.matrices, p.groups, -1))


@settings(max_examples=20)
@given(points(False))  # ties are too degenerate for an interior-point method
def test_agrees_with_a_generic_solver(p: Point) -> None:
    expected = references.prox(p.matrices, p.thresholds.tolist(), p.groups)
    actual = prox_group_lasso(p.matrices, p.thresholds, p.groups)
    torch.testing.assert_close(list(actual), expected, atol=1e-3, rtol=1e-3)


@given(points(False, True))
def test_is_firmly_non_expansive(p: Point) -> None:
    first, second = (prox_group_lasso(M, p.thresholds, p.groups) for M in (p.matrices, p.other))
    moved = torch.cat([(a - b).flatten() for a, b in zip(first, second, strict=True)])
    distance = torch.cat([(a - b).flatten() for a, b in zip(p.matrices, p.other, strict=True)])
    assert moved.square().sum() <= moved @ distance + 1e-12
    assert moved.norm() <= distance.norm() + 1e-12


@given(points(False, True))
def test_threshold_zero_is_the_identity(p: Point) -> None:
    for threshold in (0.0, torch.zeros_like(p.thresholds)):
        result = prox_group_lasso(p.matrices, threshold, p.groups)
        assert all(map(torch.equal, result, p.matrices))


@given(seeds, st.integers(1, 3))
def test_consumers_are_joint(seed: int, consumers: int) -> None:
    """Several consumers with the same columns are one matrix, stacked."""
    generator = torch.Generator().manual_seed(seed)
    matrices = [torch.randn(2, 6, dtype=torch.float64, generator=generator) for _ in range(consumers)]
    groups, t = torch.tensor([0, 1, 1, -1, 2, 0]), torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
    joint = prox_group_lasso(matrices, t, [groups] * consumers)
    torch.testing.assert_close(torch.cat(joint), prox_group_lasso(torch.cat(matrices), t, groups))


def test_default_groups_are_single_columns() -> None:
    M = torch.tensor([[3.0, 0.6, -5.0], [4.0, 0.8, 12.0]])
    torch.testing.assert_close(prox_group_lasso(M, 1.0), M * torch.tensor([0.8, 0.0, 12 / 13]))


@pytest.mark.parametrize("norm", [0.0, 1.0, 5e-324, 1e150])
def test_extreme_norms(norm: float) -> None:
    M = torch.tensor([[norm]], dtype=torch.float64)
    assert prox_group_lasso(M, 1.0).item() == (norm if norm > 1 else 0.0)  # 1e150 - 1 rounds to 1e150


M23 = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("matrices", "threshold", "groups", "match"),
    [
        (M23, -1.0, None, "threshold must be >= 0"),
        (M23, float("nan"), None, "threshold must be >= 0"),
        (M23, torch.tensor([1.0, -1.0, 1.0]), None, "threshold must be >= 0"),
        (M23, 1.0, torch.arange(2), "3 columns"),
        (M23, 1.0, [torch.arange(3)], "one tensor when one matrix"),
        ([M23], 1.0, None, "one tensor for each matrix"),
        ([M23], 1.0, torch.arange(3), "one tensor for each matrix"),
        ([M23, M23], 1.0, [torch.arange(3)], "shorter"),
        pytest.param(M23, torch.ones(2), torch.tensor([0, 1, 2]), "group", id="more groups than thresholds"),
        pytest.param(M23, torch.ones(2), torch.tensor([0, 1, -2]), "group", id="group below -1"),
    ],
)
def test_bad_arguments(matrices: Tensor, threshold: float, groups: Tensor, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        prox_group_lasso(matrices, threshold, groups)

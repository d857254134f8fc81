"""The same seed gives the same result to the last bit; threads and batch sizes change it by rounding alone."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import lnr_prune as lnr
from lnr_prune.selection.selectors import Selector
from lnr_prune.settings import Amount
from tests.helpers.models import randomised

IMAGES = torch.randn(64, 2, 8, 8, generator=torch.Generator().manual_seed(0))
CASES: dict[str, tuple[Amount, Selector]] = {
    "lasso": (lnr.Keep(0.5), lnr.Lasso()),
    "random": (lnr.Keep(0.5), lnr.Random(seed=3)),
    "elimination": (lnr.Keep(0.5), lnr.Backward(swaps=8)),
    "penalty": (lnr.Penalty(ratio=0.05), lnr.Lasso()),
    "budget": (lnr.Budget(macs=0.5), lnr.Lasso()),
}


def net() -> nn.Module:
    layers = [nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.GELU()]
    return randomised(
        nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 4))
    )


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def distance(one: lnr.Pruned, other: lnr.Pruned) -> float:
    """Largest relative difference of a parameter."""
    pairs = zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    return max(float((a - b).norm() / a.norm().clamp(min=1e-12)) for a, b in pairs if a.is_floating_point())


@pytest.mark.parametrize("case", CASES)
def test_the_same_seed_gives_the_same_bits(case: str) -> None:
    model, (amount, selector) = net(), CASES[case]
    one, other = (lnr.prune(model, IMAGES.split(16), amount, selector=selector) for _ in range(2))
    assert one.plan == other.plan
    for a, b in zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_another_seed_draws_other_channels() -> None:
    one, other = (lnr.prune(net(), IMAGES, lnr.Keep(0.5), selector=lnr.Random(seed)) for seed in (0, 1))
    assert one.plan != other.plan


def batched(sizes: list[int]) -> list[Tensor]:
    return list(IMAGES.split(sizes))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-3), (torch.float64, 1e-10)])
def test_threads_and_batch_sizes_change_rounding_alone(dtype: torch.dtype, limit: float, threads: None) -> None:
    model = net().to(dtype)
    found = []
    for count, sizes in ((1, [64]), (2, [64]), (1, [32, 32]), (2, [7] * 9 + [1]), (1, [1] * 64)):
        torch.set_num_threads(count)
        data = [batch.to(dtype) for batch in batched(sizes)]
        found.append(lnr.prune(model, data, lnr.Keep(0.5)))
    for other in found[1:]:
        assert other.plan == found[0].plan
        assert distance(found[0], other) < limit

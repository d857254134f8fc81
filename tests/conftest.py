"""Settings that all tests share: the same numbers and the same examples in every run."""

import logging
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("lnr-prune", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("lnr-prune")

torch.manual_seed(0)  # for what test modules draw when they are imported


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Every test draws the same numbers, alone or among others."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _level_as_before() -> Iterator[None]:
    """Commands and benchmarks choose how much is logged; the next test hears everything again."""
    logger = logging.getLogger("lnr_prune")
    before = logger.level
    yield
    logger.setLevel(before)

"""Who judges: samples are split by their number, whatever the batches."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lnr_prune.calibration.calls import Call, samples_in
from lnr_prune.calibration.data import calibrate, first_of_each_half
from lnr_prune.calibration.places import HALF, Place, halves

MODEL = nn.Linear(1, 1)


def split(numbers: Tensor, sizes: list[int], samples: int | None) -> tuple[list[int], list[int]]:
    """The samples' numbers in both halves."""
    data = calibrate(MODEL, list(numbers[:, None].split(sizes)))
    fit, judge = first_of_each_half(data, samples)
    first, second = ([int(x) for (batch,), _ in calls for x in batch] for calls in (fit, judge))
    return first, second


@given(st.integers(2, 200), st.data())
def test_no_batch_size_moves_a_sample(count: int, data: st.DataObject) -> None:
    numbers = torch.arange(count).float()
    cuts = sorted(data.draw(st.sets(st.integers(1, count - 1), max_size=8)))
    sizes = [b - a for a, b in zip([0, *cuts], [*cuts, count], strict=True)]
    wanted = data.draw(st.none() | st.integers(1, count))
    whole, parts = split(numbers, [count], wanted), split(numbers, sizes, wanted)
    assert whole == parts
    assert not set(whole[0]) & set(whole[1])
    if wanted is None:
        assert sorted(whole[0] + whole[1]) == list(range(count))
        assert abs(len(whole[0]) - len(whole[1])) <= -(-count // 64)


@given(st.integers(1, 50), st.integers(0, 1000), st.integers(1, 400))
def test_rows_of_a_sample_stay_together(size: int, first: int, positions: int) -> None:
    place = Place(first, size, first + size + 7)
    of_rows = place.held(size * positions, HALF)
    assert torch.equal(of_rows, place.held(size, HALF).repeat_interleave(positions))
    for part, index in place.parts(size * positions, HALF):
        assert torch.equal(of_rows.nonzero()[:, 0] if part else (~of_rows).nonzero()[:, 0], index)


def test_a_call_that_cannot_be_cut_goes_with_its_first_sample() -> None:
    call: Call = (torch.zeros(4, 2), torch.zeros(1, 2)), {}
    ((judges, whole),) = halves(call, Place(0, 4, 4))
    assert whole is call
    assert not judges
    assert samples_in(whole) == 4

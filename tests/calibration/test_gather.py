"""Second moments are sums: of every consumer, in one pass, from any split of the data."""

from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lnr_prune.calibration import rows
from lnr_prune.calibration.adapter import AdaptedLayer
from lnr_prune.calibration.data import Calibration, calibrate
from lnr_prune.calibration.gather import gather
from lnr_prune.calibration.moments import SecondMoments
from lnr_prune.calibration.reading import adapted
from lnr_prune.calibration.rows import Reader
from lnr_prune.calibration.watch import LayerCall
from lnr_prune.errors import CalibrationError
from lnr_prune.graph.groups import find_groups
from lnr_prune.graph.module import named_tensors
from lnr_prune.runtime.work import Work
from tests.helpers.models import Functional, cnn, mlp, randomised


def sums(
    model: nn.Module, readers: Mapping[str, Reader], data: Calibration, work: Work = Work()
) -> dict[str, SecondMoments]:
    """Those of all samples."""
    return {name: halves.whole for name, halves in gather(model, readers, data, work).items()}


def readers_of(model: nn.Module, example: Tensor) -> dict[str, AdaptedLayer]:
    consumers = [c for group in find_groups(model, (example,), {}).groups for c in group.consumers]
    return {consumer.weight: adapted(consumer, bias=True) for consumer in consumers}


@given(n=st.integers(2, 20), cut=st.integers(1, 19), seed=st.integers(0, 99))
def test_halves_merge_to_the_whole(n: int, cut: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, k, generator=generator, dtype=torch.float64) for k in (3, 2))
    whole, merged = SecondMoments.of(x, y), SecondMoments.of(x[:cut], y[:cut]) + SecondMoments.of(x[cut:], y[cut:])
    for a, b in zip((whole.xx, whole.yx, whole.yy), (merged.xx, merged.yx, merged.yy), strict=True):
        torch.testing.assert_close(a, b)
    assert whole.count == merged.count
    assert whole.xx.dtype == torch.float64


@pytest.mark.parametrize("chunk", [1, 2**23])
def test_every_consumer_at_once_and_any_split_of_the_data(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "CHUNK", chunk)
    model, x = randomised(cnn()).double(), torch.randn(7, 2, 12, 12, dtype=torch.float64)
    readers = readers_of(model, x)
    whole = sums(model, readers, calibrate(model, [x]))
    split = sums(model, readers, calibrate(model, [(x[:3], torch.zeros(3)), (x[3:], torch.ones(4))]))
    assert set(whole) == {"3.weight", "6.weight", "10.weight", "12.weight"}
    for name in whole:
        torch.testing.assert_close(whole[name].xx, split[name].xx)
        assert whole[name].count == split[name].count


def test_moments_of_a_linear_layer_are_those_of_its_samples() -> None:
    model, x = mlp(4, 6, 3).double(), torch.randn(5, 4, dtype=torch.float64)
    readers = readers_of(model, x)
    moments = sums(model, readers, calibrate(model, [x]))["2.weight"]
    moments = moments.through(readers["2.weight"].matrix(named_tensors(model)))
    hidden = torch.cat([model[:2](x), torch.ones(5, 1)], 1).detach()
    torch.testing.assert_close(moments.xx, hidden.T @ hidden)
    torch.testing.assert_close(moments.yx, model(x).detach().T @ hidden)
    torch.testing.assert_close(moments.yy, model(x).detach().square().sum())


@pytest.mark.parametrize("cut", [1, 3, 6])
def test_the_rows_that_are_read_do_not_depend_on_the_batches(cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "ROWS_PER_COLUMN", 2)
    model, x = randomised(cnn()).double(), torch.randn(7, 2, 12, 12, dtype=torch.float64)
    readers = readers_of(model, x)
    whole, split = (sums(model, readers, calibrate(model, data)) for data in ([x], [x[:cut], x[cut:]]))
    assert whole["3.weight"].count == 7 * 11  # d = 37: 2 d / 7 of a sample's 42 positions
    for name in whole:
        torch.testing.assert_close(whole[name].xx, split[name].xx)


class Positions:
    """Reads a call whose values are numbers of positions."""

    def inputs(self, call: LayerCall, rows: Tensor | None = None) -> Tensor:
        x = call.input.reshape(-1, 1)
        return x if rows is None else x[rows]

    def outputs(self, call: LayerCall, rows: Tensor | None = None) -> Tensor:
        return self.inputs(call, rows)

    def second_moments(self, calls: Sequence[LayerCall]) -> None:
        return None


def test_every_sample_reads_other_positions_and_all_are_read_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "ROWS_PER_COLUMN", 3 * 107)

    def read_of(first: int, count: int) -> Tensor:
        """Which three of ten positions are read of some of 107 samples."""
        x = torch.arange(10.0).repeat(count, 1)
        call = LayerCall(x, x, torch.ones(1, 1), None, {}, nn.functional.linear)
        return (
            torch.cat([read for read, _ in rows.rows(Positions(), call, 107, first + torch.arange(count))])
            .view(count, 3)
            .long()
        )

    read = read_of(first=7, count=100)
    assert all(len(set(sample)) == 3 for sample in read.tolist())
    assert len({tuple(sample) for sample in read.tolist()}) == 10
    assert torch.bincount(read.flatten()).tolist() == pytest.approx([30] * 10, abs=4)
    assert torch.equal(read_of(first=57, count=50), read[50:])


def test_functional_calls_and_shared_weights_are_seen() -> None:
    model, x = Functional().double(), torch.randn(5, 5, dtype=torch.float64)
    moments = sums(model, readers_of(model, x), calibrate(model, [x]))
    assert moments["w2"].count == 10  # used twice


def test_a_consumer_that_is_never_called_is_an_error() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(h) if len(x) == 3 else h[:, :2]

    model = Branching()
    with pytest.raises(CalibrationError, match=r"no call of b\.weight was seen in 1 batches"):
        sums(model, readers_of(model, torch.randn(3, 4)), calibrate(model, [torch.randn(2, 4)]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_layer_and_batch(value: float) -> None:
    model, x = mlp(4, 6, 3), torch.randn(5, 4)
    bad = x.clone()
    bad[0, 0] = value
    with pytest.raises(CalibrationError, match="layer '2' are not finite in batch 1"):
        sums(model, readers_of(model, x), calibrate(model, [x, bad]))


def test_no_batch_is_an_error() -> None:
    model = mlp(4, 6, 3)
    with pytest.raises(CalibrationError, match="no batch"):
        sums(model, readers_of(model, torch.randn(3, 4)), calibrate(model, []))


def test_empty_batches_and_unbatched_inputs_are_fine() -> None:
    model, x = mlp(4, 6, 3).double(), torch.randn(5, 4, dtype=torch.float64)
    readers = readers_of(model, x)
    batched = sums(model, readers, calibrate(model, [x, x[:0]]))["2.weight"]
    single = sums(model, readers, calibrate(model, list(x)))["2.weight"]
    torch.testing.assert_close(batched.xx, single.xx)
    assert batched.count == single.count == 5


def test_progress_is_reported_after_every_batch() -> None:
    model, seen = mlp(4, 6, 3), list[str]()
    x = torch.randn(5, 4)
    sums(model, readers_of(model, x), calibrate(model, [x, x]), Work(step=seen.append))
    assert seen == ["statistics"] * 2


@given(
    calls=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    d=st.integers(1, 6),
    mean=st.sampled_from([0.0, 3.0, 1e3]),
    spread=st.sampled_from([0.0, 4.0]),
    kind=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_products_in_single_precision_keep_to_their_bound(
    calls: list[int], d: int, mean: float, spread: float, kind: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(sum(calls), k, generator=generator) for k in (d, 2))
    scale = (spread * torch.randn(sum(calls), d, generator=generator)).exp()
    x, y = ((x + mean) * scale).to(kind), y.to(kind)
    moments = SecondMoments.zeros(2, d, x.device)
    for of_call in zip(x.split(calls), y.split(calls), strict=True):
        moments = moments.with_rows(*of_call)
    check_bound(moments, x, y, max(calls))


def check_bound(moments: SecondMoments, x: Tensor, y: Tensor, n: int) -> None:
    """Compares with float64 products, entry by entry."""
    x, y = x.double(), y.double()
    gamma = n * 2.0**-24 / (1 - n * 2.0**-24) + len(x) * 2.0**-53
    of_x, of_y = (z.square().sum(0).sqrt() for z in (x, y))
    assert bool(((moments.xx - x.T @ x).abs() <= gamma * of_x[:, None] * of_x).all())
    assert bool(((moments.yx - y.T @ x).abs() <= gamma * of_y[:, None] * of_x).all())


def test_the_rounding_does_not_grow_with_the_number_of_calls() -> None:
    x = 1 + torch.rand(3000, 2, generator=torch.Generator().manual_seed(0)) / 10
    moments = SecondMoments.zeros(2, 2, x.device)
    for row in x.split(1):
        moments = moments.with_rows(row, row)
    check_bound(moments, x, x, 1)  # added up in float32 they would be off by a hundred times as much


def test_a_chunk_holds_no_more_elements_than_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "CHUNK", 50)
    sizes = []
    with_rows = SecondMoments.with_rows

    def watched(moments: SecondMoments, x: Tensor, y: Tensor) -> SecondMoments:
        sizes.append(x.numel())
        return with_rows(moments, x, y)

    monkeypatch.setattr(SecondMoments, "with_rows", watched)
    model, x = mlp(4, 6, 3), torch.randn(40, 4)
    sums(model, readers_of(model, x), calibrate(model, x))
    assert sum(sizes) == 40 * 7
    assert max(sizes) <= 50

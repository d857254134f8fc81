"""Any iterable of batches becomes calls of the model; what cannot is refused with advice."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lnr_prune.calibration.calls import run, shortened
from lnr_prune.calibration.data import Batches, calibrate
from lnr_prune.errors import CalibrationError
from tests.helpers.models import ReferenceLeNet5, mlp

X = torch.arange(12.0).reshape(3, 4)


class Two(nn.Module):
    def forward(self, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
        return (a + b) * scale


@pytest.mark.parametrize(
    ("model", "batch", "args", "kwargs"),
    [
        (mlp(4, 2), X, (X,), {}),
        (mlp(4, 2), (X, torch.zeros(3)), (X,), {}),
        (mlp(4, 2), [X, torch.zeros(3)], (X,), {}),
        (ReferenceLeNet5(), (X, torch.zeros(3)), (X,), {}),  # forward(x, steps=4): the label is no step count
        (Two(), (X, X, torch.zeros(3)), (X, X), {}),
        (Two(), {"a": X, "b": X, "labels": torch.zeros(3)}, (), {"a": X, "b": X}),
    ],
)
def test_batches_of_every_form(model: nn.Module, batch: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    ((got_args, got_kwargs),) = calibrate(model, [batch])
    assert [id(a) for a in got_args] == [id(a) for a in args]
    assert list(got_kwargs) == list(kwargs)


def test_a_single_tensor_is_one_batch_and_an_iterator_is_kept() -> None:
    assert len(list(calibrate(mlp(4, 2), X))) == 1
    data = calibrate(mlp(4, 2), (x for x in (X, X)))
    assert len(list(data)) == len(list(data)) == 2


def test_inputs_maps_any_other_batch() -> None:
    data = calibrate(Two(), Batches([{"left": X, "right": X}], lambda b: ((b["left"],), {"b": b["right"]})))
    assert data.example() == ((X,), {"b": X})


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (mlp(4, 2), [], "no batch"),
        (mlp(4, 2), iter(()), "no batch"),
        (mlp(4, 2), 3, "iterable of batches"),
        (mlp(4, 2), ["text"], "a batch is a str"),
        (Two(), [(X,)], r"a tuple of 1.*forward's 2 required arguments \('a', 'b'\)"),
    ],
)
def test_unusable_data_is_refused(model: nn.Module, data: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        calibrate(model, data).example()


def test_a_wrong_shape_names_the_layer() -> None:
    with pytest.raises(CalibrationError, match=r"\(3, 5\).*layer '0'"):
        run(mlp(4, 3, 2), ((torch.zeros(3, 5),), {}))


def test_run_replaces_tensors_for_one_call_and_keeps_modes() -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.9)).train()
    zero = run(model, ((X,), {}), {"0.weight": torch.zeros(2, 4), "0.bias": torch.ones(2)})
    assert torch.equal(zero, torch.ones(3, 2))
    assert model.training
    assert not zero.requires_grad


@pytest.mark.parametrize(
    ("call", "sizes"),
    [
        (((X,), {}), [2]),
        (((X, X), {"m": X}), [2, 2, 2]),
        (((X, X[:1]), {}), [3, 1]),
        (((X[:1],), {}), [1]),
        (((torch.tensor(1.0),), {}), [None]),
    ],
)
def test_shortened(call: tuple[tuple[Any, ...], dict[str, Any]], sizes: list[int | None]) -> None:
    args, kwargs = shortened(call)
    assert [len(t) if t.dim() else None for t in (*args, *kwargs.values())] == sizes

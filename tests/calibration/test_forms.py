"""Data as people have it: what each form becomes, or the sentence that says what to write."""

import sys
from collections import UserDict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import lnr_prune as lnr
from lnr_prune.calibration.data import Batches, calibrate
from lnr_prune.errors import CalibrationError
from tests.helpers.models import mlp

ROWS = [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0], [8.0, 9.0, 10.0, 11.0]]
X = torch.tensor(ROWS)
TOKENS = [[1, 2, 3], [4, 5, 6]]


class Texts(nn.Module):
    """Reads tokens by name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.last = nn.Embedding(8, 4), nn.Linear(4, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.last(self.embed(input_ids))


class Columns:
    """A data frame: columns by name, each with a type and `to_numpy`."""

    def __init__(self, **columns: Any) -> None:
        self.held = {name: np.asarray(values) for name, values in columns.items()}
        self.columns = list(columns)

    def __getitem__(self, name: str) -> Any:
        return SimpleNamespace(dtype=self.held[name].dtype, to_numpy=lambda: self.held[name])

    def to_numpy(self) -> Any:
        raise AssertionError("columns of several types become objects")


class Items(Dataset[Any]):
    """A data set of these samples."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


class Stream(IterableDataset[Any]):
    """A data set of single samples that can only be read in order."""

    def __iter__(self) -> Any:
        return iter(X)


class HuggingFace:
    """As one of the ``datasets`` package: rows by name, columns that the model does not know."""

    def __init__(self, *names: str) -> None:
        self.column_names = names or ("text", "input_ids", "attention_mask", "label")

    def with_format(self, kind: str) -> "HuggingFace":
        return self

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"text": "a b c", "input_ids": TOKENS[index], "attention_mask": [1, 1, 1], "label": 0}


class HuggingFaceStream:
    column_names = ("input_ids",)

    def with_format(self, kind: str) -> "HuggingFaceStream":
        return self


class Sparse:
    def toarray(self) -> Any:
        return X.numpy()


class Image:
    """As one of Pillow's."""


Image.__module__ = "PIL.Image"
READ_ONLY = np.array(ROWS, dtype=np.float32)
READ_ONLY.flags.writeable = False
NUMBERS = Columns(age=[0, 4, 8], height=[1.0, 5.0, 9.0], weight=[2.0, 6.0, 10.0], old=[3.0, 7.0, 11.0])
MIXED = Columns(a=[0, 1, 2], b=[True, False, True])

FORMS: dict[str, tuple[Any, Any]] = {  # data -> what the model is called with, in every batch
    "a tensor": (X, [X]),
    "an array": (X.numpy(), [X]),
    "an array of float64": (np.array(ROWS), [X]),
    "an array that cannot be written": (READ_ONLY, [X]),
    "an array backwards": (np.array(ROWS)[::-1], [X.flip(0)]),
    "an array of the other byte order": (np.array(ROWS, dtype=">f4"), [X]),
    "an array of uint16": ([np.array([1, 2], dtype=np.uint16)], [torch.tensor([1, 2])]),
    "batches that are arrays": ([np.array(ROWS), np.array(ROWS)], [X, X]),
    "batches of an array and its labels": ([(np.array(ROWS), np.array([1, 2, 3]))], [X]),
    "tensors of float64": ([X.double()], [X]),
    "a data frame": (NUMBERS, [X]),
    "a data frame of whole numbers and flags": (MIXED, [torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 1.0]])]),
    "batches that are data frames": ([NUMBERS], [X]),
    "a torch data set": (TensorDataset(X), [X]),
    "a torch data set with labels": (TensorDataset(X, torch.zeros(3)), [X]),
    "a part of a data set": (Subset(TensorDataset(X), [2]), [X[2:]]),
    "a data set of arrays of float64": (Items(*np.array(ROWS)), [X]),
    "a data set of rows": (Items(*ROWS), [X]),
    "a data set of rows of whole numbers": (Items([1, 2], [3, 4]), [torch.tensor([[1.0, 2.0], [3.0, 4.0]])]),
    "a data set of rows and labels": (Items(*((row, 1) for row in ROWS)), [X]),
    "a data set read in order": (Stream(), [X]),
    "a loader": (DataLoader(TensorDataset(X), batch_size=2, generator=torch.Generator()), [X[:2], X[2:]]),
    "a list of rows": (ROWS, [X]),
    "a list of rows and labels": ([(row, "cat") for row in ROWS], [X]),
}
TOKENISED = {"input_ids": torch.tensor(TOKENS), "attention_mask": torch.ones(2, 3, dtype=torch.long)}
NAMED: dict[str, Any] = {
    "tokens": TOKENISED,
    "tokens as lists": UserDict({name: value.tolist() for name, value in TOKENISED.items()}),
    "tokens as arrays": [{name: value.numpy() for name, value in TOKENISED.items()}],
    "rows of tokens": [{"input_ids": row, "attention_mask": [1, 1, 1]} for row in TOKENS],
    "one of Hugging Face's data sets": HuggingFace(),
}
REFUSED: dict[str, tuple[Any, str]] = {
    "a data frame with texts": (Columns(x=[1.0], city=["Ulm"]), r"'city' .* type <U3.*frame.drop\(columns=\['city'"),
    "a path": (Path("x.npy"), "numpy.load"),
    "a path as text": ("x.npy", "got str; turn texts into tokens"),
    "texts": (["a text"], "a batch is a str.*tokenizer"),
    "texts in lists": ([["a text", "another"]], "tokenizer"),
    "images": ([Image()], "the model's own transform"),
    "a data set of images": (Items((Image(), 0)), "samples of Items .*the model's own transform"),
    "a data set of several shapes": (Items(X[0], X[0, :2]), "collate_fn that you trained with"),
    "rows of several lengths": ([[1.0, 2.0], [3.0]], "collate_fn that you trained with"),
    "a batch of rows of several lengths": ([[[1.0, 2.0], [3.0]]], "Pad its rows to one length"),
    "a sparse matrix": (Sparse(), r"x\.toarray\(\)"),
    "a data set without tokens": (HuggingFace("text", "label"), "columns text, label, the model reads input"),
    "a data set that streams": (HuggingFaceStream(), r"list\(data.take\(512\)\)"),
}


def calls(model: nn.Module, data: Any) -> list[Any]:
    """What the model is called with."""
    found = calibrate(model, data)
    assert found.samples == sum(len(next(iter((*args, *kwargs.values())))) for args, kwargs in found)
    return [args[0] if args else kwargs for args, kwargs in found]


def check(got: list[Any], wanted: list[Any]) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=0, check_stride=False)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_batches(form: str) -> None:
    data, wanted = FORMS[form]
    model, state = mlp(4, 2), torch.get_rng_state()
    check(calls(model, data), wanted)
    check(calls(model, data), wanted)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("form", NAMED)
def test_every_form_of_named_inputs(form: str) -> None:
    check(calls(Texts(), NAMED[form]), [TOKENISED])


@pytest.mark.parametrize("form", REFUSED)
def test_what_cannot_be_read_says_what_to_write(form: str) -> None:
    data, message = REFUSED[form]
    model = Texts() if isinstance(data, HuggingFace) else mlp(4, 2)
    with pytest.raises(CalibrationError, match=message):
        list(calibrate(model, data))


def test_float64_stays_where_the_model_or_the_user_wants_it() -> None:
    assert calls(mlp(4, 2).double(), [X.double()])[0].dtype == torch.float64
    assert calls(mlp(4, 2).bfloat16(), [X.double()])[0].dtype == torch.bfloat16
    assert calls(mlp(4, 2), Batches([X.double()], lambda batch: ((batch,), {})))[0].dtype == torch.float64
    assert calls(mlp(4, 2), [X.half()])[0].dtype == torch.float16


def test_lists_beside_a_tensor_stay_lists() -> None:
    ((_, given),) = calibrate(mlp(4, 2), [{"input": X, "sizes": [3, 4]}])
    assert given["sizes"] == [3, 4]


def test_large_data_sets_are_read_in_batches() -> None:
    frame = Columns(a=np.arange(150.0), b=np.arange(150.0))
    for data in (TensorDataset(torch.zeros(150, 2)), frame, [[0.0, 1.0]] * 150):
        assert [len(batch) for batch in calls(mlp(2, 2), data)] == [64, 64, 22]


def test_a_model_is_pruned_with_a_data_frame_of_pandas() -> None:
    pandas = pytest.importorskip("pandas")
    x = np.random.default_rng(0).normal(size=(100, 4))
    frame = pandas.DataFrame(x, columns=list("abcd"))
    model = mlp(4, 8, 2)
    report = lnr.prune(model, frame, lnr.Keep(0.5)).report
    assert report == lnr.prune(model, torch.tensor(x).float().split(64), lnr.Keep(0.5)).report
    check(calls(model, frame.astype({"a": "Float64"})), calls(model, frame))
    with pytest.raises(CalibrationError, match=r"column 'e' .* str"):
        calibrate(model, frame.assign(e="text"))


def test_nothing_is_imported_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pandas", "polars", "PIL", "datasets"):
        monkeypatch.setitem(sys.modules, name, ModuleType("a package that must not be used"))
    check(calls(mlp(4, 2), NUMBERS), [X])

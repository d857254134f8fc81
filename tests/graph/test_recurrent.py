"""Recurrent layers: what they read can leave, and so can their hidden units."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import lnr_prune as lnr
from lnr_prune.calibration.adapter import adapters
from lnr_prune.errors import CalibrationError, GraphError
from lnr_prune.graph.groups import Graph, find_groups
from lnr_prune.testing.adapters import check_adapter

KINDS: dict[str, Callable[..., Any]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "tanh": nn.RNN,
    "relu": partial(nn.RNN, nonlinearity="relu"),
}
READS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # outputs (n, steps, ...), last states (..., n, units)
    "all steps": lambda outputs, last: outputs,
    "last step": lambda outputs, last: outputs[:, -1],
    "last state": lambda outputs, last: last[-1],
}
ROWS = {"lstm": 4, "gru": 3, "tanh": 1, "relu": 1}


class Net(nn.Module):
    """A linear layer, a recurrent one, and another linear one."""

    def __init__(self, kind: str = "lstm", read: str = "all steps", h: int = 8, **options: Any) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.rnn = KINDS[kind](6, h, **options)
        self.read = read
        wide = self.rnn.bidirectional and read != "last state"
        self.last = nn.Linear(h * (1 + wide), 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        outputs, state = self.rnn(x if self.rnn.batch_first else x.transpose(0, 1))
        outputs = outputs if self.rnn.batch_first else outputs.transpose(0, 1)
        return self.last(READS[self.read](outputs, state[0] if isinstance(state, tuple) else state))


def graph_of(model: nn.Module, *args: Any) -> Graph:
    return find_groups(model.eval(), args, {})


X = torch.randn(20, 4, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_unit_owns_a_row_of_every_gate_in_all_layers_and_directions(
    kind: str, layers: int, bidirectional: bool
) -> None:
    inputs, units = graph_of(Net(kind, num_layers=layers, bidirectional=bidirectional, batch_first=True), X).groups
    assert (inputs.size, units.size) == (6, 8)
    each = torch.arange(8)
    for layer in range(layers):
        for side in ("", "_reverse")[: 1 + bidirectional]:
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                assert torch.equal(units.slots[f"rnn.{name}_l{layer}{side}", 0], each.repeat(ROWS[kind]))
            assert torch.equal(units.slots[f"rnn.weight_hh_l{layer}{side}", 1], each)
            read = inputs.slots if layer == 0 else units.slots
            columns = torch.arange(6) if layer == 0 else each.repeat(1 + bidirectional)
            assert torch.equal(read[f"rnn.weight_ih_l{layer}{side}", 1], columns)
    assert torch.equal(units.slots["last.weight", 1], each.repeat(1 + bidirectional))
    assert {consumer.name for consumer in inputs.consumers} == {
        f"rnn.weight_ih_l0{side}" for side in ("", "_reverse")[: 1 + bidirectional]
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize(
    "options",
    [
        {"batch_first": True},
        {"num_layers": 2, "bias": False},
        {"bidirectional": True, "batch_first": True, "bias": False},
        {"num_layers": 2, "bidirectional": True},
    ],
    ids=["plain", "2 layers, no bias", "bidirectional, no bias", "2 bidirectional layers"],
)
def test_pruned_equals_masked(kind: str, read: str, options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net(kind, read, **options).eval()
    pruned = lnr.prune(model, [X], lnr.Keep({"first": 4, "rnn.weight_ih_l0": 3}))
    small: Any = pruned.model.get_submodule("rnn")
    assert (small.input_size, small.hidden_size) == (4, 3)
    assert all(weight is parameter for weight, parameter in zip(small._flat_weights, small.parameters(), strict=True))
    for x in (X, X[:3, :1], X[:1].repeat(1, 3, 1)):  # other batch sizes and lengths
        expected = torch.func.functional_call(model, dict(pruned.masked), (x,))
        torch.testing.assert_close(pruned.model(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(copy.deepcopy(pruned.model)(x), pruned.model(x))
    pruned.save(tmp_path / "small.safetensors")
    loaded = lnr.load(tmp_path / "small.safetensors", Net(kind, read, **options).eval())
    torch.testing.assert_close(loaded(X), pruned.model(X))
    again = lnr.apply_plan(pruned.plan, Net(kind, read, **options).eval(), example=X)
    assert again.get_submodule("rnn").hidden_size == 3


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("columns_bias", Net("lstm", num_layers=2, batch_first=True)),
        ("columns", Net("gru", bias=False)),
        ("fc_after_conv", Net("tanh", bidirectional=True, batch_first=True)),
        ("attention", Net("gru", bidirectional=True, num_layers=2, batch_first=True)),
    ],
)
def test_adapters_keep_the_contract(name: str, model: nn.Module) -> None:
    check_adapter(adapters()[name], model, X[:3])


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_loses_them_too(kind: str) -> None:
    model = Net(kind, "last step", bidirectional=True, batch_first=True).eval()
    pruned = lnr.prune(model, [X], lnr.Keep(0.5), into="graph")
    expected = torch.func.functional_call(model, dict(pruned.masked), (X[:7],))
    torch.testing.assert_close(pruned.model(X[:7]), expected, rtol=1e-4, atol=1e-5)
    assert pruned.report.macs_after < 0.5 * pruned.report.macs_before


def test_features_that_others_determine_leave_without_loss() -> None:
    torch.manual_seed(0)
    model = Net("lstm", batch_first=True).eval()
    pruned = lnr.prune(model, [X], lnr.Keep({"first": 5}), refit=lnr.Refit(ridge=0.0))  # 6 features of 5 inputs
    torch.testing.assert_close(pruned.model(2 * X), model(2 * X), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_units_that_others_repeat_leave_without_loss(kind: str) -> None:
    torch.manual_seed(0)
    model = Net(kind, batch_first=True, bidirectional=True).eval()
    with torch.no_grad():
        for parameter in model.rnn.parameters():
            rows = parameter.view(ROWS[kind], 8, -1)
            rows[:, 4:] = rows[:, :4]
    pruned = lnr.prune(model, [X], lnr.Keep({"rnn.weight_ih_l0": 4}), selector="backward", refit=lnr.Refit(ridge=0.0))
    assert pruned.model.get_submodule("rnn").hidden_size == 4
    torch.testing.assert_close(pruned.model(X), model(X), rtol=1e-3, atol=1e-3)


def test_the_refit_of_batches_of_different_lengths_helps() -> None:
    torch.manual_seed(0)
    model, mix = Net("lstm", num_layers=2, batch_first=True, h=12).eval(), torch.randn(3, 5)
    batches = [torch.randn(40, steps, 3) @ mix for steps in (6, 9, 1, 6)]
    new = torch.randn(200, 7, 3) @ mix

    def error(refit: lnr.Refit | None) -> float:
        pruned = lnr.prune(model, batches, lnr.Keep(0.5), selector=lnr.Norm(), refit=refit)
        return float((pruned.model(new) - model(new)).square().mean().detach())

    plain = error(None)
    assert error(lnr.Refit()) < 0.5 * plain
    assert error(lnr.Refit(window=2)) < 0.5 * plain


def test_a_budget_of_macs_counts_every_step() -> None:
    model = Net("lstm", batch_first=True).eval()
    report = lnr.prune(model, [X], lnr.Budget(macs=0.5)).report
    assert report.macs_before == 4 * (5 * 6 + 4 * 8 * (6 + 8) + 8 * 3)
    assert report.macs_after <= 0.5 * report.macs_before


class Cells(nn.Module):
    """Two cells, one on the other, in a loop over the steps."""

    def __init__(self, cell: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.first, self.lower, self.upper, self.last = nn.Linear(5, 6), cell(6, 8), cell(8, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = b = None
        for step in self.first(x).relu().unbind(1):
            a = self.lower(step, a)
            b = self.upper(a[0] if isinstance(a, tuple) else a, b)
        return self.last(b[0] if isinstance(b, tuple) else b)


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell, partial(nn.RNNCell, nonlinearity="relu")])
def test_cells_have_groups_of_their_own(cell: Callable[[int, int], nn.Module]) -> None:
    model = Cells(cell).eval()
    pruned = lnr.prune(model, [X], lnr.Keep(0.5))
    assert [(group.name, group.size, group.kept) for group in pruned.report.groups] == [
        ("first", 6, 3), ("lower.weight_ih", 8, 4), ("upper.weight_ih", 7, 4),
    ]  # fmt: skip
    upper: Any = pruned.model.get_submodule("upper")
    assert (upper.input_size, upper.hidden_size) == (4, 4)
    expected = torch.func.functional_call(model, dict(pruned.masked), (X,))
    torch.testing.assert_close(pruned.model(X), expected, rtol=1e-4, atol=1e-5)


class Starts(nn.Module):
    """A GRU whose initial state the forward makes, or is given."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.hidden = form, 8
        self.first, self.gru, self.last = nn.Linear(5, 6), nn.GRU(6, 8, batch_first=True), nn.Linear(8, 3)
        self.start, self.make = nn.Parameter(torch.randn(1, 1, 8)), nn.Linear(5, 8)

    def forward(self, x: Tensor, given: Tensor | None = None) -> tuple[Tensor, ...] | Tensor:
        forms: dict[str, Callable[[], Tensor]] = {
            "zeros": lambda: torch.zeros(1, x.shape[0], self.hidden, device=x.device).to(x.dtype),
            "number": lambda: torch.zeros(1, x.shape[0], 8, dtype=x.dtype),
            "parameter": lambda: self.start.expand(1, x.shape[0], -1).contiguous(),
            "layer": lambda: self.make(x[:, 0])[None],
            "like": lambda: torch.zeros_like(self.make(x[:, 0]))[None],
            "random": lambda: torch.randn(1, x.shape[0], 8, dtype=x.dtype),
        }
        outputs, state = self.gru(self.first(x), given if given is not None else forms.get(self.form, lambda: None)())
        return (self.last(outputs), state) if self.form == "returned" else self.last(outputs)


@pytest.mark.parametrize("form", ["none", "zeros", "parameter", "layer"])
@pytest.mark.parametrize("into", ["copy", "graph"])
def test_initial_states_that_shrink_along(form: str, into: str) -> None:
    model = Starts(form).eval()
    pruned = lnr.prune(model, [X], lnr.Keep(0.5), into=into)
    assert {group.size for group in pruned.report.groups} == {6, 8}
    assert all(2 * group.kept == group.size for group in pruned.report.groups)
    expected = torch.func.functional_call(model, dict(pruned.masked), (X,))
    torch.testing.assert_close(pruned.model(X), expected, rtol=1e-4, atol=1e-5)


def frozen_units(model: nn.Module, *args: Any) -> str:
    """Why no hidden unit can leave, where the features that the layer reads can."""
    assert [group.name for group in graph_of(model, *args).groups] == ["first"]
    return graph_of(model, *args).frozen["gru.weight_hh_l0"]


def test_initial_states_of_a_fixed_width_keep_the_units() -> None:
    start = torch.zeros(1, 20, 8)
    assert "initial state of gru" in frozen_units(Starts("given"), X, start)
    assert "is given, with a fixed number of units" in frozen_units(Starts("given"), X, start)
    assert "is given, with a fixed number of units" in frozen_units(Starts("random"), X)
    assert frozen_units(Starts("returned"), X) == "output of the model"


def test_a_number_in_the_forward_is_found_by_the_trial() -> None:
    found = lnr.inspect(Starts("number").eval(), X)
    assert [group.name for group in found.groups] == ["first"]
    assert "into='graph'" in found.frozen["gru.weight_ih_l0"]
    pruned = lnr.prune(Starts("number").eval(), [X], lnr.Keep(0.5), into="graph")
    assert [group.kept for group in pruned.report.groups] == [3, 4]


class Twice(Net):
    """One layer reads a sequence in two parts, and goes on where it stopped; or reads its own output."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.read == "own output":
            return self.last(self.rnn(self.rnn(x)[0])[0])
        front, state = self.rnn(x[:, :2])
        return self.last(torch.cat([front, self.rnn(x[:, 2:], state)[0]], 1))


@pytest.mark.parametrize(("read", "sizes"), [("parts", [6, 6]), ("own output", [6])])
def test_a_layer_that_is_called_twice(read: str, sizes: list[int]) -> None:
    model = Twice("lstm", read, h=6, batch_first=True).eval()
    pruned = lnr.prune(model, [X], lnr.Keep(0.5))
    assert [group.size for group in pruned.report.groups] == sizes
    expected = torch.func.functional_call(model, dict(pruned.masked), (X,))
    torch.testing.assert_close(pruned.model(X), expected, rtol=1e-4, atol=1e-5)


class Heads(nn.Module):
    """A head that runs in training only, behind a layer with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 8, 2, dropout=0.5, batch_first=True)
        self.last, self.auxiliary = nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        x = self.lstm(x)[0]
        return (self.last(x), self.auxiliary(x)) if self.training else self.last(x)


def test_dropout_does_not_disturb_the_comparison_in_training() -> None:
    pruned = lnr.prune(Heads(), [X], lnr.Keep(0.5))
    assert [(group.size, group.kept) for group in pruned.report.groups] == [(8, 4)]
    assert pruned.model.get_parameter("auxiliary.weight").shape == (2, 4)


def test_computed_weights_freeze_what_they_touch() -> None:
    model = Net("gru", batch_first=True)
    nn.utils.parametrizations.weight_norm(model.rnn, "weight_hh_l0")
    graph = graph_of(model, X)
    assert graph.groups == ()
    assert "no rule for gru" in graph.frozen["first"]


def test_projected_units_stay_and_the_features_leave() -> None:
    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 6), nn.Linear(4, 3)
            self.lstm = nn.LSTM(6, 8, 2, proj_size=4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.lstm(self.first(x))[0])

    model = Projected().double().eval()
    pruned = lnr.prune(model, [X.double()], lnr.Keep(0.5))
    assert [group.name for group in pruned.report.groups] == ["first"]
    assert "proj_size" in pruned.report.frozen["lstm.weight_hh_l0"]
    small: Any = pruned.model.get_submodule("lstm")
    assert (small.input_size, small.hidden_size) == (3, 8)
    expected = torch.func.functional_call(model, dict(pruned.masked), (X.double(),))
    torch.testing.assert_close(pruned.model(X.double()), expected)


class Packs(nn.Module):
    """A GRU over padded sequences, or packed ones if their lengths are given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gru, self.last = nn.Linear(5, 6), nn.GRU(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        x = self.first(x)
        given = x if lengths is None else pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.last(self.gru(given)[1][-1])


def test_packed_sequences_are_refused_in_a_sentence() -> None:
    lengths = torch.randint(1, 5, (20,))
    packed = {"x": X, "lengths": lengths}
    with pytest.raises(GraphError, match=r"a recurrent layer gets a packed sequence.*without pack_padded"):
        lnr.inspect(Packs().eval(), packed)
    with pytest.raises(CalibrationError, match=r"packed sequence.*give it padded"):
        lnr.prune(Packs().eval(), [{"x": X}, packed], lnr.Keep(0.5))

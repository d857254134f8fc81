"""Recurrent layers in visible calls: they compute what torch computes, and both matrices are linear layers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lnr_prune.calibration.visible.recurrent import VisibleRecurrence
from lnr_prune.calibration.watch import LayerCall, watch
from lnr_prune.errors import CalibrationError

KINDS: dict[str, Callable[..., Any]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "tanh": nn.RNN,
    "relu": partial(nn.RNN, nonlinearity="relu"),
    "projected": partial(nn.LSTM, proj_size=2),
}


def check(module: nn.Module, *args: Any) -> None:
    """The module gives the same in visible calls, without a call of torch's own function."""
    expected, hidden = tree_leaves(module(*args)), Hidden()
    with hidden, VisibleRecurrence():
        found = tree_leaves(module(*args))
    assert not hidden.names & {"lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell"}
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


class Hidden(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names = set[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")
def test_layers(kind: str, layers: int, bidirectional: bool, bias: bool, batch_first: bool) -> None:
    torch.manual_seed(0)
    make = KINDS[kind]
    module = make(4, 3, layers, bidirectional=bidirectional, bias=bias, batch_first=batch_first).double()
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    check(module, x)
    check(module, x[0])  # one sequence, without a batch
    state = module(x)[1]
    check(module, x, state)


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell, partial(nn.RNNCell, bias=False)])
def test_cells(cell: Callable[..., nn.Module]) -> None:
    module, x = cell(4, 3), torch.randn(2, 4)
    check(module, x)
    check(module, x, module(x))


def test_dropout_between_layers_stays() -> None:
    module, x = nn.LSTM(4, 64, 2, dropout=0.5), torch.randn(3, 2, 4)
    with VisibleRecurrence():
        assert not torch.equal(module(x)[0], module(x)[0])
        module.eval()
        torch.testing.assert_close(module(x)[0], module(x)[0], rtol=0, atol=0)


@pytest.mark.parametrize("reverse", ["", "_reverse"])
def test_both_matrices_are_seen_as_linear_layers(reverse: str) -> None:
    torch.manual_seed(0)
    module, x = nn.GRU(4, 3, batch_first=True, bidirectional=True), torch.randn(2, 5, 4)
    calls = dict[str, LayerCall]()
    watch(module, ((x,), {}), [f"weight_{of}_l0{reverse}" for of in ("ih", "hh")], calls.__setitem__)
    of_inputs, of_states = calls.values()
    outputs: Tensor = module(x)[0][..., slice(3, 6) if reverse else slice(3)]
    before = outputs[:, 1:] if reverse else outputs[:, :-1]  # the other one is zero
    torch.testing.assert_close(of_inputs.input, x)
    torch.testing.assert_close(of_states.input[:, :-1] if reverse else of_states.input[:, 1:], before)
    assert not of_states.input[:, -1 if reverse else 0].any()
    for call in calls.values():
        torch.testing.assert_close(call.again(), call.output)


def test_the_recurrence_uses_the_weights_that_it_is_given() -> None:
    module, other, x = nn.RNN(4, 3, batch_first=True), nn.RNN(4, 3, batch_first=True), torch.randn(2, 5, 4)
    outputs = list[Tensor]()
    handle = module.register_forward_hook(lambda _, args, result: outputs.append(result[0]))

    def swap(name: str, x: Tensor) -> dict[str, Tensor]:
        return {of: other.get_parameter(name.replace("weight", of)) for of in ("weight", "bias")}

    watch(module, ((x,), {}), ["weight_ih_l0", "weight_hh_l0"], swap=swap)
    handle.remove()
    torch.testing.assert_close(outputs[0], other(x)[0])


def test_packed_sequences_are_refused() -> None:
    module = nn.GRU(4, 3)
    packed = pack_padded_sequence(torch.randn(5, 2, 4), [5, 3])
    with VisibleRecurrence(), pytest.raises(CalibrationError, match=r"packed sequence.*give it padded"):
        module(packed)

"""Recurrent layers, step by step: what torch.lstm and the like compute, in calls that can be seen.

torch runs all steps, layers and directions of an nn.LSTM in one function, in which no call of a weight can be seen.
The same is computed here from what can be seen: ``W_ih x + b_ih`` for all steps at once, which is F.linear, and a
`recurrence`, in which every step computes ``W_hh h + b_hh``. So both matrices are linear layers like any other.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

from lnr_prune.errors import CalibrationError

State = tuple[Tensor, ...]
"""h, and for an LSTM also c: (n, hidden units) each."""
Step = Callable[[Tensor, Tensor, State], State]
"""``W_ih x + b_ih``, ``W_hh h + b_hh`` and the state before -> the state after."""


def _lstm(x: Tensor, h: Tensor, state: State) -> State:
    enter, keep, new, show = (x + h).chunk(4, -1)
    c = keep.sigmoid() * state[1] + enter.sigmoid() * new.tanh()
    return show.sigmoid() * c.tanh(), c


def _gru(x: Tensor, h: Tensor, state: State) -> State:
    (reset_x, keep_x, new_x), (reset_h, keep_h, new_h) = x.chunk(3, -1), h.chunk(3, -1)
    new = (new_x + (reset_x + reset_h).sigmoid() * new_h).tanh()
    return (new + (keep_x + keep_h).sigmoid() * (state[0] - new),)


def _tanh(x: Tensor, h: Tensor, state: State) -> State:
    return ((x + h).tanh(),)


def _relu(x: Tensor, h: Tensor, state: State) -> State:
    return ((x + h).relu(),)


STEPS: dict[str, Step] = {"lstm": _lstm, "gru": _gru, "rnn_tanh": _tanh, "rnn_relu": _relu}
LAYERS = {
    function: step
    for name, step in STEPS.items()
    for function in (getattr(torch, name), getattr(torch.ops.aten, name).input)
}
CELLS = {
    function: step
    for name, step in STEPS.items()
    for function in (getattr(torch, f"{name}_cell"), getattr(torch.ops.aten, f"{name}_cell").default)
}


class VisibleRecurrence(TorchFunctionMode):
    """Within, modes that were entered before see what recurrent layers and cells consist of."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in LAYERS:
            return _layers(LAYERS[func], *args, **(kwargs or {}))
        if func in CELLS:
            return _cell(CELLS[func], *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _cell(
    step: Step,
    input: Tensor,
    hx: Tensor | Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor | State:
    """What torch.lstm_cell and the like return."""
    state = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    state = step(F.linear(input, w_ih, b_ih), F.linear(state[0], w_hh, b_hh), state)
    return state if len(state) > 1 else state[0]


def _layers(
    step: Step,
    input: Tensor,
    hx: Tensor | Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool = False,
) -> tuple[Tensor, ...]:
    """What torch.lstm and the like return: the outputs, and the last h and c of every layer and direction."""
    if not isinstance(has_biases, bool):  # their arguments are others
        raise CalibrationError(
            "a batch is given to a recurrent layer as a packed sequence, in which samples cannot be told apart: "
            "give it padded, or give only sequences of the same length in one batch"
        )
    first = [(hx,) if isinstance(hx, Tensor) else tuple(hx)]
    states = list(zip(*(each.unbind(0) for each in first[0]), strict=True))
    size = len(params) // len(states)
    x, last = input if batch_first else input.transpose(0, 1), []
    for layer in range(num_layers):
        sides = []
        for direction in range(1 + bidirectional):
            index = layer * (1 + bidirectional) + direction
            weights = params[index * size : (index + 1) * size]
            outputs, state = _direction(step, x, states[index], weights, has_biases, reverse=direction == 1)
            sides.append(outputs)
            last.append(state)
        x = torch.cat(sides, -1) if bidirectional else sides[0]
        if dropout and train and layer < num_layers - 1:
            x = F.dropout(x, dropout)
    return x if batch_first else x.transpose(0, 1), *(torch.stack(each) for each in zip(*last, strict=True))


def _direction(
    step: Step, x: Tensor, state: State, weights: Sequence[Tensor], has_biases: bool, *, reverse: bool
) -> tuple[Tensor, State]:
    """The outputs of all steps, (n, steps, hidden units), and the last state."""
    w_ih, w_hh, *others = weights
    b_ih, b_hh = others[:2] if has_biases else (None, None)
    projection = others[-1] if len(others) % 2 else None
    _, outputs, state = recurrence(F.linear(x, w_ih, b_ih), w_hh, b_hh, state, step, projection, reverse)
    return outputs, state


def recurrence(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: State,
    step: Step,
    projection: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, State]:
    """All steps of one layer and direction, as one call that modes can see.

    Args:
        input: ``W_ih x + b_ih`` of every step, (n, steps, rows).
        weight: W_hh.
        bias: b_hh.
        state: The state before the first step.
        step: What a step computes.
        projection: What h is multiplied with at the end of every step, if anything.
        reverse: Whether the last step comes first.

    Returns:
        h before and after every step, (n, steps, hidden units), and the last state.
    """
    if has_torch_function((input, weight)):
        arguments = input, weight, bias, state, step, projection, reverse
        result: tuple[Tensor, Tensor, State] = handle_torch_function(recurrence, (input, weight), *arguments)
        return result
    before, after = [], []
    for each in reversed(input.unbind(1)) if reverse else input.unbind(1):
        before.append(state[0])
        state = step(each, F.linear(state[0], weight, bias), state)
        if projection is not None:
            state = F.linear(state[0], projection), *state[1:]
        after.append(state[0])
    order = slice(None, None, -1 if reverse else 1)
    return torch.stack(before[order], 1), torch.stack(after[order], 1), state

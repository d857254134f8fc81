"""The original and the pruned network side by side, waiting at every layer."""

from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lnr_prune.calibration import Call
from lnr_prune.layer_calls import LayerCall, watch
from lnr_prune.onward import Following, Outlook
from lnr_prune.suspended import Answer, Question, suspended


@dataclass(frozen=True, eq=False)
class Arrival:
    """A batch that has come to a layer.

    Attributes:
        name: Name of the layer's weight.
        call: The call in the original network, done.
        x: The layer's input in the pruned network, which is about to be called.
        shortcuts: What its output will be added to, in the original and in the pruned network; None = not known.
        beside: What its output will meet on its way to the next layer, in the pruned network; None = not known.
    """

    name: str
    call: LayerCall
    x: Tensor
    shortcuts: tuple[list[Tensor], list[Tensor]] | None
    beside: list[Tensor] | None

    @property
    def unchanged(self) -> bool:
        """Whether nothing that reaches the layer has changed."""
        pairs = zip(*(self.shortcuts or ((), ())), strict=True)
        return all(torch.equal(a, b) for a, b in ((self.call.input, self.x), *pairs))


Stream = Generator[Arrival, Mapping[str, Tensor], None]
"""A batch on its way: it stops at every layer, and goes on when it gets the arguments to call the layer with."""


def both_networks(model: nn.Module, call: Call, ahead: Outlook) -> Stream:
    """Runs the original and the pruned network side by side; at every layer it waits for the pruned one's weights."""
    modes = [Following(ahead) for _ in range(2)]

    def original(ask: Callable[[tuple[str, LayerCall]], None]) -> None:
        watch(model, call, ahead.layers, see=lambda name, layer: ask((name, layer)), within=modes[0])

    def pruned(ask: Callable[[tuple[str, Tensor]], Mapping[str, Tensor]]) -> None:
        watch(model, call, ahead.layers, swap=lambda name, x: ask((name, x)), within=modes[1])

    with closing(suspended(original)) as first, closing(suspended(pruned)) as second:
        seen, swapped = next(first, None), next(second, None)
        while seen is not None and swapped is not None:
            name, layer = seen
            (original_s, _), (pruned_s, beside) = (mode.added(name, layer.output) for mode in modes)
            known = None if original_s is None or pruned_s is None else (original_s, pruned_s)
            new = yield Arrival(name, layer, swapped[1], known, beside)
            seen, swapped = advance(first, None), advance(second, new)


def advance(stream: Generator[Question, Answer, None], answer: Answer) -> Question | None:
    """Sends an answer; the next question, or None at the end."""
    try:
        return stream.send(answer)
    except StopIteration:
        return None

"""The original and the pruned network side by side, waiting at every layer.

A layer is refitted to map what the *pruned* network feeds it to what it returns in the *original* one, for all
calibration samples at once. So every batch runs through both networks, and stops when it comes to a layer. When all
batches are there, the layer is solved, and all go on with its new weight. A network of three layers and two batches::

    batch 0   original  fc1 . fc2 . fc3 .          `Lockstep` yields fc1 with two arrivals, then fc2, then fc3:
              pruned    fc1 | fc2 | fc3 |          each dot is a call that is done, each bar one that waits for
    batch 1   original  fc1 . fc2 . fc3 .          `Lockstep.go_on`. A layer that is called again (a shared one)
              pruned    fc1 | fc2 | fc3 |          goes on by itself, as it did the first time.

This costs two passes over the data, however deep the network is. The forward is the user's code, and we cannot write
pauses into it, so it runs as a coroutine, see `suspended`.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lnr_prune.calibration.calls import Call
from lnr_prune.calibration.watch import LayerCall, watch
from lnr_prune.refit.coroutine import Answer, Question, suspended
from lnr_prune.refit.downstream import Replay, Wiring
from lnr_prune.runtime.processes import Ranks


@dataclass(frozen=True, eq=False)
class Arrival:
    """A batch that has come to a layer.

    Attributes:
        name: Name of the layer's weight.
        call: The call in the original network, done.
        x: The layer's input in the pruned network, which is about to be called.
        shortcuts: What its output will be added to, in the original and in the pruned network; None = not known.
        beside: What its output will meet on the path to the next layer, in the pruned network; None = not known.
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


Arguments = Mapping[str, Tensor]
"""The "weight", "bias" or "input" to call a layer with; what is left out stays."""
TwinRun = Generator[Arrival, Arguments, None]
"""A batch on its way: it stops at every layer, and goes on when it gets the arguments to call the layer with."""


class Lockstep:
    """Iterates over the layers, in order of execution, with the batches that have come to each.

    Yields:
        The name of a layer's weight, and the arrivals: number of a batch -> the batch at this layer. Processes that
        prune together come to the same layers, each with its own batches; it may have none. `go_on` must be called
        before the next layer.
    """

    def __init__(
        self, model: nn.Module, calls: Sequence[Call], wiring: Wiring, order: Sequence[str], ranks: Ranks
    ) -> None:
        """Starts every batch.

        Args:
            model: The original model.
            calls: The batches.
            wiring: What the network does with its layers' outputs.
            order: Names of the layers' weights, in order of execution.
            ranks: The processes that prune together.
        """
        self._order, self._ranks, self._stack = list(order), ranks, ExitStack()
        self._runs = [self._stack.enter_context(closing(both_networks(model, call, wiring))) for call in calls]
        self._waiting: dict[int, Arrival] = {}
        self._answered: dict[str, Arguments] = {}
        for batch, run in enumerate(self._runs):
            self._arrived(batch, next(run, None))

    def __enter__(self) -> "Lockstep":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __iter__(self) -> Iterator[tuple[str, dict[int, Arrival]]]:
        while True:
            nearest = min((self._order.index(arrival.name) for arrival in self._waiting.values()), default=None)
            found = [index for index in self._ranks.all_gather(nearest) if index is not None]
            if not found:
                return
            name = self._order[min(found)]
            here = {batch: arrival for batch, arrival in self._waiting.items() if arrival.name == name}
            if name in self._answered:  # it is called again
                self.go_on(name, here, self._answered[name])
            else:
                yield name, here

    def go_on(
        self,
        name: str,
        arrivals: dict[int, Arrival],
        arguments: Arguments,
        inputs: dict[int, Tensor] | None = None,
    ) -> None:
        """Lets the batches at a layer go on to the next one.

        Args:
            name: The layer.
            arrivals: The batches that have come to it. They are taken out of it, so that their activations are freed.
            arguments: What the pruned network calls it with, now and whenever it is called again.
            inputs: Number of a batch -> another input of the layer, in this call.
        """
        self._answered[name] = arguments
        for batch in list(arrivals):
            del self._waiting[batch], arrivals[batch]
            other = {} if inputs is None or batch not in inputs else {"input": inputs.pop(batch)}
            self._arrived(batch, advance(self._runs[batch], {**arguments, **other}))

    def _arrived(self, batch: int, arrival: Arrival | None) -> None:
        if arrival is not None:
            self._waiting[batch] = arrival


def both_networks(model: nn.Module, call: Call, wiring: Wiring) -> TwinRun:
    """Runs the original and the pruned network side by side; at every layer it waits for the pruned one's weights."""
    modes = [Replay(wiring) for _ in range(2)]

    def original(ask: Callable[[tuple[str, LayerCall]], None]) -> None:
        def see(name: str, layer: LayerCall) -> None:
            ask((name, layer))

        watch(model, call, wiring.layers, see=see, within=modes[0], among_others=True)

    def pruned(ask: Callable[[tuple[str, Tensor]], Arguments]) -> None:
        def swap(name: str, x: Tensor) -> Arguments:
            return ask((name, x))

        watch(model, call, wiring.layers, swap=swap, within=modes[1], among_others=True)

    with closing(suspended(original)) as first, closing(suspended(pruned)) as second:
        seen, swapped = next(first, None), next(second, None)
        while seen is not None and swapped is not None:
            name, layer = seen
            (original_s, _), (pruned_s, beside) = (mode.added(name, layer.output) for mode in modes)
            known = None if original_s is None or pruned_s is None else (original_s, pruned_s)
            new = yield Arrival(name, layer, swapped[1], known, beside)
            seen, swapped = advance(first, None), advance(second, new)


def advance(stream: Generator[Question, Answer, None], answer: Answer) -> Question | None:
    """Sends an answer; returns the next question, or None at the end."""
    try:
        return stream.send(answer)
    except StopIteration:
        return None

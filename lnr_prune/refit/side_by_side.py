"""The original and the pruned network side by side, waiting at every layer.

A layer is refitted to map what the *pruned* network feeds it to what it returns in the *original* one, for all
calibration samples at once. So every batch runs through both networks, and stops when it comes to a layer. When all
batches are there, the layer is solved, and all go on with its new weight. A network of three layers and two batches::

    batch 0   original  fc1 . fc2 . fc3 .          `Lockstep` yields fc1 with two arrivals, then fc2, then fc3:
              pruned    fc1 | fc2 | fc3 |          each dot is a call that is done, each bar one that waits for
    batch 1   original  fc1 . fc2 . fc3 .          `Lockstep.go_on`. A layer that is called again (a shared one)
              pruned    fc1 | fc2 | fc3 |          goes on by itself, as it did the first time.

This costs two passes over the data, however deep the network is, see `lnr_prune.calibration.functions.pause`.
"""

from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lnr_prune.calibration.calls import Call
from lnr_prune.calibration.functions.pause import Manner, Pause, Replay, begin, go_on, same_values
from lnr_prune.calibration.watch import LayerCall, Watch
from lnr_prune.errors import CalibrationError
from lnr_prune.graph.module import named_tensors, remembered
from lnr_prune.refit.downstream import Wiring, added_at
from lnr_prune.runtime.processes import Ranks

STOPS = 8  # a pass is paused at about so many layers, to find out how


@dataclass(frozen=True, eq=False)
class Arrival:
    """A batch that has come to a layer.

    Attributes:
        name: Name of the layer's weight.
        call: The call in the original network, done.
        x: The layer's input in the pruned network, which is about to be called; the original one's, where the two
            networks may pick different rows.
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
        self,
        model: nn.Module,
        passes: Iterable[Pause],
        wiring: Wiring,
        manner: Manner,
        order: Sequence[str],
        ranks: Ranks,
        picked: Collection[str] = (),
    ) -> None:
        """Starts every batch.

        Args:
            model: The original model, in evaluation mode.
            passes: The batches, where they begin.
            wiring: What the network does with its layers' outputs.
            manner: How its passes are paused.
            order: Names of the layers' weights, in order of execution.
            ranks: The processes that prune together.
            picked: Layers that read rows which the network picks by their values, such as experts.
        """
        self._order, self._ranks = list(order), ranks
        tensors = named_tensors(model)
        self._runs = [both_networks(model, pause, wiring, manner, order, tensors, picked) for pause in passes]
        self._waiting: dict[int, Arrival] = {}
        self._answered: dict[str, Arguments] = {}
        for batch, run in enumerate(self._runs):
            self._arrived(batch, next(run, None))

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


def both_networks(
    model: nn.Module,
    pause: Pause,
    wiring: Wiring,
    manner: Manner,
    names: Sequence[str],
    tensors: Mapping[str, Tensor],
    picked: Collection[str] = (),
) -> TwinRun:
    """Runs the original and the pruned network side by side; at every layer it waits for the pruned one's arguments.

    Until a layer gets other arguments, they are one network.

    Args:
        model: The original model, in evaluation mode.
        pause: Where the passes begin.
        wiring: What the network does with its layers' outputs.
        manner: How its passes are paused.
        names: Names of the layers' weights.
        tensors: The model's tensors.
        picked: Layers that read rows which the network picks by their values: the two networks may pick other ones, so
            such a layer is fitted to the original one's.
    """
    answered: dict[str, Arguments] = {}
    seen: list[tuple[str, LayerCall]] = []
    reached: list[Tensor] = []
    wanted, inputs = "", dict[str, Tensor]()
    pruned: Pause | None
    original, pruned, one = pause, None, True  # the pruned one's pass: none while they are one, or once it has ended

    def see(name: str, layer: LayerCall) -> None:
        if name not in answered:
            seen.append((name, layer))
            replay.halt_after()

    def swap(name: str, x: Tensor) -> Arguments:
        if name == wanted and name not in answered:
            reached.append(x)
            replay.halt()
        other = {"input": inputs.pop(name)} if name in inputs else {}
        return {**answered.get(name, {}), **other}

    watches = Watch(tensors, names, see=see), Watch(tensors, names, swap=swap)
    while True:
        replay = Replay(original, follow=watches[0].views.follow, keep=manner.keep)
        waits, _ = go_on(model, original, replay, manner, around=[watches[0]])
        if waits is None:
            return
        original, here = waits, list(seen)
        seen.clear()
        while here:
            wanted, layer = here.pop(0)
            if one:
                reached = [layer.input]
            elif pruned is not None:
                replay = Replay(pruned, follow=watches[1].views.follow, keep=manner.keep)
                pruned, _ = go_on(model, pruned, replay, manner, around=[watches[1]])
            if not reached:  # it takes another path, on which this layer is not called
                answered[wanted] = {}
                continue
            shortcuts = added_at(wiring, wanted, original, layer.output)[0]
            changed, beside = added_at(wiring, wanted, pruned or original, layer.output)
            known, x = None if shortcuts is None or changed is None else (shortcuts, changed), reached.pop()
            if wanted in picked or x.shape != layer.input.shape:
                x, known, beside = layer.input, None, None
            arrival = Arrival(wanted, layer, x, known, beside)
            del x, layer, shortcuts, changed, beside, known
            new = yield arrival
            del arrival
            if new and one:
                pruned, one = original.before_last().copied(tensors.values()), False
            answered[wanted] = {key: value for key, value in new.items() if key != "input"}
            inputs = {wanted: new["input"]} if "input" in new else {}


def manner_of(model: nn.Module, wiring: Wiring, example: Call) -> Manner:
    """How passes of a model are paused, found out by pausing one at some of its layers.

    Args:
        model: The model, in evaluation mode.
        wiring: What the network does with its layers' outputs.
        example: Arguments of a forward pass.

    Raises:
        CalibrationError: If a pass that is paused does not give the same outputs as one that is not.
    """
    put_back, whole = remembered(model), begin(example)
    _, expected = go_on(model, whole, Replay(whole), Manner())
    changes = put_back if put_back() else None
    for manner in (Manner(put_back=changes), Manner(keep=True, put_back=changes)):
        with suppress(CalibrationError):
            if same_values(expected, _in_parts(model, wiring, begin(example), manner)):
                return manner
    raise CalibrationError(
        f"{type(model).__name__} cannot be run in parts: its forward does not call the same functions in every run. "
        "Let it decide by its inputs only, or give refit=None"
    )


def _in_parts(model: nn.Module, wiring: Wiring, pause: Pause, manner: Manner) -> Any:
    """The outputs of a pass that is paused before and after some of the layers."""
    names = list(wiring.layers)
    before = set(names[:: max(1, len(names) // STOPS)])
    after, replay = set(before), Replay(pause)

    def swap(name: str, x: Tensor) -> Arguments:
        if name in before:
            before.remove(name)
            replay.halt()
        return {}

    def see(name: str, layer: LayerCall) -> None:
        if name in after:
            after.remove(name)
            replay.halt_after()

    watching = Watch(named_tensors(model), names, see=see, swap=swap)
    waits: Pause | None = pause
    while waits is not None:
        replay = Replay(waits, follow=watching.views.follow, keep=manner.keep)
        waits, outputs = go_on(model, waits, replay, manner, around=[watching])
    return outputs


def advance(stream: TwinRun, answer: Arguments) -> Arrival | None:
    """Sends an answer; returns the next arrival, or None at the end."""
    try:
        return stream.send(answer)
    except StopIteration:
        return None

"""Sequential asymmetric refit: every linear layer, inputs from the pruned network, targets from the original one."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from lnr_prune.calibration.adapter import AdaptedLayer
from lnr_prune.calibration.calls import Call
from lnr_prune.calibration.data import Calibration
from lnr_prune.calibration.examples import short_example
from lnr_prune.calibration.functions.pause import Manner, begin
from lnr_prune.calibration.functions.prefix import Prefix
from lnr_prune.calibration.moments import SecondMoments
from lnr_prune.calibration.places import Place, places_of
from lnr_prune.calibration.visible.attention import visible_attention
from lnr_prune.graph.module import evaluating, named_tensors, unfused_attention
from lnr_prune.graph.weights import whole_name
from lnr_prune.refit.downstream import Wiring
from lnr_prune.refit.fit import fitted, fitted_to_all_calls
from lnr_prune.refit.follow import wiring_of
from lnr_prune.refit.joint import Maker, Passed, refit_jointly
from lnr_prune.refit.regression import LayerFit
from lnr_prune.refit.side_by_side import Arguments, Arrival, Lockstep, manner_of
from lnr_prune.refit.target import RefitLayer, Target, target_of
from lnr_prune.runtime.checks import check_count, check_size
from lnr_prune.runtime.processes import ALONE, Ranks
from lnr_prune.runtime.work import Work


@dataclass(frozen=True)
class Refit:
    """How the layers are refitted.

    Attributes:
        ridge: Ridge towards the original weights, as a fraction of the inputs' mean second moment; None = chosen on
            held-out samples, layer by layer.
        window: Layers that are refitted together. 1 = each by itself, by least squares. 2 = if a layer is the only one
            that reads what another one makes, the two are refitted again, together. This loses less, above all
            at strong pruning.
        iterations: Iterations for each window of two. 10 give most of the gain, and take as long as about thirty
            forward passes of the calibration data.

    Raises:
        ValueError, TypeError: If a setting is out of range or not a number.

    Example:
        >>> Refit(window=2).iterations
        10
    """

    ridge: float | None = None
    window: int = 1
    iterations: int = 10

    def __post_init__(self) -> None:
        if self.ridge is not None:
            check_size("ridge", self.ridge)
        check_count("window", self.window, 1)
        if self.window > 2:
            raise ValueError(f"window must be 1 (each layer by itself) or 2 (with its maker), got {self.window}")
        check_count("iterations", self.iterations, 1)

    @property
    def joint_iterations(self) -> int:
        """Iterations in which two layers are refitted together; 0 = they are not."""
        return self.iterations if self.window == 2 else 0


@dataclass(frozen=True, eq=False)
class Refitted:
    """What `refit` returns.

    Attributes:
        weights: Full-size parameters (name -> tensor) of the layers that changed; columns that are not kept are zero.
        layers: Weight's name -> how well that layer was fitted.
    """

    weights: Mapping[str, Tensor]
    layers: Mapping[str, LayerFit]


@dataclass(frozen=True, eq=False)
class Solved:
    """A layer's new weights, and perhaps those of the layer that makes its inputs.

    Attributes:
        weights: Parameters and running means, by full name.
        arguments: Name of a layer's weight -> the arguments that the pruned network calls the layer with.
        fit: How well the layer fits.
    """

    weights: Mapping[str, Tensor]
    arguments: Mapping[str, Arguments]
    fit: LayerFit


@dataclass(frozen=True, eq=False)
class Prepared:
    """What several refits to the same data share.

    Attributes:
        calls: The batches.
        places: Where they stand.
        wiring: What the network does with its layers' outputs.
        manner: How its passes are paused.
        prefixes: Per batch, the beginning of its pass through the original network.
    """

    calls: Sequence[Call]
    places: Sequence[Place]
    wiring: Wiring
    manner: Manner
    prefixes: Sequence[Prefix]


def prepared(model: nn.Module, names: Iterable[str], data: Calibration, ranks: Ranks = ALONE) -> Prepared:
    """Runs a short example, to find out what becomes of these layers' outputs."""
    with torch.no_grad(), _seen(model):
        example = ranks.share_out([lambda: short_example(model, data)])[0]
        wiring, calls = wiring_of(model, names, example), list(data)
        manner, tensors = manner_of(model, wiring, example), named_tensors(model)
        prefixes = [Prefix(model, call, tensors, manner) for call in calls]
        return Prepared(calls, list(places_of(calls, ranks, data.counts)), wiring, manner, prefixes)


@contextmanager
def _seen(model: nn.Module) -> Iterator[None]:
    """Within, forwards call all their layers where these can be seen."""
    with evaluating(model), unfused_attention(), visible_attention(model):
        yield


def refit(
    model: nn.Module,
    layers: Mapping[str, AdaptedLayer],
    kept: Mapping[str, Tensor],
    data: Calibration | Prepared,
    *,
    settings: Refit = Refit(),
    bias: bool = True,
    logits: bool | None = False,
    alive: Mapping[str, Tensor] | None = None,
    repeated: Mapping[str, SecondMoments] | None = None,
    picked: Collection[str] = (),
    work: Work = Work(),
) -> Refitted:
    """``argmin_M E||phi(z) - phi(z'(M x))||^2 + ridge ||M - W||_F^2`` on the kept columns, one layer after the other.

    z is what the original network computes from the layer's output y before it is mixed with others: it is scaled and
    shifted, ``z = alpha y + c + beta s``, where s is a shortcut. phi is the activation that follows; see `Downstream`.
    z' is what the pruned network computes from M x, with its own x and s. All earlier layers are already refitted
    there, so each layer undoes the error that reaches it, and that of the shortcut. Without phi, this is a
    least-squares problem. With phi, it is one step, lengthened by `STEP`, of the fixed-point iteration whose next
    target is ``z' + phi(z) - phi(z')``. If a layer without a bias is followed by a batch norm, the intercept goes into
    its running mean.

    The networks run side by side, see `Lockstep`. This costs two passes over the data, however deep the network is,
    and memory for the activations at one layer, for all the data. Processes that prune together solve the same
    equations, each with the batches of its own shard.

    Args:
        model: The original model; it is not changed.
        layers: Weight's name -> how to read and write the layer, in order of execution.
        kept: Weight's name -> the columns of x that stay, (d,) bool; default: all of them.
        data: The calibration data; for several refits to the same, see `prepared`.
        settings: How carefully the layers are fitted.
        bias: Whether running means may take up intercepts.
        logits: Whether the network's output is logits. If so, the layer that gives them is fitted to their softmax,
            see `softmax_regression`. None = it is if held-out samples then fit better, and not worse by squares.
        alive: Weight's name -> the rows of y that are still read, (h,) bool, for layers whose rows do not all stay.
        repeated: Weight's name -> moments of all its calls in the original network, for layers that are called
            several times in a forward pass. They are refitted to these moments at their first call.
        picked: Names of weights, or of stacks of them, that are applied to rows which the network picks by their
            values, such as those of experts. The pruned network may pick other rows: these layers are fitted with the
            original one's x.
        work: The processes, the progress, and where solved layers are kept.

    Raises:
        CalibrationError: If there is no batch, or an activation is not finite.
    """
    tensors = named_tensors(model)
    weights: dict[str, Tensor] = {}
    fits: dict[str, LayerFit] = {}
    called: dict[str, Arguments] = {}  # what the pruned network calls each layer with
    passed: dict[str, dict[int, Passed]] = {}  # layers that make another one's inputs -> batches that have passed them
    ready = data if isinstance(data, Prepared) else prepared(model, layers, data, work.ranks)
    wiring, places = ready.wiring, ready.places
    with torch.no_grad(), _seen(model):
        makers = _makers(wiring) if settings.window == 2 else {}

        def layer_of(name: str) -> RefitLayer:
            takes = bias and layers[name].consumer.bias is None
            mean = wiring.layers[name].mean if takes else None
            return RefitLayer(layers[name], tensors, kept.get(name), (alive or {}).get(name), mean)

        chosen = {name for name in layers if {name, whole_name(name)[0]} & set(picked)}
        losing = {id(tensors[whole_name(name)[0]]) for name in layers if not layer_of(name).whole}
        starts = zip(ready.calls, ready.prefixes, strict=True)
        shared = isinstance(data, Prepared) and not makers  # a maker may come before the first layer that changes
        passes = ((prefix.before(losing) if shared else None) or begin(call) for call, prefix in starts)
        walk = Lockstep(model, passes, wiring, ready.manner, list(layers), work.ranks, chosen)
        for name, arrivals in walk:
            work.step(f"refitting {layers[name].consumer.name}")
            layer, maker = layer_of(name), makers.get(name, "")
            through, inputs = passed.pop(maker, {}), dict[int, Tensor]()
            lost = not layer.whole or not all(arrival.unchanged for arrival in arrivals.values())
            changed = any(work.ranks.all_gather(lost))
            joint = all(work.ranks.all_gather(arrivals.keys() <= through.keys())) and maker in called
            called[name] = {}
            if changed:
                before = None
                if joint:
                    first = layer_of(maker)
                    N = first.matrix(weights, called[maker].get("bias"))
                    before = Maker(first, N, [through[batch] for batch in arrivals], settings.iterations)
                target = partial(_target, layer, wiring, arrivals, places, work)
                moments, softmax = (repeated or {}).get(name), logits if name == wiring.last else False
                solved = partial(solve_layer, layer, target, before, moments, settings.ridge, softmax, work)
                found = work.remembered(f"refit of {name}", Solved, solved)
                weights |= found.weights
                called |= found.arguments
                fits[name] = found.fit
                if maker in found.arguments:  # the layer now reads other inputs
                    inputs = {batch: through[batch].onwards(called[maker]) for batch in arrivals}
            if name in makers.values():
                way = wiring.layers[name].way
                passed[name] = {
                    batch: Passed.of(arrival, way, places[batch].counts)
                    for batch, arrival in arrivals.items()
                    if arrival.beside is not None
                }
            walk.go_on(name, arrivals, called[name], inputs)
    return Refitted(weights, fits)


def _makers(wiring: Wiring) -> dict[str, str]:
    """Layer -> the layer that makes its inputs for it alone."""
    return {downstream.into: name for name, downstream in wiring.layers.items() if downstream.into is not None}


def _target(
    layer: RefitLayer, wiring: Wiring, arrivals: Mapping[int, Arrival], places: Sequence[Place], work: Work
) -> Target:
    at = [places[batch] for batch in arrivals]
    return target_of(layer.adapted, wiring.layers[layer.name], list(arrivals.values()), at, work.ranks)


def solve_layer(
    layer: RefitLayer,
    target: Callable[[], Target],
    maker: Maker | None,
    moments: SecondMoments | None,
    ridge: float | None,
    softmax: bool | None,
    work: Work,
) -> Solved:
    """One layer of the refit: ``argmin_M E||phi(z) - phi(z'(M x))||^2 + ridge ||M - W||_F^2``.

    Args:
        layer: The layer.
        target: Returns what it is fitted to.
        maker: The layer that makes its inputs, to refit both together; None = this one alone.
        moments: Moments of all its calls, if it has several; it is then fitted to these instead.
        ridge: The ridge; None = chosen on held-out samples.
        softmax: Whether it gives logits, and is fitted to their softmax; None = only if that fits better.
        work: The processes that solve it together.
    """
    if moments is not None:
        M, fit = fitted_to_all_calls(layer, moments, ridge)
        return _written(fit, (layer, M))
    aimed = target()
    M, fit = fitted(layer, aimed, ridge, softmax=softmax)
    M = work.ranks.broadcast(M)[0]
    found = None if maker is None else refit_jointly(maker, layer, M, aimed, logits=softmax is True)
    if maker is None or found is None:
        return _written(fit, (layer, M))
    N, M, error, scale = found
    return _written(replace(fit, error=error, scale=scale), (maker.layer, N), (layer, M))


def _written(fit: LayerFit, *matrices: tuple[RefitLayer, Tensor]) -> Solved:
    arguments = {layer.name: layer.arguments(M) for layer, M in matrices}
    written = [layer.parameters(arguments[layer.name]) for layer, _ in matrices]
    return Solved({name: value for of in written for name, value in of.items()}, arguments, fit)

"""A window of two layers, refitted together: one that reads channels, and the one that makes them for it alone.

A layer by itself can only mix the channels that are left. Say that two of three channels stay, and that the layer needs
the sum of all three: least squares on the two cannot give it. But the layer before can change, too, so that one of the
two channels *is* that sum. With nothing in between, this is a truncated singular value decomposition. With a
nonlinearity g between the matrices N and M, ::

    x  ->  N x  ->  g  ->  M g(N x)  ->  z'  ->  phi(z')      should equal phi(z) of the original network,

it is a small network of two matrices. A few iterations of L-BFGS train it to do what the original network does, without
labels. Plain coordinates would need hundreds of iterations. In the coordinates of ``whitening``, where the inputs and
the gradients of the outputs of both layers are white, ten are enough. Held-out samples decide which iterate is taken.
The path from N's output to M's input is computed again in every evaluation. So computing it again must give what the
network really computed; if not, the two layers are left as they are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from lnr_prune.calibration.moments import SecondMoments
from lnr_prune.calibration.rows import rows, shifts
from lnr_prune.calibration.watch import LayerCall, without
from lnr_prune.errors import ran_out_of_memory
from lnr_prune.refit.downstream import Steps
from lnr_prune.refit.side_by_side import Arrival
from lnr_prune.refit.target import RefitLayer, Target
from lnr_prune.refit.whitening import Coordinates


@dataclass(frozen=True, eq=False)
class Passed:
    """A batch that has passed a layer, in the pruned network.

    Attributes:
        call: The call, with its input in the pruned network; of its output, only the shape.
        way: The path: the output -> the next layer's input.
    """

    call: LayerCall
    way: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, arrival: Arrival, way: Steps, counts: Tensor | None) -> "Passed":
        """A batch that is about to pass a layer; ``way`` leads to the next layer, and ``counts`` says what counts."""
        call = replace(arrival.call, input=arrival.x, output=torch.empty_like(arrival.call.output, device="meta"))
        return cls(call.counting(counts), partial(way, added=arrival.beside or ()))

    def onwards(self, arguments: Mapping[str, Tensor]) -> Tensor:
        """The next layer's input if this layer is called with these arguments."""
        return self.way(self.call.again(**arguments))


@dataclass(frozen=True, eq=False)
class Maker:
    """The layer that makes another one's inputs.

    Attributes:
        layer: The layer.
        N: Its matrix in the pruned network.
        passed: The batches.
        iterations: Number of iterations in which the two layers are refitted.
    """

    layer: RefitLayer
    N: Tensor
    passed: Sequence[Passed]
    iterations: int


def refit_jointly(
    maker: Maker, layer: RefitLayer, M: Tensor, target: Target, *, logits: bool
) -> tuple[Tensor, Tensor, float, float] | None:
    """``argmin_{N, M} E||phi(z) - phi(z'(M g(N x)))||^2``: two layers at once, starting from N and M.

    x is the first layer's input in the pruned network, and g computes the second one's input from its output; z, z' and
    phi are as in `refit`. A layer alone can only mix the channels that are left; here, these become the ones that it
    needs most. L-BFGS runs in coordinates where the second moments of both layers' inputs, and of the gradients of
    their outputs, are the identity. Of all matrices tried, those with the least error on held-out samples are taken.

    Args:
        maker: The first layer. An iteration costs about three forward passes of the two.
        layer: The second one.
        M: Its matrix.
        target: What it is fitted to.
        logits: Whether z is logits: then phi is their softmax, and errors are divergences.

    Returns:
        N and M, the error, and ``E||phi(z)||^2`` (for logits, the entropy); None if the path between the layers cannot
        be computed again, or nothing tried was better.

    References:
        Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature", 2015: the
        coordinates.
    """
    block = _Block(maker, layer, target, logits)
    if not all(target.ranks.all_gather(block.repeats())):
        return None
    starts, stays = (maker.N, M), (maker.layer.stays(), layer.stays())
    moments = _moments(block, M, stays)
    if moments is None or not moments.finite:
        return None
    coordinates = [Coordinates.of(*side) for side in zip(starts, stays, moments.inputs, moments.outputs, strict=True)]
    V = [each.of_matrix(start).requires_grad_() for each, start in zip(coordinates, starts, strict=True)]
    if not any(v.numel() for v in V):  # nothing reads either layer
        return None
    tried: list[tuple[_Error, list[Tensor]]] = []  # the first, and the best

    def loss() -> Tensor:
        for mine, same in zip(V, target.ranks.broadcast(*V), strict=True):
            mine.detach().copy_(same)
        with torch.enable_grad():
            matrices = [each.matrix(v) for each, v in zip(coordinates, V, strict=True)]
            error, gradients = _error(block, *(each.detach().requires_grad_() for each in matrices))
            start = (tried[0][0] if tried else error).fit or 1.0
            scaled = [gradient / start for gradient in gradients]
            for v, gradient in zip(V, torch.autograd.grad(matrices, V, scaled), strict=True):
                v.grad = gradient.contiguous()
        if not tried or error.judged < tried[-1][0].judged:
            tried[1:] = [(error, [each.detach() for each in matrices])]
        return V[0].new_tensor(error.fit / start)

    torch.optim.LBFGS(V, max_iter=maker.iterations, line_search_fn="strong_wolfe").step(loss)
    if len(tried) == 1:
        return None
    error, found = tried[-1]
    N, M = target.ranks.broadcast(*found)
    return N, M, (error.fit + error.held) / moments.rows, moments.power / moments.rows


@dataclass(frozen=True, eq=False)
class _Block:
    """Two layers, and what comes behind them; batches are given by their index."""

    maker: Maker
    layer: RefitLayer
    target: Target
    logits: bool

    @cached_property
    def batches(self) -> list[int]:
        """The batches that are not empty."""
        return [index for index, call in enumerate(self.target.calls) if len(call.input)]

    def repeats(self) -> bool:
        """Whether computing the path again gives what the pruned network computed."""
        arguments = self.maker.layer.arguments(self.maker.N)
        try:
            return all(
                _alike(passed.onwards(arguments), call.input)
                for passed, call in zip(self.maker.passed, self.target.calls, strict=True)
            )
        except (RuntimeError, TypeError, ValueError, IndexError):  # it fixes the recorded batch's size
            return False

    def run(self, batch: int, N: Tensor, M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The outputs of both layers, and ``phi(z')``."""
        passed = self.maker.passed[batch]
        y = passed.call.again(**self.maker.layer.arguments(N))
        output = self.target.calls[batch].again(input=passed.way(y), **self.layer.arguments(M))
        return y, output, self.activated(batch, output, 1)

    def activated(self, batch: int, y: Tensor, network: int) -> Tensor:
        """``phi(z)``, or its logarithm for logits, with the shortcuts of the original (0) or the pruned (1) network."""
        added = self.target.shortcuts[batch][network] if self.target.shortcuts else []
        z = self.target.downstream.affine(y, added)
        if self.logits:
            return z.log_softmax(-1)
        return z if self.target.downstream.activation is None else self.target.downstream.activation(z)

    def wanted(self, batch: int) -> Tensor:
        """``phi(z)`` of the original network."""
        return self.activated(batch, self.target.calls[batch].output, 0)

    @cached_property
    def alive(self) -> dict[int, Tensor]:
        """Per batch, 1 where an entry of a sample's output is still read, else 0, as a vector."""
        return {batch: self._alive(self.target.calls[batch]) for batch in self.batches}

    def _alive(self, call: LayerCall) -> Tensor:
        one = call.output[:1].detach().requires_grad_()
        with torch.enable_grad():
            rows = self.layer.adapted.outputs(replace(call, output=one, bias=None))
            some = rows if self.layer.alive is None else rows[:, self.layer.alive]
            (mask,) = torch.autograd.grad(some.sum(), one)
        return mask.flatten()

    def counted(self, batch: int, values: Tensor) -> Tensor:
        """Zero where a batch's output does not count."""
        counts = self.target.calls[batch].counts
        return values if counts is None else without(values, ~counts, 0.0)

    @cached_property
    def held(self) -> dict[int, Tensor]:
        """Per batch, which samples are held out, (n,) bool."""
        return {batch: self.target.places[batch].held(len(self.target.calls[batch].input)) for batch in self.batches}


@dataclass(frozen=True)
class _Error:
    """Errors summed over the samples to fit on, over the held-out ones, and over those that judge.

    The held-out samples judge, if there are any.
    """

    fit: float
    held: float
    judged: float


def _error(block: _Block, N: Tensor, M: Tensor) -> tuple[_Error, list[Tensor]]:
    """``||phi(z) - phi(z')||^2``, or divergence, and its gradients on the samples to fit on."""
    sums, gradients = N.new_zeros(3), [torch.zeros_like(each) for each in (N, M)]
    for batch in block.batches:
        wanted, made = block.wanted(batch), block.run(batch, N, M)[-1]
        parts = wanted.exp() * (wanted - made) if block.logits else (wanted - made).square()
        errors, held = (block.counted(batch, parts).flatten(1) @ block.alive[batch]).double(), block.held[batch]
        fit = errors[~held].sum()
        for total, part in zip(gradients, torch.autograd.grad(fit, (N, M)), strict=True):
            total += part
        sums += torch.stack([fit, errors[held].sum(), held.sum().to(fit)]).detach()
    sums, *gradients = block.target.ranks.all_sum(sums.detach(), *gradients)
    fitted, held_out, count = sums.tolist()
    return _Error(fitted, held_out, held_out if count else fitted), gradients


@dataclass(frozen=True, eq=False)
class _Moments:
    """Second moments of both layers' inputs, per sample, and of the gradients of their outputs, per row.

    Attributes:
        inputs: (d, d) of the columns that stay.
        outputs: (h, h).
        power: The sum of ``||phi(z)||^2``, or of the entropy of logits.
        rows: Number of rows of the second layer's output.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    power: float
    rows: int

    @property
    def finite(self) -> bool:
        return all(bool(torch.isfinite(moments).all()) for moments in (*self.inputs, *self.outputs))


def _moments(block: _Block, M: Tensor, stays: Sequence[Tensor]) -> _Moments | None:
    """The second moments of the two layers; None if the path between them has no derivative.

    The gradients are those of random combinations of phi(z'). Their second moments times those of the inputs
    approximate the diagonal blocks of the Gauss-Newton matrix.
    """
    layers, starts = (block.maker.layer, block.layer), [each.clone().requires_grad_() for each in (block.maker.N, M)]
    inputs = [SecondMoments.zeros(0, int(columns.sum()), M.device) for columns in stays]
    outputs = [SecondMoments.zeros(0, len(start), M.device) for start in starts]
    sums = M.new_zeros(4)  # samples, rows of both outputs, power
    derived = True
    for batch in block.batches:
        passed, call, place = block.maker.passed[batch], block.target.calls[batch], block.target.places[batch]
        numbers, alive = place.start(len(call.input)) + torch.arange(len(call.input)), block.alive[batch]
        with torch.enable_grad():
            *ys, phi = block.run(batch, *starts)
            fisher = (phi / 2).exp().detach() if block.logits else 1.0
            drawn = block.counted(batch, phi * _random(phi, numbers) * fisher)
            gradients = _derived((drawn.flatten(1) @ alive).sum(), ys)
        if gradients is None:
            derived = False
            break
        reads = passed.call, replace(call, input=passed.way(ys[0].detach()))
        for index, (layer, read, gradient) in enumerate(zip(layers, reads, gradients, strict=True)):
            for x, g in rows(layer.adapted, replace(read, output=gradient, bias=None), place.samples, numbers):
                inputs[index] = inputs[index].with_rows(layer.inputs(x)[:, stays[index]], x.new_empty(len(x), 0))
                outputs[index] = outputs[index].with_rows(g, g.new_empty(len(g), 0))
        wanted = block.wanted(batch)
        power = block.counted(batch, -(wanted.exp() * wanted) if block.logits else wanted.square()).flatten(1) @ alive
        counts = [len(call.input), *(y.numel() // len(start) for y, start in zip(ys, starts, strict=True))]
        sums += torch.stack([*sums.new_tensor(counts), power.sum().to(sums)])
    if not all(block.target.ranks.all_gather(derived)):
        return None
    samples, *counts, whole = block.target.ranks.all_sum(sums)[0].tolist()
    xs, gs = ([each.over_ranks(block.target.ranks) for each in of] for of in (inputs, outputs))
    per_sample = tuple(x.xx / x.count * (count / samples) for x, count in zip(xs, counts, strict=True))
    return _Moments(per_sample, tuple(g.xx / g.count for g in gs), whole, int(counts[1]))


def _derived(value: Tensor, by: Sequence[Tensor]) -> Sequence[Tensor] | None:
    """The gradients, None if there are none."""
    try:
        return torch.autograd.grad(value, by)
    except RuntimeError as error:
        if ran_out_of_memory(error):
            raise
        return None


def _random(like: Tensor, numbers: Tensor) -> Tensor:
    """A random number for each entry of each sample; it depends on the sample's number only."""
    size = like[0].numel()
    drawn = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(like)
    moved = (torch.arange(size) + shifts(size, numbers)) % size
    return drawn[moved.to(like.device)].view_as(like)


def _alike(a: Tensor, b: Tensor) -> bool:
    largest = float(b.abs().max()) if b.numel() else 0.0
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-3 * largest)

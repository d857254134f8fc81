"""Second moments of every consumer's inputs and outputs, in one pass over the calibration data."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lnr_prune.calibration import Calibration, run
from lnr_prune.calibration import Call as ModelCall
from lnr_prune.errors import CalibrationError
from lnr_prune.graph import named_tensors
from lnr_prune.multihead import visible_attention
from lnr_prune.problem import Block

CHUNK = 2**23  # elements of x in float64 that are held at a time: 64 MiB

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_PRODUCT = ("input", "weight")
_SIGNATURES: dict[Any, tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    torch.addmm: ("bias", "input", "weight"),
    **dict.fromkeys((torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__), _PRODUCT),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _CONV),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _TRANSPOSED),
}


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One application of a consumer's weight: what an adapter reads x and y from.

    Attributes:
        input: The layer's input, batched.
        output: Its output.
        weight: The weight it used.
        bias: The bias it used, or None.
        options: The call's other arguments (stride, padding, dilation, groups).
    """

    input: Tensor
    output: Tensor
    weight: Tensor
    bias: Tensor | None
    options: Mapping[str, Any]

    def chunks(self, samples: int) -> Iterator["LayerCall"]:
        """The call in pieces of so many samples."""
        for x, y in zip(torch.split(self.input, samples), torch.split(self.output, samples), strict=True):
            yield LayerCall(x, y, self.weight, self.bias, self.options)


class Reader(Protocol):
    """Turns a layer's call into rows of samples; an adapter does it for its consumer."""

    def inputs(self, call: LayerCall) -> Tensor:
        """x, one row a sample, (n, d)."""
        ...

    def outputs(self, call: LayerCall) -> Tensor:
        """y, one row a sample, (n, h)."""
        ...


@dataclass(frozen=True, eq=False)
class SecondMoments:
    """Sums of second moments, float64; moments of two halves of the data add up to those of the whole.

    Attributes:
        xx: ``sum x x^T``, (d, d).
        yx: ``sum y x^T``, (h, d).
        yy: ``sum ||y||^2``, scalar tensor.
        count: Number of samples (rows) summed.
    """

    xx: Tensor
    yx: Tensor
    yy: Tensor
    count: int

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> "SecondMoments":
        """The moments of rows x, (n, d), and y, (n, h)."""
        x, y = x.double(), y.double()
        return cls(x.T @ x, y.T @ x, y.square().sum(), len(x))

    @classmethod
    def white(cls, M: Tensor) -> "SecondMoments":
        """The moments of ``y = M x`` for inputs with ``E[x x^T] = I``, as one sample."""
        M = M.double()
        return cls(torch.eye(M.shape[1], dtype=M.dtype, device=M.device), M, M.square().sum(), 1)

    def __add__(self, other: "SecondMoments") -> "SecondMoments":
        return SecondMoments(self.xx + other.xx, self.yx + other.yx, self.yy + other.yy, self.count + other.count)

    def restricted(self, columns: Tensor) -> "SecondMoments":
        """The moments as if all but these columns of x, (d,) bool, were zero."""
        return SecondMoments(self.xx * columns * columns[:, None], self.yx * columns, self.yy, self.count)

    def block(self, groups: Tensor) -> Block:
        """``R = E[x x^T]``, ``B = E[y x^T]``, ``t = E||y||^2``, as a block of a `GroupLasso`."""
        n = self.count
        return Block(self.xx / n, self.yx / n, float(self.yy) / n, groups.to(self.xx.device))


def gather(
    model: nn.Module,
    readers: Mapping[str, Reader],
    data: Calibration,
    *,
    weights: Mapping[str, Tensor] | None = None,
    progress: Callable[[], None] | None = None,
) -> dict[str, SecondMoments]:
    """One pass over the calibration data: the second moments of every consumer at once.

    y always comes from the model as it is. x does too, or, if ``weights`` are given, from the model with
    these tensors in place of its own: the network pruned so far.

    Args:
        model: The model, in any mode; it is run in evaluation mode.
        readers: Name of a consumer's weight -> how to read its calls.
        data: The calibration data.
        weights: Tensors (parameter name -> full-size value) of the pruned network.
        progress: Called after every batch.

    Returns:
        Name of the weight -> its `SecondMoments`.

    Raises:
        CalibrationError: If there is no batch, a consumer is never called, or an activation is not finite.
    """
    moments: dict[str, SecondMoments] = {}
    targets: dict[str, deque[Tensor]] = {name: deque() for name in readers}

    def keep_target(name: str, layer: LayerCall) -> None:
        targets[name].append(readers[name].outputs(layer))

    def add(name: str, layer: LayerCall) -> None:
        y = targets[name].popleft() if weights else readers[name].outputs(layer)
        for term in _accumulate(readers[name], layer, y):
            moments[name] = moments[name] + term if name in moments else term

    batch = -1
    for batch, call in enumerate(data):
        if weights:
            watch(model, call, readers, {}, keep_target)
        watch(model, call, readers, weights or {}, add)
        _check_finite(moments, batch)
        if progress:
            progress()
    if batch < 0:
        raise CalibrationError("the calibration data holds no batch; give at least one batch of inputs")
    unseen = [name for name in readers if name not in moments]
    if unseen:
        raise CalibrationError(
            f"no call of {', '.join(unseen)} was seen in {batch + 1} batches: the forward takes another path on "
            "this data than on the example that was traced"
        )
    return moments


def _accumulate(reader: Reader, layer: LayerCall, y: Tensor) -> Iterator[SecondMoments]:
    samples = len(layer.input)
    if samples == 0:
        return
    if layer.input.device.type == "mps":  # has no float64
        layer = LayerCall(layer.input.cpu(), layer.output.cpu(), layer.weight.cpu(), None, layer.options)
        y = y.cpu()
    d = layer.weight.numel() // min(layer.weight.shape[:2]) + 1
    size = max(1, CHUNK // (d * max(1, len(y) // samples)))
    rows = torch.split(y, size * (len(y) // samples))
    for chunk, y_chunk in zip(layer.chunks(size), rows, strict=True):
        yield SecondMoments.of(reader.inputs(chunk), y_chunk)


def _check_finite(moments: Mapping[str, SecondMoments], batch: int) -> None:
    for name, sums in moments.items():
        for side, total in (("inputs", sums.xx.diagonal().sum()), ("outputs", sums.yy)):
            if not bool(torch.isfinite(total)):
                raise CalibrationError(
                    f"the {side} of layer {name.removesuffix('.weight')!r} are not finite in batch {batch}: "
                    "remove NaN and Inf from the calibration data, or calibrate in a wider dtype"
                )


class _Watch(TorchFunctionMode):
    """Sees every call that uses a watched weight, modules and functional calls alike."""

    def __init__(self, watched: Mapping[int, str], on_call: Callable[[str, LayerCall], None]) -> None:
        super().__init__()
        self.watched, self.on_call = watched, on_call

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _SIGNATURES:
            named = {**dict(zip(_SIGNATURES[func], args, strict=False)), **kwargs}
            name = self.watched.get(id(named.get("weight")))
            if name is not None:
                x, weight, bias = named.pop("input"), named.pop("weight"), named.pop("bias", None)
                y = result
                if x.dim() == 1 or x.dim() < weight.dim():  # without batch axis
                    x, y = x[None], y[None]
                self.on_call(name, LayerCall(x, y, weight, bias, named))
        return result


def watch(
    model: nn.Module,
    call: ModelCall,
    names: Iterable[str],
    weights: Mapping[str, Tensor],
    on_call: Callable[[str, LayerCall], None],
) -> None:
    """Runs the model once and reports every application of the named weights.

    Args:
        model: The model.
        call: Arguments of the forward pass.
        names: Names of the weights.
        weights: Tensors to run with in place of the model's own.
        on_call: Gets the weight's name and the call.
    """
    tensors = {**named_tensors(model), **weights}
    with visible_attention(model), _Watch({id(tensors[name]): name for name in names}, on_call):
        run(model, call, weights)

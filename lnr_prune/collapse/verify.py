"""Verification: the smaller model must equal the masked model, numerically."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lnr_prune.calibration.calls import Call, run
from lnr_prune.calibration.outputs import outputs_of
from lnr_prune.errors import CalibrationError, GraphError, VerificationError
from lnr_prune.graph.module import Example, calling, named_tensors
from lnr_prune.graph.modules.twins import deep_copy

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 5e-2}
"""Largest difference allowed, relative to the largest output; rounding grows with depth."""


class Reference:
    """Outputs of the masked model, in float64 if it runs in float64, to compare with those of a pruned model."""

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, Tensor],
        example: Call,
        *,
        also: Sequence[Example] = (),
        training: bool = False,
        wide: bool = True,
    ) -> None:
        """Runs the model with these full-size tensors in place of its own.

        It runs in float64 if it can, see `outputs_of`; else in its own dtype, with the tolerance of that dtype.

        Args:
            model: The whole model.
            weights: The tensors.
            example: Arguments of one forward pass.
            also: Other calls whose outputs are compared, too, in evaluation mode.
            training: Whether to compare in training mode as well. Dropout then lets everything through, as its
                choice depends on the number of channels.
            wide: Whether to try float64.
        """
        main = Example(example)
        self.runs = [(main, False), *([(main, True)] if training else []), *((other, False) for other in also)]
        self.wide = wide
        try:
            self.outputs = [self._outputs(model, weights, *of) for of in self.runs]
        except CalibrationError:  # the forward insists on its own dtype
            if not wide:
                raise
            self.wide = False
            self.outputs = [self._outputs(model, weights, *of) for of in self.runs]
        self.original = [  # only to see which NaN and Inf are meant, such as masked scores
            outputs if all(map(_is_finite, outputs)) else self._outputs(model, {}, *of)
            for of, outputs in zip(self.runs, self.outputs, strict=True)
        ]

    def _outputs(
        self, model: nn.Module, weights: Mapping[str, Tensor], example: Example, training: bool
    ) -> list[Tensor]:
        with calling(model, example.method):
            return outputs_of(model, weights, example.call, wide=self.wide, training=training)

    def check(self, pruned: nn.Module) -> None:
        """Compares the pruned model with the masked one.

        Raises:
            VerificationError: If the pruned model does not run, or differs by more than rounding.
        """
        for (example, training), expected, original in zip(self.runs, self.outputs, self.original, strict=True):
            try:
                outputs = self._outputs(pruned, {}, example, training)
            except CalibrationError as error:
                raise VerificationError(f"the pruned model does not run: {error}") from error
            _compare(outputs, expected, original)


def _is_finite(output: Tensor) -> bool:
    return bool(output.isfinite().all())


def _compare(outputs: list[Tensor], references: list[Tensor], originals: list[Tensor]) -> None:
    """Compares outputs; NaN and Inf are equal to themselves where the original has them, too."""
    if [out.shape for out in outputs] != [out.shape for out in references]:
        raise VerificationError(
            f"the pruned model's outputs have shapes {[tuple(out.shape) for out in outputs]}, the masked "
            f"model's {[tuple(out.shape) for out in references]}"
        )
    floating = [out for out in references if out.is_floating_point() and out.numel()]
    if floating and not any(bool(out.isfinite().any()) for out in floating):
        raise VerificationError("the masked model's outputs are all NaN or Inf, so nothing can be compared")
    for got, expected, original in zip(outputs, references, originals, strict=True):
        if not got.is_floating_point():
            equal = torch.equal(got, expected)
            difference, scale, tolerance = (0.0 if equal else 1.0), 1.0, 0.0
        else:
            meant = ~original.isfinite() & ((got == expected) | (got.isnan() & expected.isnan()))
            difference = float((got - expected).masked_fill(meant, 0.0).abs().max()) if got.numel() else 0.0
            scale = max(float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max()) if got.numel() else 0.0, 1e-30)
            tolerance = TOLERANCE[got.dtype]
        if not difference <= tolerance * scale:
            raise VerificationError(
                f"the pruned model differs from the masked one by {difference / scale:.1e} of the largest "
                f"output, expected at most {tolerance:.0e}: its forward uses the removed channels in a way "
                "that the graph did not show. Your model is untouched; exclude layers with Keep({...}), "
                "and please report the model"
            )


def copied(model: nn.Module, example: Call) -> nn.Module:
    """A deep copy whose forward runs on its own parameters.

    Raises:
        GraphError: If the model cannot be copied, or if the copy's forward still uses the original's parameters.
            This happens when functions stored on the model close over it.
    """
    try:
        copy_ = deep_copy(model)
    except Exception as error:  # deepcopy raises whatever the model's attributes raise
        raise GraphError(
            f"{type(model).__name__} cannot be deep-copied ({error}); prune it with into='model'"
        ) from error
    originals = {id(tensor): name for name, tensor in named_tensors(model).items()}
    own = {id(tensor) for tensor in named_tensors(copy_).values()}
    seen = _Seen()
    with seen:
        run(copy_, example)
    foreign = sorted(originals[ref] for ref in seen.tensors if ref in originals and ref not in own)
    if foreign:
        raise GraphError(
            f"a deep copy of {type(model).__name__} runs on the original's parameters ({', '.join(foreign[:3])}...): "
            "its forward calls functions, such as lambdas in a list, that close over the original. Prune it with "
            "into='model', or turn these functions into methods"
        )
    return copy_


class _Seen(TorchFunctionMode):
    """Remembers every parameter that a torch function is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.tensors.update(id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, nn.Parameter))
        return func(*args, **(kwargs or {}))

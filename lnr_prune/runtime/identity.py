"""What makes two runs the same, so that one can continue where the other stopped."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lnr_prune._version import __version__
from lnr_prune.errors import PlanError
from lnr_prune.runtime.codec import parsed, typed
from lnr_prune.runtime.digest import HASH, digest, printed, sha256


@dataclass(frozen=True)
class Identity:
    """What a result depends on.

    Attributes:
        version: Version of lnr-prune.
        torch: Version of torch.
        arguments: Arguments of the prune, by name, in printed form.
        architecture: SHA-256 of the printed model.
        weights: SHA-256 of its tensors and their devices.
        data: SHA-256 of every batch, for each process.
    """

    version: str
    torch: str
    arguments: Mapping[str, str]
    architecture: str
    weights: str
    data: tuple[tuple[str, ...], ...]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        tensors: Mapping[str, Tensor],
        batches: Iterable[tuple[str, ...]],
        arguments: Mapping[str, object],
    ) -> "Identity":
        """The identity of the run that prunes this model.

        Args:
            model: The model.
            tensors: Its parameters and buffers, under all of their names.
            batches: SHA-256 of every batch of the calibration data, for each process.
            arguments: The arguments of the prune that its result depends on.
        """
        device = next(iter(tensors.values())).device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return cls(
            __version__,
            torch.__version__,
            {name: _argument(value) for name, value in {**arguments, "autocast": autocast}.items()},
            sha256(printed(model)),
            digest(tensors),
            tuple(batches),
        )

    def to_json(self) -> str:
        """The identity as text, with the text's SHA-256."""
        entries = asdict(self)
        return json.dumps({**entries, HASH: sha256(json.dumps(entries))}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Identity":
        """The identity that `to_json` wrote.

        Raises:
            PlanError: If the text is damaged.
        """
        entries = parsed(text)
        expected = entries.pop(HASH, None) if isinstance(entries, dict) else None
        if expected != sha256(json.dumps(entries)):
            raise PlanError("its SHA-256 is not the one that was written with it")
        return typed(entries, cls)

    def differences(self, then: "Identity") -> Iterator[str]:
        """How this run differs from an earlier one, in words."""
        named = {"lnr-prune": (then.version, self.version), "torch": (then.torch, self.torch)}
        for name in dict.fromkeys((*then.arguments, *self.arguments)):
            named[name] = then.arguments.get(name, "not known"), self.arguments.get(name, "not known")
        yield from (f"{name}: {before}, now {now}" for name, (before, now) in named.items() if before != now)
        if then.architecture != self.architecture:
            yield "a model with other layers"
        elif then.weights != self.weights:
            yield "other weights, or on another device"
        if len(then.data) != len(self.data):
            yield f"{len(then.data)} processes, now {len(self.data)}"
            return
        for before, now in zip(then.data, self.data, strict=True):
            if before != now:
                first = next((i for i, (a, b) in enumerate(zip(before, now, strict=False)) if a != b), None)
                what = f"{len(before)} batches, now {len(now)}" if first is None else f"from batch {first} on"
                yield f"other calibration data ({what})"
                return


def _argument(value: Any) -> str:
    """Printed form of an argument; names in a mapping are sorted, so that their order does not matter."""
    if is_dataclass(value) and not isinstance(value, type):
        given = {field.name: getattr(value, field.name) for field in fields(value)}
        by_name = {name: dict(sorted(of.items())) for name, of in given.items() if isinstance(of, Mapping)}
        value = replace(value, **by_name) if by_name else value
    return printed(value)

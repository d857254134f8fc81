"""What makes two runs the same: then one can go on where the other ended."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import lnr_prune
from lnr_prune import distributed
from lnr_prune.calibration import Calibration, Call
from lnr_prune.errors import CalibrationError, PlanError
from lnr_prune.graph import named_tensors
from lnr_prune.plain_data import parsed, typed
from lnr_prune.record import HASH, digest_of

_ADDRESS = re.compile(r" at 0x[0-9a-f]+", re.IGNORECASE)


@dataclass(frozen=True)
class Run:
    """What a result depends on.

    Attributes:
        version: Version of lnr-prune.
        torch: Version of torch.
        arguments: Of the prune, by name, as they are printed.
        architecture: SHA-256 of the printed model.
        weights: SHA-256 of its tensors and where they are.
        data: Per process, SHA-256 of every batch.
    """

    version: str
    torch: str
    arguments: Mapping[str, str]
    architecture: str
    weights: str
    data: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, model: nn.Module, data: "Fixed", arguments: Mapping[str, object]) -> "Run":
        """The run that prunes this model with these arguments, on the data of all processes."""
        tensors = named_tensors(model)
        device = next(iter(tensors.values())).device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return cls(
            lnr_prune.__version__,
            torch.__version__,
            {name: _argument(value) for name, value in {**arguments, "autocast": autocast}.items()},
            sha256(_printed(model)),
            digest(tensors),
            tuple(distributed.everyone(data.digests)),
        )

    def to_json(self) -> str:
        """As text, with its own SHA-256."""
        entries = asdict(self)
        return json.dumps({**entries, HASH: sha256(json.dumps(entries))}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Run":
        """The run that `to_json` wrote.

        Raises:
            PlanError: If the text is damaged.
        """
        entries = parsed(text)
        expected = entries.pop(HASH, None) if isinstance(entries, dict) else None
        if expected != sha256(json.dumps(entries)):
            raise PlanError("its SHA-256 is not the one that was written with it")
        return typed(entries, cls)

    def differences(self, then: "Run") -> Iterator[str]:
        """In words, how this differs from an earlier run."""
        named = {"lnr-prune": (then.version, self.version), "torch": (then.torch, self.torch)}
        for name in dict.fromkeys((*then.arguments, *self.arguments)):
            named[name] = then.arguments.get(name, "not known"), self.arguments.get(name, "not known")
        yield from (f"{name}: {before}, now {now}" for name, (before, now) in named.items() if before != now)
        if then.architecture != self.architecture:
            yield "a model of other layers"
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


@dataclass(frozen=True, eq=False)
class Fixed(Calibration):
    """Calibration data that has to be the same in every pass.

    Attributes:
        digests: SHA-256 of every batch, as a call of the model.
    """

    digests: tuple[str, ...] = ()

    @classmethod
    def of(cls, data: Calibration) -> "Fixed":
        """The data, which is gone through once."""
        return cls(data.batches, data.as_call, tuple(map(digest, data)))

    def __iter__(self) -> Iterator[Call]:
        number = -1
        for number, call in enumerate(super().__iter__()):
            if self.digests[number : number + 1] != (digest(call),):
                raise self._other(number)
            yield call
        if number + 1 < len(self.digests):
            raise self._other(number + 1)

    def _other(self, number: int) -> CalibrationError:
        return CalibrationError(
            f"batch {number} of the calibration data is not what it was in the first pass; with a work folder all "
            "passes must give the same: turn off shuffling and random augmentation, or give list(loader), drawn with "
            "a fixed seed. A model that writes into its inputs needs clones of them"
        )


def digest(values: Any) -> str:
    """SHA-256 of all tensors in nested containers, where they are, and of how the rest is printed."""
    leaves, structure = tree_flatten(values)
    tensors = {str(index): leaf for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    rest = [leaf.device if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return sha256(f"{_printed(structure)} {_printed(rest)} {digest_of(tensors)}")


def sha256(text: str) -> str:
    """SHA-256 of a text, in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def _argument(value: object) -> str:
    return _printed(dict(sorted(value.items())) if isinstance(value, Mapping) else value)  # in whatever order


def _printed(value: object) -> str:
    return _ADDRESS.sub("", repr(value))

"""A value as it is stored in a work folder: safetensors and JSON, read back as the type that is expected."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import save_file
from torch import Tensor

from lnr_prune.errors import PlanError
from lnr_prune.runtime.codec import parsed, typed
from lnr_prune.runtime.digest import digest_of, sha256
from lnr_prune.runtime.disk import opened, put

Value = TypeVar("Value")


@dataclass(frozen=True, eq=False)
class Stored:
    """A value, split into JSON text and tensors.

    Attributes:
        text: The value as JSON, in which an index stands for each tensor.
        devices: The devices that the tensors were on, separated by spaces.
        tensors: The tensors, on the CPU.
    """

    text: str
    devices: str
    tensors: tuple[Tensor, ...]

    @classmethod
    def of(cls, value: object) -> "Stored":
        """Splits a value."""
        tensors: list[Tensor] = []
        text, stored, storages = json.dumps(_plain(value, tensors)), list[Tensor](), set[int]()
        for tensor in tensors:
            there = tensor.detach().cpu().contiguous()
            if there.untyped_storage().data_ptr() in storages:  # a view of another tensor
                there = there.clone()
            storages.add(there.untyped_storage().data_ptr())
            stored.append(there)
        return cls(text, " ".join(str(tensor.device) for tensor in tensors), tuple(stored))

    def value(self, kind: type[Value]) -> Value:
        """Puts the value together again.

        Raises:
            PlanError: If it is of another type.
        """
        pairs = zip(self.tensors, self.devices.split(), strict=True)
        return typed(parsed(self.text), kind, "the value", [tensor.to(device) for tensor, device in pairs])

    def write(self, path: Path, owner: str) -> None:
        """Writes it to a file that belongs to an owner, completely or not at all."""
        entries = {"value": self.text, "devices": self.devices, "sha256": self._checksum(owner)}
        tensors = {str(index): tensor for index, tensor in enumerate(self.tensors)}
        if path.exists() and not path.is_file():  # a pipe, say: nobody else has a place in this folder
            path.unlink()
        put(path, lambda part: save_file(tensors, part, entries))

    @classmethod
    def read(cls, path: Path, owner: str, kind: type[Value]) -> "Stored | None":
        """What `write` wrote for this owner; None if there is no file.

        Raises:
            PlanError: If it is damaged, belongs to another owner, or is of another type.
        """
        if not os.path.lexists(path):
            return None
        with opened(path) as file:
            tensors = tuple(file.get_tensor(str(index)).clone() for index in range(len(file.keys())))
            entries = file.metadata() or {}
        stored = cls(entries["value"], entries["devices"], tensors)
        if entries["sha256"] != stored._checksum(owner):
            raise PlanError("its SHA-256 is not the one that was written with it")
        stored.value(kind)
        return stored

    def _checksum(self, owner: str) -> str:
        tensors = {str(index): tensor for index, tensor in enumerate(self.tensors)}
        return sha256(json.dumps([owner, self.text, self.devices, digest_of(tensors)]))


def _plain(value: Any, tensors: list[Tensor]) -> Any:
    """The value as plain data for JSON; its tensors are appended to the list."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return len(tensors) - 1
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name), tensors) for field in fields(value)}
    if isinstance(value, Mapping):
        return {name: _plain(entry, tensors) for name, entry in value.items()}
    if isinstance(value, tuple):
        return [_plain(entry, tensors) for entry in value]
    return value

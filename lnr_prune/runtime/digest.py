"""SHA-256 of tensors, of texts, and of nested containers of both."""

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

HASH = "sha256"  # name of the entry that holds the record's own SHA-256
_ADDRESS = re.compile(r" at 0x[0-9a-f]+", re.IGNORECASE)


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.reshape(-1)
        if flat.stride() != (1,):  # as for a tensor of a single column
            flat = flat.clone(memory_format=torch.contiguous_format)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest(values: Any) -> str:
    """SHA-256 of nested containers: of the tensors, their devices, and the printed form of everything else."""
    leaves, structure = tree_flatten(values)
    tensors = {str(index): leaf for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    rest = [leaf.device if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return sha256(f"{printed(structure)} {printed(rest)} {digest_of(tensors)}")


def sha256(text: str) -> str:
    """SHA-256 of a text, in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def printed(value: object) -> str:
    """The value as Python prints it, without memory addresses, which differ between processes."""
    return _ADDRESS.sub("", repr(value))

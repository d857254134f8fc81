"""Everything that the library must leave as it was, after success and after failure."""

import gc
import random
import threading
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lnr_prune.graph.module import named_tensors

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


class Untouched:
    """What a model and the process are now; `check` says what has changed since.

    Args:
        model: The model; anything else is no model, and has nothing that could change.
        folder: Where temporary files would be.
    """

    def __init__(self, model: object, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.before = self._now()

    def check(self) -> None:
        gc.collect()  # generators that an error's traceback holds
        now = self._now()
        for name, value in self.before.items():
            assert now[name] == value, f"{name} changed"

    def _now(self) -> dict[str, object]:
        return {**(_of_model(self.model) if isinstance(self.model, nn.Module) else {}), **_of_process(self.folder)}


def _of_model(model: nn.Module) -> dict[str, object]:
    tensors, modules = named_tensors(model), dict(model.named_modules())
    return {
        "repr": repr(model),
        "values": {name: _bytes(tensor) for name, tensor in tensors.items()},
        "identities": {name: id(tensor) for name, tensor in tensors.items()},
        "requires_grad": {name: tensor.requires_grad for name, tensor in tensors.items()},
        "gradients": {name: tensor.grad is None for name, tensor in tensors.items()},
        "training": {name: module.training for name, module in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "hooks": {(name, kind): dict(vars(module)[kind]) for name, module in modules.items() for kind in HOOKS},
    }


def _of_process(folder: Path) -> dict[str, object]:
    kind, keys, *position = np.random.get_state(legacy=True)
    return {
        "torch's random numbers": _bytes(torch.get_rng_state()),
        "numpy's random numbers": (kind, bytes(np.asarray(keys).data), position),
        "Python's random numbers": random.getstate(),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "torch's threads": torch.get_num_threads(),
        "gradients are on": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "files": sorted(str(path) for path in folder.rglob("*") if "torchinductor" not in str(path)),  # torch's own
    }


def _bytes(tensor: Tensor) -> bytes | None:
    if tensor.is_meta:
        return None
    return (
        tensor.detach()
        .cpu()
        .clone(memory_format=torch.contiguous_format)
        .reshape(-1)
        .view(torch.uint8)
        .numpy()
        .tobytes()
    )

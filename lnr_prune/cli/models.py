"""Models and weights as the command line names them."""

import importlib.util
import json
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from operator import attrgetter
from pathlib import Path
from pickle import UnpicklingError  # torch.load(weights_only=True) raises it  # nosec B403
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import Tensor, nn

from lnr_prune.cli.texts import tokenizer_in
from lnr_prune.errors import LnrPruneError
from lnr_prune.pruned import Pruned
from lnr_prune.runtime.checks import nearest
from lnr_prune.runtime.optional import import_torchvision, import_transformers, needed

FORMS = "package.module:factory, path/to/file.py:factory, torchvision:NAME, timm:NAME or hf:FOLDER"
NESTED = ("state_dict", "model_state_dict", "model")  # where checkpoints keep the weights


class UnknownNameError(ValueError):
    """A collection of models has none of this name."""


def build(spec: str, arguments: Iterable[str] = (), weights: Path | None = None, device: str = "cpu") -> nn.Module:
    """The model that a specification names, with weights from a file, in evaluation mode.

    Args:
        spec: One of ``package.module:factory``, ``path/to/file.py:factory``, ``torchvision:NAME``, ``timm:NAME`` and
            ``hf:FOLDER``. Only what is named is imported and called; nothing is evaluated.
        arguments: Arguments of the factory, ``key=value`` with the value in JSON.
        weights: A file of weights (.safetensors, .pt or .pth), or None.
        device: Device that the model is moved to.

    Raises:
        ValueError: If there is no such factory, or an argument is not ``key=value``.
        LnrPruneError: If the factory fails, the weights cannot be read or do not fit, or the device cannot be used.
    """
    factory, given = _factory(spec), dict(map(_argument, arguments))
    try:
        model = factory(**given)
    except (LnrPruneError, UnknownNameError):
        raise
    except Exception as error:  # the factory is the user's code
        raise LnrPruneError(f"{spec} failed with {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise LnrPruneError(f"{spec} returned a {type(model).__name__}, expected a torch.nn.Module")
    if weights is not None:
        _load_weights(model, weights)
    try:
        return model.eval().to(device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise LnrPruneError(f"cannot use the device {device!r}: {error}") from error


def torchvision_weights(arguments: Iterable[str]) -> str | None:
    """The name of torchvision's weights among a factory's arguments."""
    name = dict(map(_argument, arguments)).get("weights")
    return name if isinstance(name, str) else None


def tokenizer_of(spec: str) -> Path | None:
    """The folder of a Hugging Face model, if it holds a tokenizer, too."""
    folder = Path(spec.removeprefix("hf:"))
    held = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    return folder if spec.startswith("hf:") and held else None


def new_folder(spec: str, out: Path | None) -> Path | None:
    """Where a Hugging Face model is written as a folder: ``out``, unless this names a file.

    Raises:
        ValueError: If nothing can be written there, or it is the folder of the model.
    """
    if out is None or not spec.startswith("hf:") or out.suffix == ".safetensors":
        return None
    if out.resolve() == Path(spec.removeprefix("hf:")).resolve():
        raise ValueError(f"--out {out} is the folder of the model; name another one")
    if (out.exists() and (not out.is_dir() or any(out.iterdir()))) or not out.parent.is_dir():
        raise ValueError(f"--out {out}: expected a new or an empty folder, in a folder that exists")
    return out


def save_folder(pruned: Pruned, folder: Path, tokenizer: Path | None) -> None:
    """Writes a Hugging Face model, with its tokenizer."""
    pruned.save_pretrained(folder, None if tokenizer is None else tokenizer_in(tokenizer))


def _factory(spec: str) -> Callable[..., Any]:
    source, _, name = spec.rpartition(":") if not spec.startswith("hf:") else ("hf", ":", spec[3:])
    if not (source and name):
        raise ValueError(f"a model is {FORMS}; got {spec!r}")
    for zoo, maker in (("torchvision", _torchvision), ("timm", _timm), ("hf", _hugging_face)):
        if source == zoo:
            return partial(maker, name)
    module = _module(source)
    try:
        found = attrgetter(name)(module)
    except AttributeError as error:
        raise ValueError(f"{source} has no {name!r}; {nearest(name, _makers(module))}") from error
    if isinstance(found, nn.Module) or not callable(found):
        kind = type(found).__name__
        raise ValueError(f"{spec} is a {kind}, expected a function or class that makes a new model")
    factory: Callable[..., Any] = found
    return factory


def _module(source: str) -> ModuleType:
    """Imports a module by its name (the working directory is searched too), or a file by its path."""
    path = Path(source)
    folder, name = (str(path.parent.resolve()), path.stem) if path.suffix == ".py" else (str(Path.cwd()), source)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        if path.suffix != ".py":
            return importlib.import_module(name)
        described = importlib.util.spec_from_file_location(name, path)
        if described is None or described.loader is None or not path.is_file():
            raise ValueError(f"there is no file {source}")
        module = sys.modules[name] = importlib.util.module_from_spec(described)
        described.loader.exec_module(module)
        return module
    except ImportError as error:
        raise ValueError(f"cannot import {source}: {error}") from error


def _makers(module: ModuleType) -> list[str]:
    """Names in a module that may make a model."""
    own = (name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__)
    return [name for name in own if not name.startswith("_")]


def _torchvision(name: str, **given: Any) -> Any:
    models: Any = import_torchvision().models
    if name.lower() not in models.list_models():
        raise UnknownNameError(f"torchvision has no model {name!r}; {nearest(name, models.list_models())}")
    return models.get_model(name, **given)


def _timm(name: str, **given: Any) -> Any:
    with suppress(LnrPruneError):
        import_torchvision()  # which timm imports
    timm: Any = needed("timm")
    if ":" not in name and not timm.is_model(name):  # "hf-hub:..." and "local-dir:..." name other places
        raise UnknownNameError(f"timm has no model {name!r}; {nearest(name, timm.list_models())}")
    return timm.create_model(name, **given)


def _hugging_face(folder: str, **given: Any) -> Any:
    """A model from a folder that save_pretrained wrote; its class is the one that the config names."""
    if not Path(folder).is_dir():
        raise LnrPruneError(f"hf:{folder}: there is no folder {folder!r}; give one that save_pretrained wrote")
    transformers: Any = import_transformers()
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)  # of local files only  # nosec B615
    name = next(iter(config.architectures or ()), "")
    of: Any = getattr(transformers, name, None)
    if not (isinstance(of, type) and issubclass(of, transformers.PreTrainedModel)):
        of = transformers.AutoModel
    return of.from_pretrained(folder, local_files_only=True, **given)


def _argument(pair: str) -> tuple[str, Any]:
    key, equals, value = pair.partition("=")
    if not (key and equals):
        raise ValueError(f"a model argument is key=value, got {pair!r}")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"""the value of {key} must be JSON (2, 0.5, true, null, "text"), got {value}; """
            f"""a text needs its quotes: '{key}="{value}"'"""
        ) from error


def _load_weights(model: nn.Module, path: Path) -> None:
    try:
        if path.suffix == ".safetensors":
            load_model(model, path)
        else:
            model.load_state_dict(_state(path))
    except (OSError, EOFError, KeyError, SafetensorError, RuntimeError, UnpicklingError) as error:
        raise LnrPruneError(
            f"cannot load {path} into {type(model).__name__}: {error}. Give a file with the model's state dict, "
            "saved by safetensors, or by torch.save with nothing but tensors"
        ) from error


def _state(path: Path) -> dict[str, Tensor]:
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    for key in NESTED:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict):
        raise RuntimeError(f"it holds a {type(loaded).__name__}, expected a dict of tensors")
    return loaded

"""Hugging Face folders: weights, settings and the tokenizer, as ``save_pretrained`` of transformers writes them.

Where the settings say how large every layer is, the folder is an ordinary one, which ``AutoModel.from_pretrained``
loads. Where they cannot (layers of different widths), ``config.json`` describes the whole model, and
``model.safetensors`` is a file as `Pruned.save` writes it, with the plan; then only `from_pretrained` of this package
loads the folder.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lnr_prune.collapse.files import KEY, load, naming, save_model
from lnr_prune.collapse.fingerprint import Fingerprint, fingerprint
from lnr_prune.collapse.hugging_face.settings import SETTINGS, made_from, settings_with
from lnr_prune.collapse.plan import Plan
from lnr_prune.collapse.record import original_of
from lnr_prune.errors import LnrPruneError, PlanError
from lnr_prune.graph.module import named_tensors, plain
from lnr_prune.report.report import Report
from lnr_prune.runtime.codec import LARGEST, parsed, shown
from lnr_prune.runtime.disk import StrPath, opened, regular
from lnr_prune.runtime.optional import import_transformers

logger = logging.getLogger("lnr_prune")

CONFIG, WEIGHTS, GENERATION = "config.json", "model.safetensors", "generation_config.json"
REFUSED = ("auto_map", "fusion_config", "quantization_config", "transformers_weights")
"""Entries of settings that name code, kernels or other files; so do all whose names end in ``implementation``."""


def save_folder(folder: StrPath, model: nn.Module, plan: Plan, report: Report, tokenizer: Any = None) -> None:
    """Writes a folder; see `Pruned.save_pretrained`."""
    with plain(model) as module:
        save: Any = getattr(module, "save_pretrained", None)
        if not (callable(save) and hasattr(vars(module).get(SETTINGS), "to_dict")):
            raise LnrPruneError(
                f"{type(module).__name__} is not a model of transformers, so there is no folder for it: "
                "use pruned.save(file), which lnr_prune.load reads"
            )
        whole = None if _is_described(module) else _whole_settings(module, plan)
        os.makedirs(folder, exist_ok=True)
        if whole is None:
            save(folder)
        else:
            save_model(Path(folder) / WEIGHTS, module, plan, report)
            whole.save_pretrained(folder)
            if generation := vars(module).get("generation_config"):
                generation.save_pretrained(folder)
            logger.warning(
                "the settings of %s cannot say how wide its layers are now, so %s holds the plan, too: load it with "
                "lnr_prune.from_pretrained, as AutoModel refuses its sizes",
                type(module).__name__, os.fspath(folder),
            )  # fmt: skip
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def from_pretrained(folder: StrPath, **arguments: Any) -> nn.Module:
    """The model in a folder that `Pruned.save_pretrained` wrote, or ``save_pretrained`` of transformers.

    Its code is that of the installed transformers. Nothing in the folder is executed or unpickled, and nothing is
    downloaded.

    Args:
        folder: The folder.
        **arguments: Further arguments of the model's class, such as ``add_pooling_layer=False``.

    Returns:
        The model, on the CPU and in evaluation mode.

    Raises:
        PlanError: If the folder is damaged, does not hold all of the model, or wants more than a model of transformers
            and its weights: code of its own, quantization, kernels.
        LnrPruneError: If transformers is not installed.
        OSError: If a file cannot be read.
    """
    root = Path(folder)
    with naming(root / CONFIG):
        kind, settings = _model_of(_json(root / CONFIG))
        with _accepted(f"a {kind.__name__} cannot be made from it"):
            empty = made_from(kind, settings, **arguments)
    if _has_plan(root / WEIGHTS):
        model = load(root / WEIGHTS, empty)
    else:
        with naming(folder):
            model = _filled(kind, settings, arguments, empty, _tensors(root))
    if (root / GENERATION).exists():
        with naming(root / GENERATION), _accepted("transformers does not accept it"):
            own = import_transformers().GenerationConfig.from_dict(_json(root / GENERATION))
            model.generation_config = own
    return model.eval()


def _is_described(model: nn.Module) -> bool:
    """Whether a model made from the settings is like this one in all but values."""
    made, own = _fresh(type(model), vars(model)[SETTINGS]), fingerprint(model)
    return own.tied.items() <= made.tied.items() and _has(made, {name: of.shape for name, of in own.tensors.items()})


def _whole_settings(model: nn.Module, plan: Plan) -> Any:
    """The settings of the whole model, which the plan is for.

    Raises:
        PlanError: If no model made from settings is the one that was pruned.
    """
    original = original_of(plan)
    wanted = {name: kind.shape for name, kind in original.tensors.items()}
    before = {path: value for path, value in original.ints.get("", {}).items() if path.startswith(f"{SETTINGS}.")}
    settings = settings_with(model, before)
    settings.architectures = [type(model).__name__]
    settings.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    if not _has(_fresh(type(model), settings), wanted):
        raise PlanError(
            f"the settings of {type(model).__name__} cannot be made those of the model that was pruned. If it had been "
            "pruned before, save it with the plan of both: "
            "dataclasses.replace(second, plan=first.plan.then(second.plan)).save_pretrained(folder)"
        )
    return settings


def _fresh(kind: type[nn.Module], settings: Any) -> Fingerprint:
    with _accepted(f"a {kind.__name__} cannot be made from its settings alone"):
        return fingerprint(made_from(kind, settings))


def _has(made: Fingerprint, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a model has all these tensors; it may have more: a pooling layer that the other one was made without."""
    return shapes.items() <= {name: kind.shape for name, kind in made.tensors.items()}.items()


def _json(path: Path) -> dict[str, Any]:
    regular(path)
    with open(path, encoding="utf-8") as file:
        try:
            entries = parsed(file.read(LARGEST + 1))
        except UnicodeDecodeError as error:
            raise PlanError(f"it is not JSON: {error}") from error
    if not isinstance(entries, dict):
        raise PlanError(f"it is {shown(entries)}, expected an object")
    for name in _names(entries):
        if name in REFUSED or name.endswith("implementation"):
            raise PlanError(
                f"it has an entry {name!r}, which stands for code or files that are not loaded here; if you trust the "
                "folder, load it with transformers"
            )
    return entries


def _names(value: Any) -> Iterator[str]:
    waiting = [value]
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, dict):
            yield from inner
        waiting += inner.values() if isinstance(inner, dict) else inner if isinstance(inner, list) else ()


def _model_of(entries: dict[str, Any]) -> tuple[Any, Any]:
    """The class of transformers, and the settings, that a config.json names."""
    transformers: Any = import_transformers()
    names, family = entries.get("architectures"), entries.get("model_type")
    name = names[0] if isinstance(names, list) and names else None
    kind: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise PlanError(
            f"its architecture is {shown(name)}, which is not a model of the installed transformers "
            f"{transformers.__version__}; if its code is elsewhere, make a whole model and give it to "
            f"lnr_prune.load(folder + '/{WEIGHTS}', model)"
        )
    own = getattr(getattr(kind, "config_class", None), "model_type", family)
    if family != own or family not in transformers.CONFIG_MAPPING:
        raise PlanError(f"its model_type is {shown(family)}, that of {name} is {own!r}")
    with _accepted("transformers does not accept its entries"):
        return kind, transformers.CONFIG_MAPPING[family].from_dict(entries)


@contextmanager
def _accepted(why: str) -> Iterator[None]:
    """Makes whatever transformers raises an error that says what is wrong with the folder."""
    try:
        yield
    except LnrPruneError:
        raise
    except Exception as error:  # classes and settings may refuse entries in any way
        raise PlanError(f"{why}: {type(error).__name__}: {error}") from error


def _has_plan(path: Path) -> bool:
    if not path.exists():  # in several files
        return False
    with naming(path), opened(path) as file:
        return KEY in (file.metadata() or {})


def _tensors(root: Path) -> dict[str, Tensor]:
    """All tensors in a folder's safetensors files."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(root.glob("*.safetensors")):
        with naming(path), opened(path) as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def _filled(
    kind: Callable[..., Any], settings: Any, arguments: dict[str, Any], empty: nn.Module, tensors: dict[str, Tensor]
) -> nn.Module:
    """A model of transformers with these tensors, as they are named in files."""
    wanted, held = (sum(t.numel() for t in some) for some in (empty.parameters(), tensors.values()))
    if wanted > held:
        raise PlanError(
            f"its {CONFIG} describes a model of {wanted:,} parameters, its safetensors files hold {held:,} values: "
            "some are missing, or a layer is to be left out by an argument such as add_pooling_layer=False"
        )
    loader: Any = kind
    with _accepted("its tensors do not fit its settings"):
        model, found = loader.from_pretrained(
            None, config=settings, state_dict=tensors, output_loading_info=True, trust_remote_code=False, **arguments
        )
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if found.get(what):
            raise PlanError(
                f"its tensors do not fit its settings: {what.replace('_keys', '')} {min(map(str, found[what]))!r}"
            )
    if lost := [name for name, tensor in named_tensors(model).items() if tensor.is_meta]:
        raise PlanError(f"it has no values for {lost[0]!r}")
    filled: nn.Module = model
    return filled

"""Pruned models and plans as files, without pickle: safetensors with a JSON record, or such a record alone."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lnr_prune._version import __version__
from lnr_prune.collapse.apply import check_into, filled, filled_graph, original_like
from lnr_prune.collapse.graph_module import PrunedGraph
from lnr_prune.collapse.plan import Plan
from lnr_prune.collapse.record import FORMAT, Record, check_shapes, check_values, original_of, read_record, write_record
from lnr_prune.errors import PlanError
from lnr_prune.graph.module import check_model, named_tensors, plain
from lnr_prune.graph.modules.guard import guarded
from lnr_prune.report.report import Report
from lnr_prune.runtime.codec import LARGEST
from lnr_prune.runtime.digest import digest_of
from lnr_prune.runtime.disk import StrPath, opened, put, regular

KEY = "lnr_prune"  # names the record in a safetensors file's metadata


def save_model(path: StrPath, model: nn.Module, plan: Plan, report: Report) -> None:
    """Writes a pruned model to a safetensors file; see `Pruned.save`."""
    with plain(model) as module:
        tensors = _tensors_of(module, plan)
    digest, as_graph = digest_of(tensors), isinstance(model, PrunedGraph)
    text = write_record(Record(FORMAT, __version__, torch.__version__, plan, report, as_graph, digest))
    put(path, lambda part: save_file(tensors, part, {KEY: text}))


def save_plan(path: StrPath, plan: Plan) -> None:
    """Writes a plan, and the fingerprint of the model that it was made for, to a JSON file.

    Raises:
        PlanError: If it is not known what model the plan was made for.
        OSError: If the file cannot be written.
    """
    original_of(plan)
    text = write_record(Record(FORMAT, __version__, torch.__version__, plan))
    put(path, lambda part: Path(part).write_text(text + "\n", encoding="utf-8"))


def load(path: StrPath, model: nn.Module, *, example: Any = None, into: str = "copy") -> nn.Module:
    """The pruned model that `Pruned.save` wrote.

    The file names what was removed and holds what is left. The code comes from a model of the original architecture.
    Nothing in a file is executed, and the model is touched only after all of the file has been checked.

    Args:
        path: The file.
        model: A new, unpruned instance of the original architecture. Its values do not matter, so it may be on
            the meta device (then the pruned model is on the CPU). It is not modified unless ``into="model"``. If
            weights were folded when it was pruned, those of the copy are folded too; into="model" takes `fold`'s.
        example: A batch, as for `prune`, on which the loaded model is compared with the masked one. Required for
            a pruned graph, which is traced again.
        into: What is shrunk: a "copy", or the "model" itself, which is restored if anything fails.

    Returns:
        The pruned model in evaluation mode, on the devices of ``model``, with its ``requires_grad``.

    Raises:
        ValueError: If ``into`` is neither.
        PlanError: If the file is damaged, was not written by lnr-prune, or belongs to another model.
        GraphError: If the model cannot be copied or, for a pruned graph, traced.
        CalibrationError: If the model does not accept the example.
        VerificationError: If the loaded model does not equal the masked one.
        OSError: If the file cannot be read.

    Example:
        >>> import tempfile, torch, lnr_prune as lnr
        >>> def net(): return torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        >>> pruned, path = lnr.prune(net(), [torch.randn(256, 8)], lnr.Keep(0.5)), f"{tempfile.mkdtemp()}/m.safetensors"
        >>> pruned.save(path)
        >>> x = torch.randn(2, 8)
        >>> torch.equal(lnr.load(path, net())(x), pruned.model(x))
        True
    """
    check_model(model)
    check_into(into)
    with plain(model) as given:
        loaded = _load(path, given, example, into)
    return loaded.eval()


def _load(path: StrPath, model: nn.Module, example: Any, into: str) -> nn.Module:
    with naming(path), opened(path) as file:
        record = _model_record(file.metadata())
        plan = record.plan
        model = original_like(model, plan, into)
        original_of(plan).check(model)
        if into == "model" and record.as_graph:
            raise PlanError("the pruned model is a graph, which is a new model: load it without into='model'")
        check_shapes({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}, record)  # noqa: SIM118
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  (not of the mapped file)
        check_values(tensors, record)
    with naming(path), guarded(model):
        if record.as_graph:
            return filled_graph(model, plan, tensors, example=example)
        return filled(model, plan, tensors, example=example, into=into)


def load_plan(path: StrPath) -> Plan:
    """The plan in a file that `Pruned.save` or `save_plan` wrote.

    Raises:
        PlanError: If the file is damaged, or was not written by lnr-prune.
        OSError: If it cannot be read.
    """
    return _record(path).plan


def report_of(path: StrPath) -> Report:
    """The report in a file that `Pruned.save` wrote.

    Raises:
        PlanError: If the file is damaged, was not written by lnr-prune, or holds only a plan.
        OSError: If it cannot be read.
    """
    report = _record(path).report
    if report is None:
        raise PlanError(f"{os.fspath(path)}: holds a plan without a report; give the file that Pruned.save wrote")
    return report


def _record(path: StrPath) -> Record:
    with naming(path):
        regular(path)
        with open(path, "rb") as file:
            start = file.read(8)  # a safetensors file starts with a length far below 2^32
            if b"\0" not in start:
                raw = start + file.read(4 * LARGEST)
                try:
                    return read_record(raw.decode())
                except UnicodeDecodeError as error:
                    raise PlanError(f"it is neither a safetensors file nor JSON: {error}") from error
        with opened(path) as tensors:
            return _model_record(tensors.metadata())


def _model_record(metadata: Mapping[str, str] | None) -> Record:
    if not metadata or KEY not in metadata:
        raise PlanError("it is a safetensors file without a record of lnr-prune; give one that Pruned.save wrote")
    record = read_record(metadata[KEY])
    if record.report is None:
        raise PlanError("its record has no report, so it is not that of a model")
    return record


def _tensors_of(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """A pruned model's tensors as they are stored, tied ones once."""
    original, graph = original_of(plan), isinstance(model, PrunedGraph)
    if strange := [name for name, value in model.state_dict().items() if not isinstance(value, Tensor)]:
        raise PlanError(f"the model's state {strange[0]!r} is not a tensor, and cannot be stored; use torch.save")
    own: dict[str, Tensor] = {}
    for name, tensor in named_tensors(model).items():
        first = original.tied.get(name, name)
        if first not in original.tensors and graph:
            continue  # constants of the forward
        if own.setdefault(first, tensor) is not tensor:
            raise PlanError(f"{name!r} was tied to {first!r} when the model was pruned, and is no longer")
    record = Record(FORMAT, "", "", plan, as_graph=graph)
    try:
        check_shapes({name: tuple(tensor.shape) for name, tensor in own.items()}, record)
    except PlanError as error:
        raise PlanError(f"the pruned model has changed since it was pruned: as a file, {error}") from error
    stored: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in own.items():
        if tensor.layout != torch.strided or tensor.is_meta:
            raise PlanError(
                f"{name!r} cannot be stored: it is {tensor.layout} on {tensor.device}, expected dense values"
            )
        value = tensor.detach().cpu().contiguous()
        if value.untyped_storage().data_ptr() in storages:  # a view of another tensor
            value = value.clone()
        storages.add(value.untyped_storage().data_ptr())
        stored[name] = value
    return stored


@contextmanager
def naming(path: StrPath) -> Iterator[None]:
    """Makes errors begin with the file's name."""
    try:
        yield
    except PlanError as error:
        raise PlanError(f"{os.fspath(path)}: {error}") from error

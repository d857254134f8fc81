"""The record in a file: plan, fingerprint, report and versions; and checks that tensors are as it says."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from lnr_prune.collapse.attributes import can_become
from lnr_prune.collapse.fingerprint import Fingerprint
from lnr_prune.collapse.plan import Plan, kept_shape
from lnr_prune.errors import PlanError
from lnr_prune.report.report import Report
from lnr_prune.runtime.codec import LARGEST, parsed, shown, typed
from lnr_prune.runtime.digest import HASH, digest_of

FORMAT = 1
_PATH = re.compile(r"[A-Za-z_]\w*(\.\w+){0,2}", re.ASCII)  # of an attribute


@dataclass(frozen=True)
class Record:
    """What a file says, besides a pruned model's tensors.

    Attributes:
        format: Version of the format.
        version: Version of lnr-prune that wrote the file.
        torch: Version of torch.
        plan: The plan; it knows the architecture that it was made for.
        report: What the prune did; None in a file of a plan alone.
        as_graph: Whether the pruned model is a `PrunedGraph`.
        tensors: SHA-256 of the tensors, "" in a file of a plan alone.
    """

    format: int
    version: str
    torch: str
    plan: Plan
    report: Report | None = None
    as_graph: bool = False
    tensors: str = ""


def write_record(record: Record) -> str:
    """The record as JSON, with its own SHA-256."""
    entries = asdict(record)
    text = json.dumps({**entries, HASH: _hash(entries)})
    if len(text) > LARGEST:
        raise PlanError(f"the record would have {len(text):,} characters, expected at most {LARGEST:,}")
    return text


def read_record(text: str) -> Record:
    """The record that `write_record` wrote.

    Raises:
        PlanError: If it is damaged or of another format, anything in it is of the wrong type, or the plan does not
            fit its own architecture.
    """
    data = parsed(text)
    if isinstance(data, dict) and data.get("format") != FORMAT:
        raise PlanError(f"it is of format {shown(data.get('format'))}, expected {FORMAT}: update lnr-prune")
    digest = data.pop(HASH, None) if isinstance(data, dict) else None
    record = typed(data, Record)
    plan, original = record.plan, original_of(record.plan)
    for name, first in original.tied.items():
        if first not in original.tensors or name in original.tensors:
            raise PlanError(f"tensor {name!r} is tied to {first!r}, which makes no sense")
    for name, dims in plan.indices.items():
        shape = original.tensors[name].shape if name in original.tensors else ()
        for dim, kept in dims.items():
            size = shape[dim] if dim < len(shape) else 0
            _check_indices(f"of dimension {dim} of {name!r}", kept, size)
    for group, kept in plan.channels.items():
        rows = original.tensors.get(f"{group}.weight", original.tensors.get(group))
        _check_indices(f"of channel group {group!r}", kept, max(rows.shape, default=0) if rows else 0)
    for name, entries in plan.attributes.items():
        for path, value in entries.items():
            whole = original.ints.get(name, {}).get(path, 0)
            named = _PATH.fullmatch(path) and "__" not in path and (whole is not None or "." in path)
            if not (named and can_become(whole, value)):
                raise PlanError(
                    f"attribute {path!r} of layer {name!r} cannot become {value}: it is {whole or 'not there'}"
                )
    if _hash(data) != digest:
        raise PlanError("its record is damaged: its SHA-256 is not the one that was written with it")
    return record


def _hash(entries: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def _check_indices(where: str, kept: tuple[int, ...], size: int) -> None:
    ascending = all(a < b for a, b in zip((-1, *kept), (*kept, size), strict=True))
    if not (kept and ascending):
        raise PlanError(f"the indices {where} are not ascending numbers from 0 to {size - 1}, at least one")


def original_of(plan: Plan) -> Fingerprint:
    """The architecture that a plan was made for.

    Raises:
        PlanError: If the plan does not say.
    """
    if plan.original is None:
        raise PlanError("the plan does not say what architecture it was made for; the plans of prune do")
    return plan.original


def check_shapes(shapes: Mapping[str, tuple[int, ...]], record: Record) -> None:
    """Compares the tensors' shapes with what the plan leaves of the original's.

    Raises:
        PlanError: If one is missing, not known, or of another shape.
    """
    plan, kinds = record.plan, original_of(record.plan).tensors
    if unknown := shapes.keys() - kinds.keys():
        raise PlanError(f"it holds a tensor {min(unknown)!r}, which the original model does not have")
    if (missing := kinds.keys() - shapes.keys()) and not record.as_graph:  # a graph holds what evaluation needs
        raise PlanError(f"it lacks the tensor {min(missing)!r}")
    for name, shape in shapes.items():
        expected = kept_shape(kinds[name].shape, plan.indices.get(name, {}))
        if shape != expected:
            raise PlanError(f"tensor {name!r} is of shape {shape}, expected {expected}")


def check_values(tensors: Mapping[str, Tensor], record: Record) -> None:
    """Compares the tensors with their hash, and their dtypes with the original's; a module may have been cast.

    Raises:
        PlanError: If something differs.
    """
    kinds = original_of(record.plan).tensors
    for name, tensor in tensors.items():
        got, expected = str(tensor.dtype).removeprefix("torch."), kinds[name].dtype
        cast = tensor.is_floating_point() and "float" in expected and not record.as_graph  # model.half(), say
        if got != expected and not cast:
            raise PlanError(f"tensor {name!r} is {got}, expected {expected}")
    if digest_of(tensors) != record.tensors:
        raise PlanError("its tensors are damaged: their SHA-256 is not the one that was written with them")

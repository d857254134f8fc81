"""``--export``: the pruned model as a program that runs without its Python code, compared before it is kept."""

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from lnr_prune.calibration.calls import Call, fresh, run
from lnr_prune.collapse.graph_module import free_batch
from lnr_prune.errors import GraphError, VerificationError
from lnr_prune.graph import trace
from lnr_prune.runtime.disk import put
from lnr_prune.runtime.optional import needed

CLOSE = 1e-3  # relative difference of the outputs; other kernels round differently


def check_export(path: Path) -> None:
    """Refuses at the start what could not be exported after minutes of work.

    Raises:
        ValueError: If the file has another suffix.
        LnrPruneError: If a package is missing.
    """
    if path.suffix not in (".pt2", ".onnx"):
        raise ValueError(f"--export {path}: expected a file that ends in .pt2 (torch.export) or .onnx")
    if path.suffix == ".onnx":
        for package in ("onnx", "onnxscript"):
            needed(package)


def export(path: Path, model: nn.Module, call: Call) -> None:
    """Writes the model as .pt2 or .onnx; the first axis of its inputs stays free where the model leaves it free.

    Raises:
        GraphError: If torch cannot export it.
        VerificationError: If what was written computes something else; then there is no file.
        OSError: If the file cannot be written.
    """
    try:
        program = trace.export(model, *call, dynamic_shapes=free_batch(model, call))
    except (GraphError, TypeError):  # the forward fixes the batch
        program = trace.export(model, *call)
    wanted, convert = _tensors(run(model, call)), {".pt2": _pt2, ".onnx": _onnx}[path.suffix]

    def write(part: str) -> None:
        got = convert(program, part, call)
        if len(got) != len(wanted):
            raise VerificationError(f"{path.name} has {len(got)} outputs, the pruned model has {len(wanted)}")
        for mine, other in zip(wanted, got, strict=True):
            difference = float((mine - other).norm() / mine.norm().clamp(min=1e-12))
            if not difference <= CLOSE:
                raise VerificationError(
                    f"{path.name} was not written: its outputs differ from the pruned model's by {difference:.2g}"
                )

    put(path, write)


def _pt2(program: ExportedProgram, part: str, call: Call) -> list[Tensor]:
    data = io.BytesIO()  # torch warns of names that do not end in .pt2
    torch.export.save(program, data)
    Path(part).write_bytes(data.getvalue())
    data.seek(0)
    arguments, named = fresh(call)
    with torch.no_grad():
        return _tensors(torch.export.load(data).module()(*arguments, **named))


def _onnx(program: ExportedProgram, part: str, call: Call) -> list[Tensor]:
    made: Any = torch.onnx.export(program, dynamo=True, verbose=False)
    made.save(part)
    stored = needed("onnx").load(part)
    evaluator = needed("onnx.reference").ReferenceEvaluator(stored)  # slow, but it comes with onnx
    inputs = [leaf.detach().cpu().numpy() for leaf in tree_leaves(call) if isinstance(leaf, Tensor)]
    names = [each.name for each in stored.graph.input]
    return [torch.from_numpy(each) for each in evaluator.run(None, dict(zip(names, inputs, strict=True)))]


def _tensors(outputs: Any) -> list[Tensor]:
    """The outputs that are tensors, for a comparison."""
    leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    return [leaf.detach().cpu().float() for leaf in leaves]

"""A whole model and a plan -> the shrunk model, without calibration data."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lnr_prune.calibration.calls import Call
from lnr_prune.calibration.data import calibrate
from lnr_prune.collapse.attributes import can_become, entries
from lnr_prune.collapse.collapse import collapse, restore_point
from lnr_prune.collapse.fingerprint import fingerprint
from lnr_prune.collapse.graph_module import PrunedGraph, pruned_graph
from lnr_prune.collapse.plan import Plan
from lnr_prune.collapse.record import original_of
from lnr_prune.collapse.verify import Reference, copied
from lnr_prune.errors import GraphError, PlanError
from lnr_prune.graph.module import named_tensors, plain
from lnr_prune.graph.modules.folding import folded
from lnr_prune.graph.modules.guard import guarded
from lnr_prune.graph.modules.reach import reaches
from lnr_prune.graph.modules.twins import deep_copy, replace_tensors, twin
from lnr_prune.graph.owners import along

INTO = ("copy", "model")
NOTHING = 1e-30  # times a weight: too small to change outputs even in float64; a norm of exact zeros would be nan


def apply_plan(plan: Plan, model: nn.Module, *, example: Any = None, into: str = "copy") -> nn.Module:
    """Removes the planned channels from another checkpoint of the same architecture.

    Its weights are cut, not refitted: the result equals that checkpoint with these channels masked. As a rule it is
    less accurate than `prune` with calibration data for that checkpoint.

    Args:
        plan: What is kept.
        model: A model of the architecture that the plan was made for. It is not modified unless ``into="model"``. If
            weights were folded when it was pruned, those of the copy are folded too; into="model" takes `fold`'s.
        example: A batch, as for `prune`, on which the result is compared with the masked model.
        into: What is shrunk: a "copy", or the "model" itself, which is restored if anything fails.

    Raises:
        ValueError: If ``into`` is neither.
        PlanError: If the model has another architecture.
        GraphError: If the model cannot be copied, or is wrapped or scripted.
        CalibrationError: If the model does not accept the example.
        VerificationError: If the smaller model does not equal the masked one.

    Example:
        >>> import torch, lnr_prune as lnr
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        >>> plan = lnr.prune(model, [torch.randn(256, 8)], lnr.Keep(0.5)).plan
        >>> _ = model.load_state_dict({name: torch.randn_like(w) for name, w in model.state_dict().items()})
        >>> lnr.apply_plan(plan, model, example=torch.randn(2, 8))[0]
        Linear(in_features=8, out_features=16, bias=True)
    """
    check_into(into)
    with guarded(model), plain(model) as given:
        model = original_like(given, plan, into)
        call = _checked(model, plan, example)
        target = _target(model, call, into)
        reference = Reference(model, _masked(plan, named_tensors(model)), call) if call else None
        with _unless_it_fails(target):
            collapse(target, plan)
            if reference:
                reference.check(target)
    return target


def original_like(model: nn.Module, plan: Plan, into: str) -> nn.Module:
    """The model that a plan is for: where that was folded before it was pruned, a copy of the model is folded too."""
    if plan.original is None or into == "model":
        return model
    return folded(model, plan.original.tensors)[0]


def filled(model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor], *, example: Any, into: str) -> nn.Module:
    """The model without the planned channels, with these tensors: name -> what is left of the tensor."""
    call = _checked(model, plan, example)
    target = _target(model, call, into)
    reference = Reference(model, _spread(plan, tensors), call) if call else None
    with _unless_it_fails(target):
        collapse(target, plan)
        old = named_tensors(target)
        replace_tensors(target, {id(old[name]): twin(tensor, old[name]) for name, tensor in tensors.items()})
        if reference:
            reference.check(target)
    return target


def filled_graph(model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor], *, example: Any) -> PrunedGraph:
    """The same as a graph, which is traced again."""
    call = _checked(model, plan, example)
    if call is None:
        raise PlanError(
            "the pruned model is a graph (into='graph'), which is traced again when it is loaded: "
            "give a batch as example=. torch.export.save keeps a graph as it is"
        )
    graph = pruned_graph(model, plan, _spread(plan, tensors), call)
    original = fingerprint(model)
    for name in named_tensors(graph):
        name = original.tied.get(name, name)
        if name in original.tensors and name not in tensors:
            raise PlanError(f"the file lacks {name!r}, which the graph of {type(model).__name__} uses")
    return graph


def _checked(model: nn.Module, plan: Plan, example: Any) -> Call | None:
    """Checks that the plan is for this model; returns the example as a call."""
    if plan.original is not None:
        plan.original.check(model)
    modules, tensors = dict(model.named_modules(remove_duplicate=False)), named_tensors(model)
    for name, dims in plan.indices.items():
        shape = tensors[name].shape if name in tensors else ()
        for dim, kept in dims.items():
            if not (0 <= dim < len(shape) and kept and kept[0] >= 0 and kept[-1] < shape[dim]):
                raise PlanError(f"the plan keeps indices of dimension {dim} of {name!r} that the model does not have")
    for name, changes in plan.attributes.items():
        held = dict(entries(modules[name])) if name in modules else {}
        for path, value in changes.items():
            if not can_become(held.get(path, 0), value):
                raise PlanError(
                    f"the plan sets attribute {path!r} of layer {name!r} to {value}; expected that the attribute is "
                    f"an int of at least that, got {held.get(path, 'no such int')}"
                )
    return None if example is None else calibrate(model, [example]).example()


def check_into(into: object) -> None:
    """Refuses anything that ``into`` cannot be.

    Raises:
        ValueError: The message says what can be given.
    """
    if into not in INTO:
        raise ValueError(f"into must be one of {', '.join(INTO)}, got {into!r}")


def _target(model: nn.Module, call: Call | None, into: str) -> nn.Module:
    if into == "model":
        return model
    if call is not None:
        return copied(model, call)
    try:
        target = deep_copy(model)
    except Exception as error:  # deepcopy raises whatever the model's attributes raise
        raise GraphError(f"{type(model).__name__} cannot be deep-copied ({error}); use into='model'") from error
    if reaches(target, model):
        raise GraphError(
            f"a deep copy of {type(model).__name__} holds functions, such as lambdas in a list, that close over the "
            "original: use into='model', give an example= to find out whether they run, or turn them into methods"
        )
    return target


@contextmanager
def _unless_it_fails(target: nn.Module) -> Iterator[None]:
    """Restores the module if anything fails within."""
    restore = restore_point(target)
    try:
        yield
    except BaseException as error:
        restore()
        if isinstance(error, ArithmeticError | LookupError | RuntimeError | TypeError | ValueError):
            raise PlanError(f"the plan does not fit {type(target).__name__}: {error}") from error
        raise


def _masked(plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that may be a consumer's weight, with what is removed set to almost zero."""
    masked = {}
    for name, dims in plan.indices.items():
        value = tensors[name].detach()
        if value.dim() > 1:
            for dim, kept in dims.items():
                keep = torch.full((value.shape[dim],), NOTHING * value.is_floating_point(), dtype=torch.float64)
                keep[list(kept)] = 1.0
                value = value * along(keep, dim, value.shape).to(value)
            masked[name] = value
    return masked


def _spread(plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is left of every tensor, at its full size: lost entries are almost zero, or one in a vector."""
    spread, kinds = {}, original_of(plan).tensors
    for name, value in tensors.items():
        shape = kinds[name].shape
        for dim, kept in plan.indices.get(name, {}).items():
            full = [shape[dim] if axis == dim else size for axis, size in enumerate(value.shape)]
            whole = value.new_full(full, NOTHING * value.is_floating_point() if len(full) > 1 else 1)
            value = whole.index_copy(dim, torch.tensor(kept), value)
        spread[name] = value
    return spread

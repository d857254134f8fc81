"""Bad input gets an error that says what was got, what was expected and what to do; odd input works. Nothing is lost.

`python -m tests.test_bad_input` prints the table: what was tried, and what came of it.
"""

import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lnr_prune as lnr
from lnr_prune.errors import CalibrationError, GraphError, PlanError
from tests.helpers.models import cnn, mlp, randomised
from tests.helpers.untouched import Untouched

X = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(12, 2, 12, 12, generator=torch.Generator().manual_seed(1))
NAN, INF = float("nan"), float("inf")
OTHER = mlp(8, 3)
HALF = lnr.Keep(0.5)


def net() -> nn.Sequential:
    """A network in a state that is easily lost: modes mixed, a hook, a frozen parameter."""
    model = mlp(8, 16, 12, 4)
    model.train()
    model[3].eval()
    model[0].weight.requires_grad_(False)
    model[1].register_forward_hook(_sees)
    return model


def _sees(module: nn.Module, args: Any, output: Any) -> None:
    pass


def changed(name: str, change: Callable[[Tensor], Any]) -> Callable[[], nn.Module]:
    """A network with one parameter changed."""

    def make() -> nn.Module:
        model = net()
        with torch.no_grad():
            change(model.get_parameter(name))
        return model

    return make


def zeroed() -> nn.Module:
    model = net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def with_variance(value: float) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = randomised(cnn())
        model.get_buffer("1.running_var")[0] = value
        return model

    return make


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.b(self.a(x).relu())).relu())


class Raises(Twice):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("speed")


class Branches(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) if bool(x.sum() > 0) else x


class Exhausted:
    """Can be gone through only once, but does not look so."""

    def __init__(self) -> None:
        self.batches = iter(X.split(20))

    def __iter__(self) -> Iterator[Tensor]:
        return self.batches


def put(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x[3, 2] = value
    return x


def breaks() -> Iterator[Tensor]:
    yield X
    raise OSError("the disk is gone")


@dataclass(frozen=True)
class Case:
    """Something that somebody tries.

    Attributes:
        name: What it is, for the table.
        attempt: Gets the model and an empty folder.
        error: Class of the error; None = it must work.
        message: What the error must say.
        model: Makes the model.
    """

    name: str
    attempt: Callable[[Any, Path], Any]
    error: type[Exception] | None = None
    message: str = ""
    model: Callable[[], Any] = net


def pruning(
    name: str,
    data: Callable[[], Any] = lambda: X,
    error: type[Exception] | None = None,
    message: str = "",
    *,
    model: Callable[[], Any] = net,
    amount: Any = HALF,
    **options: Any,
) -> Case:
    return Case(name, lambda of, _: lnr.prune(of, data(), amount, **options), error, message, model)


def pruned(model: nn.Module) -> lnr.Pruned:
    return lnr.prune(model, X, lnr.Keep(4))


def setting(name: str, settings: Callable[..., Any], error: type[Exception], message: str, **values: Any) -> Case:
    """Settings that check themselves."""
    return Case(name, lambda *_: settings(**values), error, message)


def sweeping(name: str, amounts: Any, error: type[Exception], message: str, **options: Any) -> Case:
    return Case(f"sweep: {name}", lambda of, _: lnr.sweep(of, X, amounts, **options), error, message)


def reading(name: str, inputs: Any, error: type[Exception] | None = None, message: str = "") -> Case:
    """Batches of a form of their own."""
    return pruning(f"inputs {name}", lambda: lnr.Batches([X], inputs), error, message)


def never(model: nn.Module) -> float:
    raise AssertionError("the model was looked at")


DATA = [
    pruning("an empty list", list, CalibrationError, "holds no batch; give at least one"),
    pruning("an exhausted iterator", lambda: iter(()), CalibrationError, "holds no batch; give at least one"),
    pruning("an empty batch alone", lambda: X[:0], CalibrationError, "holds no batch; give at least one"),
    pruning("no data", lambda: None, CalibrationError, "must be an iterable of batches, got NoneType; wrap a batch"),
    pruning("a number", lambda: 3, CalibrationError, "must be an iterable of batches, got int; wrap a batch"),
    pruning("a text", lambda: "abc", CalibrationError, "an iterable of batches, got str; turn texts into tokens"),
    pruning("a list of None", lambda: [None], CalibrationError, "a batch is a NoneType, expected a tensor"),
    pruning("an empty tuple", lambda: [()], CalibrationError, r"a tuple of 0.*forward's 1 required arguments"),
    pruning("an empty dict", lambda: [{}], CalibrationError, "a call without tensors.*missing 1 required"),
    pruning("an unknown keyword", lambda: [{"y": X}], CalibrationError, "unexpected keyword argument 'y'.*Batches"),
    pruning("a list in a list", lambda: [[[X]]], CalibrationError, "in layer '0': TypeError.*must be Tensor, not list"),
    pruning("NaN", lambda: [X, put(X, NAN)], CalibrationError, "inputs of layer '2' are not finite in batch 1: 1 of"),
    pruning("Inf", lambda: [put(X, INF)], CalibrationError, "layer '2'.*in batch 0.*NaN or Inf: leave out these"),
    pruning("an overflow", lambda: X * 1e30, CalibrationError, "the batch itself is finite.*scale the data"),
    pruning("a wrong shape", lambda: X[:, :7], CalibrationError, r"\(40, 7\).*layer '0'.*\(40x7 and 8x16\)"),
    pruning("a wrong shape later", lambda: [X, X[:, :7]], CalibrationError, r"\(40, 7\).*layer '0'.*Give batches"),
    pruning("a scalar", lambda: [torch.tensor(1.0)], CalibrationError, "layer '0'.*at least 1D"),
    pruning("float16 for float32", X.half, CalibrationError, "layer '0'.*same dtype, but got Half and Float"),
    pruning("whole numbers", X.long, CalibrationError, "layer '0'.*same dtype, but got Long and Float"),
    pruning("another dtype later", lambda: [X, X.half()], CalibrationError, "layer '0'.*Half and Float"),
    pruning("tensors on meta", lambda: X.to("meta"), CalibrationError, "a meta tensor, which has no values"),
    pruning("sparse tensors", X.to_sparse, CalibrationError, "layout torch.sparse_coo, expected dense.*to_dense"),
    pruning("an iterator that breaks", breaks, OSError, "the disk is gone"),
    reading("no function", 3, TypeError, r"inputs must be a function of a batch.* returns \(args, kwargs\), got 3"),
    reading("give a tensor", lambda batch: batch, CalibrationError, r"returned Tensor, expected \(args, kwargs\)"),
    reading("give None", lambda _: None, CalibrationError, "returned NoneType, expected"),
    reading("fail", lambda _: 1 // 0, ZeroDivisionError, "division"),
    pruning("inputs for no data", lambda: lnr.Batches(3, lambda batch: ((batch,), {})), CalibrationError,
            "must be an iterable of batches, got int; wrap a batch"),
    # it works
    pruning("a numpy array", X.numpy),
    pruning("float64 for float32", lambda: [X, X.double()]),
    pruning("a generator", lambda: (batch for batch in X.split(10))),
    pruning("an iterable of one pass", Exhausted),
    pruning("batches of different sizes", lambda: [X[:3], X[3:17], X[17:]]),
    pruning("batches of one sample", lambda: X.split(1)),
    pruning("a single sample", lambda: X[:1]),
    pruning("a sample without batch axis", lambda: [X[0]]),
    pruning("fewer samples than columns", lambda: X[:5]),
    pruning("an empty batch first", lambda: [X[:0], X]),
    pruning("an empty batch last", lambda: [X, X[:0]]),
    pruning("constant inputs", lambda: torch.ones(40, 8)),
    pruning("inputs all zero", lambda: torch.zeros(40, 8)),
    pruning("tiny inputs", lambda: X * 1e-30),
    pruning("duplicated inputs", lambda: X[:, :1].expand(40, 8)),
    reading("give lists", lambda batch: [[batch], {}]),
]  # fmt: skip

MODELS = [
    pruning("no model", error=TypeError, message="must be a torch.nn.Module, got NoneType", model=lambda: None),
    pruning("a function", error=TypeError, message="must be a torch.nn.Module, got function", model=lambda: _sees),
    pruning("a class", error=TypeError, message="a class: make an instance", model=lambda: nn.Linear),
    pruning("a model on meta", error=GraphError, message="'0.weight' is on the meta device.*load",
            model=lambda: mlp(8, 9, 4).to("meta")),
    pruning("NaN in a weight", error=GraphError, message="1 of the 192 values of parameter '2.weight' are NaN or Inf",
            model=changed("2.weight", lambda w: w[0, 0].fill_(NAN))),
    pruning("Inf in a bias", error=GraphError, message="12 of the 12 values of parameter '2.bias'.*checkpoint",
            model=changed("2.bias", lambda b: b.fill_(INF))),
    pruning("NaN in a running variance", lambda: IMAGES, CalibrationError, "layer '3' are not finite in batch 0",
            model=with_variance(NAN)),
    pruning("a negative running variance", lambda: IMAGES, CalibrationError, "layer '3' are not finite in batch 0",
            model=with_variance(-1.0)),
    pruning("no prunable group", error=GraphError, message="no channel that can be pruned. 0: output of the model",
            model=lambda: mlp(8, 4)),
    pruning("no layer", error=GraphError, message="It has no layers", model=nn.ReLU),
    pruning("a forward that fails", error=CalibrationError, message="in its forward: KeyError: 'speed'", model=Raises),
    pruning("a forward that branches", error=GraphError,
            message="could not trace Branches in its forward at .*torch.where", model=Branches),
    # it works
    pruning("training mode, batch norm, one sample", lambda: IMAGES[:1], model=lambda: cnn().train()),
    pruning("a module called twice", model=Twice),
    pruning("dead channels", model=changed("0.bias", lambda b: b[:4].fill_(-1e3))),
    pruning("duplicated channels", model=changed("0.weight", lambda w: w.copy_(w[:1].expand_as(w)))),
    pruning("a layer that is all zero", model=changed("2.weight", lambda w: w.zero_())),
    pruning("weights all zero", model=zeroed),
]  # fmt: skip

AMOUNTS = [
    Case("no amount", lambda of, _: lnr.prune(of, X), TypeError, "missing 1 required positional argument: 'amount'"),  # type: ignore[call-arg]
    pruning("amount None", error=TypeError, message=r"a Budget or a Tolerance, got None; such as lnr.Keep\(0.5\)",
            amount=None),
    pruning("amount a fraction", error=TypeError, message=r"0.5, .* things: .*Keep\(0.5\) keeps .*Budget\(macs=0.5\)",
            amount=0.5),
    pruning("amount a count", error=TypeError, message=r"4, .* two things: .*lnr.Keep\(4\) keeps .*Budget\(macs=0.5\)",
            amount=4),
    pruning("amount a fraction for a graph", error=TypeError, message="a bare number, 0.5, .*Write the one", amount=0.5,
            into="graph"),
    pruning("amount True", error=TypeError, message="a Budget or a Tolerance, got True; such as", amount=True),
    pruning("amount of layers", error=TypeError, message=r"got {'0': 4}; write lnr.Keep\({'0': 4}\) if it names layers",
            amount={"0": 4}),
    pruning("amount of limits", error=TypeError, message=r"got {'macs': 0.5}; .* lnr.Budget\(macs=0.5\) if it limits",
            amount={"macs": 0.5}),
    pruning("amount of limits for a graph", error=TypeError, message="must be .* a Budget or a Tolerance",
            amount={"macs": 0.5}, into="graph"),
    pruning("amount a class", error=TypeError, message="or a Tolerance, got <class .*Keep'>; such as", amount=lnr.Keep),
    pruning("an amount by its name", error=TypeError, message="unexpected keyword argument 'keep'", keep=0.5),
    setting("a penalty of nothing", lnr.Penalty, ValueError, "one of lam and ratio, got neither; such as Pen"),
    setting("two penalties", lnr.Penalty, ValueError, "one of lam and ratio, got lam and ratio", lam=0.1, ratio=0.1),
    setting("lam negative", lnr.Penalty, ValueError, "penalty's lam must be finite and >= 0, got -1", lam=-1),
    setting("lam NaN", lnr.Penalty, ValueError, "penalty's lam must be finite and >= 0, got nan", lam=NAN),
    setting("lam infinite", lnr.Penalty, ValueError, "penalty's lam must be finite and >= 0, got inf", lam=INF),
    setting("lam NaN for a layer", lnr.Penalty, ValueError, "lam must be finite", lam={"0": NAN}),
    setting("lam a text", lnr.Penalty, TypeError, "lam must be a number or a mapping of numbers, got 'a'", lam="a"),
    setting("lam a tensor", lnr.Penalty, TypeError, "lam must be a number", lam=torch.tensor(0.1)),
    setting("ratio negative", lnr.Penalty, ValueError, "penalty's ratio must be finite and >= 0, got -1", ratio=-1),
    setting("ratio NaN", lnr.Penalty, ValueError, "penalty's ratio must be finite and >= 0, got nan", ratio=NAN),
    setting("ratio a text", lnr.Penalty, TypeError, "penalty's ratio must be a number .*, got 'a'", ratio="a"),
    pruning("lam of an unknown layer", error=ValueError, message="lam names 'conv9', which is not a prunable",
            amount=lnr.Penalty({"conv9": 0.1})),
    pruning("a penalty of norms", error=ValueError, message=r"as selector; with Norm\(\), give Keep or Budget",
            amount=lnr.Penalty(0.1), selector="norm"),
    pruning("a penalty of elimination", error=ValueError, message=r"with Backward\(swaps=8\), give Keep or Budget",
            amount=lnr.Penalty(ratio=0.1), selector=lnr.Backward(swaps=8)),
    setting("keep zero", lnr.Keep, ValueError, "at least one channel, got keep=0", channels=0),
    setting("keep above one", lnr.Keep, ValueError, r"fraction in \(0, 1\], got 1.5", channels=1.5),
    setting("keep NaN", lnr.Keep, ValueError, r"fraction in \(0, 1\], got nan", channels=NAN),
    setting("keep a list", lnr.Keep, TypeError, r"keep must be a number or a mapping.*got \[1\]", channels=[1]),
    setting("keep True", lnr.Keep, TypeError, "keep must be a number.*got True", channels=True),
    setting("keep zero of a layer", lnr.Keep, ValueError, "at least one channel, got keep=0", channels={"0": 0}),
    setting("keep a text of a layer", lnr.Keep, TypeError, "keep must be a number .*got 'all'", channels={"0": "all"}),
    pruning("keep of an unknown layer", error=ValueError, message="'conv9', which is not .* producer; known: 0, 2",
            amount=lnr.Keep({"conv9": 1})),
    pruning("keep of a layer by number", error=ValueError, message="keep names 0, which is not",
            amount=lnr.Keep({0: 4})),  # type: ignore[dict-item]
    pruning("keep of the output", error=ValueError, message=r"\(output of the model\)", amount=lnr.Keep({"4": 2})),
    # it works
    pruning("keep nothing in particular", amount=lnr.Keep({})),
    pruning("a penalty for nothing in particular", amount=lnr.Penalty(ratio={})),
    pruning("keep far too many", amount=lnr.Keep(10**30)),
    pruning("keep of numpy", amount=lnr.Keep(np.float32(0.5))),
]  # fmt: skip

ARGUMENTS = [
    pruning("no selector", error=TypeError, message=r"one of group_lasso.* as Backward\(swaps=8\), got None",
            selector=None),
    pruning("selectors", error=TypeError, message=r"one of group_lasso.*got \['norm'\]", selector=["norm"]),
    pruning("an unknown selector", error=ValueError, message="selector 'best'; known: group_lasso, backward",
            selector="best"),
    pruning("a selector's class", error=TypeError, message="such as .*, got <class .*Norm'>", selector=lnr.Norm),
    setting("swaps negative", lnr.Backward, ValueError, "swaps must be at least 0, got -1", swaps=-1),
    setting("swaps a text", lnr.Backward, TypeError, "swaps must be an int, got 'all'", swaps="all"),
    setting("no solver", lnr.Lasso, TypeError, "solver must be a name.*got None", solver=None),
    setting("a solver's class", lnr.Lasso, TypeError, r"settings such as Newton\(\), got <class", solver=lnr.Newton),
    setting("an unknown solver", lnr.Lasso, ValueError, "unknown solver 'sgd'; known solvers: prox", solver="sgd"),
    setting("seed a fraction", lnr.Random, TypeError, "seed must be an int, got 1.5", seed=1.5),
    setting("seed too long", lnr.Random, ValueError, r"seed must be in \[-2\^63, 2\^64\), got 118", seed=2**70),
    pruning("bias a text", error=TypeError, message="bias must be True or False, got 'no'", bias="no"),
    pruning("logits a number", error=TypeError, message="logits must be True or False, got 2", logits=2),
    pruning("refit True", error=TypeError, message=r"such as Refit\(window=2\), or None for no refit, got True",
            refit=True),
    pruning("refit a dict", error=TypeError, message="refit must be a Refit.*got {'ridge': 0.1}", refit={"ridge": 0.1}),
    setting("ridge a text", lnr.Refit, TypeError, "ridge must be a number, got 'a'", ridge="a"),
    setting("ridge NaN", lnr.Refit, ValueError, "ridge must be >= 0 and finite, got nan", ridge=NAN),
    setting("ridge infinite", lnr.Refit, ValueError, "ridge must be >= 0 and finite, got inf", ridge=INF),
    setting("ridge negative", lnr.Refit, ValueError, "ridge must be >= 0 and finite, got -1", ridge=-1),
    setting("window 0", lnr.Refit, ValueError, "window must be at least 1, got 0", window=0),
    setting("window 3", lnr.Refit, ValueError, r"1 \(each layer by itself\) or 2 \(with its maker\), got 3", window=3),
    setting("window a fraction", lnr.Refit, TypeError, "window must be an int, got 1.5", window=1.5),
    setting("no iterations", lnr.Refit, ValueError, "iterations must be at least 1, got 0", window=2, iterations=0),
    setting("iterations a text", lnr.Refit, TypeError, "iterations must be an int, got 'a'", iterations="a"),
    pruning("into a number", error=ValueError, message="into must be one of copy, model, graph, got 2", into=2),
    pruning("into unknown", error=ValueError, message="must be one of copy, model, graph, got 'onnx'", into="onnx"),
    pruning("run a folder", error=TypeError, message=r"run must be a Run, such as Run\(work='folder'\), got 'half'",
            run="half"),
    pruning("run None", error=TypeError, message="run must be a Run, .*got None", run=None),
    setting("work a number", lnr.Run, TypeError, "work must be the path of a folder, or None, got 3", work=3),
    setting("low_memory a text", lnr.Run, TypeError, "low_memory must be True or False, got 'no'", low_memory="no"),
    setting("alone a number", lnr.Run, TypeError, "alone must be True or False, got 1", alone=1),
    setting("progress a text", lnr.Run, TypeError, "True, False, None or a function.*got 'yes'", progress="yes"),
    # it works
    pruning("a negative seed", selector=lnr.Random(-1)),
]  # fmt: skip

BUDGETS = [
    setting("budget without a limit", lnr.Budget, ValueError, "needs a limit: one or more of params"),
    setting("budget zero", lnr.Budget, ValueError, r"macs must be a fraction in \(0, 1\], got 0", macs=0),
    setting("budget above one", lnr.Budget, ValueError, r"macs must be a fraction in \(0, 1\], got 2", macs=2),
    setting("budget NaN", lnr.Budget, ValueError, "params must be a fraction", params=NAN),
    setting("budget a text", lnr.Budget, TypeError, "size must be a number.*'a'", size="a"),
    setting("budget True", lnr.Budget, TypeError, "params must be a number", params=True),
    setting("budget's grid a number", lnr.Budget, TypeError, r"such as Grid\(round_to=8\), got 8", macs=0.5, grid=8),
    setting("budget's effort a text", lnr.Budget, TypeError, r"such as Effort\(samples=512\), got 'high'", macs=0.5,
            effort="high"),
    setting("grid round_to 0", lnr.Grid, ValueError, "round_to must be at least 1, got 0", round_to=0),
    setting("grid round_to 1.5", lnr.Grid, TypeError, "round_to must be an int, got 1.5", round_to=1.5),
    setting("grid minimum 0", lnr.Grid, ValueError, "minimum must be at least 1, got 0", minimum=0),
    setting("grid leave a number", lnr.Grid, TypeError, "leave must be names of layers, got 3", leave=3),
    setting("effort of no sample", lnr.Effort, ValueError, "samples must be at least 1, got 0", samples=0),
    setting("effort refits negative", lnr.Effort, ValueError, "refits must be at least 0, got -1", refits=-1),
    setting("effort search a fraction", lnr.Effort, TypeError, "search must be an int, got 0.5", search=0.5),
    pruning("a search without a refit", error=ValueError,
            message=r"refits the network in every trial: Effort\(search=...\) cannot be combined with refit=None",
            amount=lnr.Budget(macs=0.5, effort=lnr.Effort(search=2)), refit=None),
    pruning("budget out of reach", error=ValueError, message="out of reach: the smallest.*params 4.8%.*Raise the limit",
            amount=lnr.Budget(params=1e-9)),
    pruning("budget against its minimum", error=ValueError, message="asked for 0.1. Raise the limit, or lower minimum",
            amount=lnr.Budget(macs=0.1, grid=lnr.Grid(minimum=12))),
    pruning("budget leaves an unknown layer", error=ValueError, message="leave names 'x', which is not a prunable",
            amount=lnr.Budget(params=0.5, grid=lnr.Grid(leave=("x",)))),
    pruning("budget leaves everything", error=ValueError, message="names every channel group: nothing is left",
            amount=lnr.Budget(params=0.5, grid=lnr.Grid(leave=("0", "2")))),
    pruning("budget of latency for a graph", error=ValueError, message="cannot be combined with into='graph'",
            amount=lnr.Budget(latency=0.5), into="graph"),
    # it works
    pruning("budget of a tiny error", amount=lnr.Budget(error=1e-30)),
    pruning("budget without a refit", amount=lnr.Budget(macs=0.5), refit=None),
]  # fmt: skip

OTHERS = [
    Case("inspect: no model", lambda of, _: lnr.inspect(of, X), TypeError, "got NoneType", lambda: None),
    Case("inspect: no example", lambda of, _: lnr.inspect(of, None), CalibrationError, "a batch is a NoneType"),
    Case("inspect: a wrong shape", lambda of, _: lnr.inspect(of, X[:, :3]), CalibrationError, r"\(40, 3\).*layer '0'"),
    Case("save: a folder", lambda of, f: pruned(of).save(f), IsADirectoryError, "name a file in it"),
    Case("save: no such folder", lambda of, f: pruned(of).save(f / "a" / "b"), FileNotFoundError,
         "its folder does not exist; make it first: .*b"),
    Case("save: not writable", lambda of, _: pruned(of).save("/proc/pruned"), OSError, "/proc"),
    Case("save: no path", lambda of, _: pruned(of).save(None), TypeError, "not NoneType"),  # type: ignore[arg-type]
    Case("save_plan: no such folder", lambda of, f: lnr.save_plan(f / "a" / "b", pruned(of).plan), FileNotFoundError,
         "make it first"),
    Case("load_plan: nothing", lambda _, f: lnr.load_plan(f / "none"), OSError, "none"),
    Case("apply: no model", lambda of, _: lnr.apply_plan(pruned(of).plan, None), TypeError, "got NoneType"),  # type: ignore[arg-type]
    Case("apply: another model", lambda of, _: lnr.apply_plan(pruned(of).plan, OTHER), PlanError,
         "not of the architecture.*Give a new instance"),
    Case("apply: into a graph", lambda of, _: lnr.apply_plan(pruned(of).plan, of, into="graph"), ValueError,
         "into must be one of copy, model, got 'graph'"),
    Case("load: a number", lambda of, _: lnr.load(3, of), TypeError, "not int"),  # type: ignore[arg-type]
    Case("load: nothing", lambda of, f: lnr.load(f / "none", of), OSError, "none"),
    Case("load: no model", lambda of, f: lnr.load(f, of), TypeError, "got NoneType", lambda: None),
    Case("load: into a graph", lambda of, f: lnr.load(f / "none", of, into="graph"), ValueError,
         "into must be one of copy, model, got 'graph'"),
    sweeping("no amounts", [], ValueError, "at least one amount, got none"),
    sweeping("a number", 3, TypeError, "must be a list of amounts.*got 3; wrap"),
    sweeping("one budget", lnr.Budget(params=0.5), TypeError, "must be a list of amounts.*; wrap it in a list"),
    sweeping("fractions", [0.5], TypeError, r"a bare number, 0.5, .*lnr.Keep\(0.5\)"),
    sweeping("dicts", [{"keep": 0.5}], TypeError, "must be .* a Budget or a Tolerance, got {'keep': 0.5}"),
    sweeping("a bad second point", [HALF, lnr.Penalty(0.1)], ValueError, r"with Norm\(\), give Keep or Budget",
             selector="norm", evaluate=never),
    sweeping("an unknown argument", [HALF], TypeError, "unexpected keyword argument 'slector'", slector="norm"),
    sweeping("an unknown cost", [HALF], ValueError, "'money'; known: params, macs", cost="money"),
    sweeping("into the model", [HALF], ValueError, "cannot be combined with into='model'; use into='copy'",
             into="model"),
    sweeping("maximize a text", [HALF], TypeError, "maximize must be True or False, got 'no'", maximize="no"),
    sweeping("seed a fraction", [HALF], TypeError, "seed must be an int, got 1.5", seed=1.5, evaluate=never),
    sweeping("run a folder", [HALF], TypeError, "run must be a Run, .*got 'half'", run="half", evaluate=never),
    sweeping("evaluate no function", [HALF], TypeError, "evaluate must be a function", evaluate=3),
    sweeping("evaluate gives a text", [HALF], TypeError, "evaluate must return a number, got 'good'",
             evaluate=lambda _: "good"),
    sweeping("retrain gives a number", [HALF], TypeError, "retrain must return a model.*got int",
             retrain=lambda _: 5),
]  # fmt: skip

CASES = [*DATA, *MODELS, *AMOUNTS, *ARGUMENTS, *BUDGETS, *OTHERS]


def attempt(case: Case, folder: Path) -> str:
    """What came of it: "works", or the error; what may not change has not.

    Raises:
        AssertionError: If something has, or the error is another one.
    """
    torch.manual_seed(0)
    model = case.model()
    before = Untouched(model, folder)
    try:
        case.attempt(model, folder)
        error, text = None, "works"
    except Exception as raised:
        error, text = type(raised), f"{type(raised).__name__}: {raised}"
    assert issubclass(error, case.error) if error and case.error else error is case.error, text
    assert re.search(case.message, text), text
    before.check()
    return text


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_nothing_is_lost(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    attempt(case, tmp_path)


def test_there_are_more_than_sixty_that_are_refused() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert sum(case.error is not None for case in CASES) > 60


def test_what_must_not_change_is_seen(tmp_path: Path) -> None:
    def hooked(model: nn.Module) -> None:
        model.register_forward_hook(_sees)

    changes: list[Callable[[nn.Sequential], Any]] = [
        lambda model: model.train(),
        lambda model: model.get_parameter("0.weight").requires_grad_(True),
        lambda model: model.get_parameter("0.weight").data.add_(1e-6),
        lambda model: torch.rand(1),
        lambda model: np.random.rand(),
        lambda model: (tmp_path / "left").touch(),
        lambda model: setattr(model[2], "cache", 1),
        hooked,
    ]
    for change in changes:
        model = net()
        before = Untouched(model, tmp_path)
        change(model)
        with pytest.raises(AssertionError, match="changed"):
            before.check()


if __name__ == "__main__":
    print("| tried | what came of it |\n|---|---|")  # noqa: T201
    for each in CASES:
        with tempfile.TemporaryDirectory() as where:
            result = attempt(each, Path(where)).replace(where, "FOLDER").split("\n")[0].replace("|", "\\|")
            print(f"| {each.name} | {result} |")  # noqa: T201

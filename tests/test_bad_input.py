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
    **options: Any,
) -> Case:
    amounts = options.keys() & {"keep", "lam", "lam_ratio", "budget"}
    given = options if amounts else {**options, "keep": 0.5}
    return Case(name, lambda of, _: lnr.prune(of, data(), **given), error, message, model)


def saved(model: nn.Module, folder: Path) -> Path:
    path = folder / "saved.safetensors"
    lnr.prune(model, X, lnr.Keep(0.5)).save(path)
    return path


def sweeping(name: str, budgets: Any, error: type[Exception], message: str, **options: Any) -> Case:
    return Case(f"sweep: {name}", lambda of, _: lnr.sweep(of, X, budgets, **options), error, message)


DATA = [
    pruning("an empty list", list, CalibrationError, "holds no batch; give at least one"),
    pruning("an exhausted iterator", lambda: iter(()), CalibrationError, "holds no batch; give at least one"),
    pruning("an empty batch alone", lambda: X[:0], CalibrationError, "holds no batch; give at least one"),
    pruning("no data", lambda: None, CalibrationError, "must be an iterable of batches, got NoneType; wrap a batch"),
    pruning("a number", lambda: 3, CalibrationError, "must be an iterable of batches, got int; wrap a batch"),
    pruning("a text", lambda: "abc", CalibrationError, "a batch is a str, expected a tensor.*map it with inputs="),
    pruning("a numpy array", X.numpy, CalibrationError, "a batch is a ndarray, expected a tensor.*inputs="),
    pruning("a list of None", lambda: [None], CalibrationError, "a batch is a NoneType, expected a tensor"),
    pruning("an empty tuple", lambda: [()], CalibrationError, r"a tuple of 0.*forward's 1 required arguments"),
    pruning("an empty dict", lambda: [{}], CalibrationError, "a call without tensors.*missing 1 required"),
    pruning("an unknown keyword", lambda: [{"y": X}], CalibrationError, "unexpected keyword argument 'y'.*inputs="),
    pruning("a list in a list", lambda: [[[X]]], CalibrationError, "in layer '0': TypeError.*must be Tensor, not list"),
    pruning("NaN", lambda: [X, put(X, NAN)], CalibrationError, "inputs of layer '2' are not finite in batch 1: 1 of"),
    pruning("Inf", lambda: [put(X, INF)], CalibrationError, "layer '2'.*in batch 0.*NaN or Inf: leave out these"),
    pruning("an overflow", lambda: X * 1e30, CalibrationError, "the batch itself is finite.*scale the data"),
    pruning("a wrong shape", lambda: X[:, :7], CalibrationError, r"\(40, 7\).*layer '0'.*\(40x7 and 8x16\)"),
    pruning("a wrong shape later", lambda: [X, X[:, :7]], CalibrationError, r"\(40, 7\).*layer '0'.*Give batches"),
    pruning("a scalar", lambda: [torch.tensor(1.0)], CalibrationError, "layer '0'.*at least 1D"),
    pruning("float64 for float32", X.double, CalibrationError, "layer '0'.*same dtype, but got Double and Float"),
    pruning("float16 for float32", X.half, CalibrationError, "layer '0'.*same dtype, but got Half and Float"),
    pruning("whole numbers", X.long, CalibrationError, "layer '0'.*same dtype, but got Long and Float"),
    pruning("another dtype later", lambda: [X, X.double()], CalibrationError, "layer '0'.*Double and Float"),
    pruning("tensors on meta", lambda: X.to("meta"), CalibrationError, "a meta tensor, which has no values"),
    pruning("sparse tensors", X.to_sparse, CalibrationError, "layout torch.sparse_coo, expected dense.*to_dense"),
    pruning("an iterator that breaks", breaks, OSError, "the disk is gone"),
    pruning("inputs= no function", error=TypeError, message="inputs must be a function of a batch.*got 3", inputs=3),
    pruning("inputs= gives a tensor", error=CalibrationError, message=r"returned Tensor, expected \(args, kwargs\)",
            inputs=lambda batch: batch),
    pruning("inputs= gives None", error=CalibrationError, message="returned NoneType, expected", inputs=lambda _: None),
    pruning("inputs= fails", error=ZeroDivisionError, message="division", inputs=lambda _: 1 // 0),
    # it works
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
    pruning("inputs= gives lists", inputs=lambda batch: [[batch], {}]),
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
    pruning("a forward that branches", error=GraphError, message="could not trace Branches.*traceable", model=Branches),
    # it works
    pruning("training mode, batch norm, one sample", lambda: IMAGES[:1], model=lambda: cnn().train()),
    pruning("a module called twice", model=Twice),
    pruning("dead channels", model=changed("0.bias", lambda b: b[:4].fill_(-1e3))),
    pruning("duplicated channels", model=changed("0.weight", lambda w: w.copy_(w[:1].expand_as(w)))),
    pruning("a layer that is all zero", model=changed("2.weight", lambda w: w.zero_())),
    pruning("weights all zero", model=zeroed),
]  # fmt: skip

ARGUMENTS = [
    Case("no amount", lambda of, _: lnr.prune(of, X), ValueError, "exactly one of keep, lam, lam_ratio, budget"),
    pruning("two amounts", error=ValueError, message="exactly one of.*got keep, lam", keep=0.5, lam=0.1),
    pruning("lam negative", error=ValueError, message="lam must be finite and >= 0, got -1", lam=-1),
    pruning("lam NaN", error=ValueError, message="lam must be finite and >= 0, got nan", lam=NAN),
    pruning("lam infinite", error=ValueError, message="lam must be finite and >= 0, got inf", lam=INF),
    pruning("lam NaN for a layer", error=ValueError, message="lam must be finite", lam={"0": NAN}),
    pruning("lam a text", error=TypeError, message="lam must be a number or a mapping of numbers, got 'a'", lam="a"),
    pruning("lam a tensor", error=TypeError, message="lam must be a number", lam=torch.tensor(0.1)),
    pruning("keep zero", error=ValueError, message="at least one channel, got keep=0", keep=0),
    pruning("keep above one", error=ValueError, message=r"fraction in \(0, 1\], got 1.5", keep=1.5),
    pruning("keep a list", error=TypeError, message=r"keep must be a number or a mapping.*got \[1\]", keep=[1]),
    pruning("keep True", error=TypeError, message="keep must be a number", keep=True),
    pruning("keep of an unknown layer", error=ValueError, message="'conv9', which is no prunable", keep={"conv9": 1}),
    pruning("keep of a layer by number", error=ValueError, message="keep names 0, which is no", keep={0: 4}),
    pruning("keep of the output", error=ValueError, message=r"\(output of the model\)", keep={"4": 2}),
    pruning("no selector", error=ValueError, message="unknown selector None; known selectors", selector=None),
    pruning("selectors", error=ValueError, message=r"unknown selector \['norm'\]; known", selector=["norm"]),
    pruning("no solver", error=TypeError, message="solver must be a name.*got None", solver=None),
    pruning("a solver's class", error=TypeError, message=r"settings such as Newton\(\), got <class", solver=lnr.Newton),
    pruning("an unknown solver", error=ValueError, message="known solvers", selector="norm", solver="sgd"),
    pruning("bias a text", error=TypeError, message="bias must be True or False, got 'no'", bias="no"),
    pruning("debias None", error=TypeError, message="debias must be True or False, got None", debias=None),
    pruning("inplace a number", error=TypeError, message="inplace must be True or False, got 2", inplace=2),
    pruning("ridge a text", error=TypeError, message="ridge must be a number", ridge="a"),
    pruning("ridge NaN", error=ValueError, message="ridge must be >= 0 and finite, got nan", ridge=NAN),
    pruning("ridge infinite", error=ValueError, message="ridge must be >= 0 and finite, got inf", ridge=INF),
    pruning("seed a fraction", error=TypeError, message="seed must be an int, got 1.5", seed=1.5),
    pruning("seed too long", error=ValueError, message=r"seed must be in \[-2\^63, 2\^64\)", seed=2**70),
    pruning("progress a text", error=TypeError, message="progress must be True, False, None or a", progress="yes"),
    pruning("graph in place", error=ValueError, message="cannot be combined", inplace=True, as_graph=True),
    # it works
    pruning("keep nothing in particular", keep={}),
    pruning("keep far too many", keep=10**30),
    pruning("keep of numpy", keep=np.float32(0.5)),
    pruning("a negative seed", seed=-1),
]

BUDGETS = [
    Case("budget without a limit", lambda *_: lnr.Budget(), ValueError, "needs a limit: one or more of params"),
    Case("budget zero", lambda *_: lnr.Budget(macs=0), ValueError, r"macs must be a fraction in \(0, 1\], got 0"),
    Case("budget above one", lambda *_: lnr.Budget(macs=2), ValueError, r"macs must be a fraction in \(0, 1\], got 2"),
    Case("budget NaN", lambda *_: lnr.Budget(params=NAN), ValueError, "params must be a fraction"),
    Case("budget a text", lambda *_: lnr.Budget(size="a"), TypeError, "size must be a number.*'a'"),  # type: ignore[arg-type]
    Case("budget True", lambda *_: lnr.Budget(params=True), TypeError, "params must be a number"),
    Case("budget round_to 0", lambda *_: lnr.Budget(params=0.5, grid=lnr.Grid(round_to=0)), ValueError, "round_to must be at least 1"),
    Case("budget round_to 1.5", lambda *_: lnr.Budget(params=0.5, grid=lnr.Grid(round_to=1.5)), TypeError, "round_to must be an int"),  # type: ignore[arg-type]
    Case("budget leave a number", lambda *_: lnr.Budget(params=0.5, grid=lnr.Grid(leave=3)), TypeError, "names of layers, got 3"),  # type: ignore[arg-type]
    pruning("budget a number", error=TypeError, message=r"such as Budget\(macs=0.5\), got 0.5", budget=0.5),
    pruning("budget a dict", error=TypeError, message="budget must be a Budget", budget={"macs": 0.5}),
    pruning("budget a dict for a graph", error=TypeError, message="budget must be a Budget", budget={"macs": 0.5},
            as_graph=True),
    pruning("a search without a refit", error=ValueError, message=r"budget.search refits .* debias=False",
            budget=lnr.Budget(macs=0.5, effort=lnr.Effort(search=2)), debias=False),
    pruning("budget out of reach", error=ValueError, message="out of reach: the smallest.*params 4.8%.*Raise the limit",
            budget=lnr.Budget(params=1e-9)),
    pruning("budget against its minimum", error=ValueError, message="asked for 0.1. Raise the limit, or lower minimum",
            budget=lnr.Budget(macs=0.1, grid=lnr.Grid(minimum=12))),
    pruning("budget leaves an unknown layer", error=ValueError, message="budget.leave names 'x', which is no prunable",
            budget=lnr.Budget(params=0.5, grid=lnr.Grid(leave=("x",)))),
    pruning("budget leaves everything", error=ValueError, message="names every channel group: nothing is left",
            budget=lnr.Budget(params=0.5, grid=lnr.Grid(leave=("0", "2")))),
    pruning("budget of latency for a graph", error=ValueError, message="cannot be had with as_graph=True",
            budget=lnr.Budget(latency=0.5), as_graph=True),
    pruning("budget of a tiny error", budget=lnr.Budget(error=1e-30)),
]  # fmt: skip

OTHERS = [
    Case("inspect: no model", lambda of, _: lnr.inspect(of, X), TypeError, "got NoneType", lambda: None),
    Case("inspect: no example", lambda of, _: lnr.inspect(of, None), CalibrationError, "a batch is a NoneType"),
    Case("inspect: a wrong shape", lambda of, _: lnr.inspect(of, X[:, :3]), CalibrationError, r"\(40, 3\).*layer '0'"),
    Case("save: a folder", lambda of, f: lnr.prune(of, X, lnr.Keep(4)).save(f), IsADirectoryError, "name a file in it"),
    Case("save: no such folder", lambda of, f: lnr.prune(of, X, lnr.Keep(4)).save(f / "a" / "b"), FileNotFoundError,
         "its folder does not exist; make it first: .*b"),
    Case("save: not writable", lambda of, _: lnr.prune(of, X, lnr.Keep(4)).save("/proc/pruned"), OSError, "/proc"),
    Case("save: no path", lambda of, _: lnr.prune(of, X, lnr.Keep(4)).save(None), TypeError, "not NoneType"),  # type: ignore[arg-type]
    Case("plan: no such folder", lambda of, f: lnr.save_plan(f / "a" / "b", lnr.prune(of, X, lnr.Keep(4)).plan), FileNotFoundError,
         "make it first"),
    Case("apply: no model", lambda of, _: lnr.apply_plan(lnr.prune(of, X, lnr.Keep(4)).plan, None), TypeError, "got NoneType"),  # type: ignore[arg-type]
    Case("apply: another model", lambda of, _: lnr.apply_plan(lnr.prune(of, X, lnr.Keep(4)).plan, OTHER), PlanError,
         "not of the architecture.*Give a new instance"),
    Case("load: a number", lambda of, _: lnr.load(3, of), TypeError, "not int"),  # type: ignore[arg-type]
    Case("load: nothing", lambda of, f: lnr.load(f / "none", of), OSError, "none"),
    Case("load: no model", lambda of, f: lnr.load(f, of), TypeError, "got NoneType", lambda: None),
    sweeping("no budgets", [], ValueError, "at least one budget, got none"),
    sweeping("a number", 3, TypeError, "must be a list of budgets.*got 3; wrap"),
    sweeping("one budget", lnr.Budget(params=0.5), TypeError, "must be a list of budgets"),
    sweeping("fractions", [0.5], TypeError, r"a mapping such as \{'keep': 0.5\}, got 0.5"),
    sweeping("an unknown amount", [{"kep": 0.5}], TypeError, "unexpected keyword argument 'kep'"),
    sweeping("a bad second point", [{"keep": 0.5}, {"keep": -1}], ValueError, "at least one channel, got keep=-1"),
    sweeping("an unknown cost", [{"keep": 0.5}], ValueError, "known costs: params, macs", cost="money"),
    sweeping("in place", [{"keep": 0.5}], ValueError, "inplace=True", inplace=True),
    sweeping("evaluate no function", [{"keep": 0.5}], TypeError, "evaluate must be a function", evaluate=3),
    sweeping("evaluate gives a text", [{"keep": 0.5}], TypeError, "evaluate must return a number, got 'good'",
             evaluate=lambda _: "good"),
    sweeping("retrain gives a number", [{"keep": 0.5}], TypeError, "retrain must return a model.*got int",
             retrain=lambda _: 5),
]  # fmt: skip

CASES = [*DATA, *MODELS, *ARGUMENTS, *BUDGETS, *OTHERS]


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

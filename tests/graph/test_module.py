"""Wrapped, compiled and scripted models: what is worked on is the plain module inside, or they are refused by name."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.ao.nn import qat
from torch.ao.quantization import QConfig, default_fake_quant, default_weight_fake_quant

import lnr_prune as lnr
from lnr_prune.errors import GraphError
from lnr_prune.graph.module import plain
from tests.helpers.models import randomised

HALF = lnr.Keep(0.5)


class Block(nn.Module):
    def __init__(self, d: int, h: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(d, h, 3, padding=1), nn.BatchNorm2d(h)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return randomised(nn.Sequential(Block(3, 8), Block(8, 6), nn.Conv2d(6, 4, 1)))


X = [torch.randn(6, 3, 8, 8) for _ in range(3)]
compiles: list[int] = []


def counting(graph: Any, inputs: Any) -> Any:
    compiles.append(len(inputs))
    return graph.forward


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    compiles.clear()
    yield
    torch._dynamo.reset()


def wrapped(model: nn.Module) -> nn.Module:
    return cast(nn.Module, torch.compile(model, backend=counting))


def in_place(model: nn.Sequential) -> nn.Module:
    model.compile(backend=counting)
    return model


def part(model: nn.Sequential) -> nn.Module:
    model[0] = wrapped(model[0])
    model[1].compile(backend=counting)
    return model


def function(model: nn.Sequential) -> nn.Module:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            doubled: Tensor = torch.compile(lambda y: y * 2, backend=counting)(x)
            out: Tensor = self.inner(doubled)
            return out

    return Outer().eval()


FORMS: list[Callable[[nn.Sequential], nn.Module]] = [wrapped, in_place, part, function]


@pytest.mark.parametrize("compiled", FORMS)
def test_nothing_is_compiled_and_the_result_is_that_of_the_plain_model(
    compiled: Callable[[nn.Sequential], nn.Module], tmp_path: Path
) -> None:
    expected = lnr.prune(net() if compiled is not function else function(net()), X, HALF)
    compiles.clear()
    model = compiled(net())
    kinds = [type(module) for module in model.modules()]
    found, pruned = lnr.inspect(model, X[0]), lnr.prune(model, X, HALF)
    swept = lnr.sweep(model, X, [HALF])
    pruned.save(tmp_path / "small.safetensors")
    loaded = lnr.load(tmp_path / "small.safetensors", compiled(net()), example=X[0])
    cut = lnr.apply_plan(pruned.plan, compiled(net()), example=X[0])
    assert compiles == []
    assert [group.size for group in found.groups] == [8, 6]
    assert repr(pruned.model) == repr(expected.model) == repr(loaded) == repr(cut)
    assert pruned.plan == expected.plan
    assert swept.points[0].report.params_after == pruned.report.params_after
    new = torch.randn(5, 3, 9, 7)
    with torch.no_grad():
        assert pruned.model(new).equal(expected.model(new))
        assert loaded(new).equal(expected.model(new))
        compiles.clear()
        assert [type(module) for module in model.modules()] == kinds
        model(X[0])  # is compiled as before
    assert compiles


@pytest.mark.parametrize("compiled", [wrapped, in_place, part])
def test_a_compiled_model_that_is_pruned_in_place_compiles_again(
    compiled: Callable[[nn.Sequential], nn.Module], tmp_path: Path
) -> None:
    expected, model = lnr.prune(net(), X, HALF), compiled(net())
    with torch.no_grad():
        model(X[0])
        pruned = lnr.prune(model, X, HALF, into="model")
        compiles.clear()
        new = torch.randn(2, 3, 8, 8)
        torch.testing.assert_close(model(new), expected.model(new))
        assert compiles
    pruned.save(tmp_path / "small.safetensors")
    assert lnr.load(tmp_path / "small.safetensors", net())(new).equal(expected.model(new))


def test_compiled_parts_are_back_after_a_failure() -> None:
    model = part(net())
    first = model.get_submodule("0")

    def fails() -> None:
        with plain(model) as inside:
            assert inside is model
            assert type(inside.get_submodule("0")) is Block
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fails()
    assert model.get_submodule("0") is first
    assert vars(model.get_submodule("1"))["_compiled_call_impl"] is not None


def quantized(model: nn.Sequential) -> nn.Module:
    settings = QConfig(activation=default_fake_quant, weight=default_weight_fake_quant)
    model[2] = qat.Conv2d(6, 4, 1, qconfig=settings)
    return model.eval()


REFUSED: dict[str, tuple[Callable[[nn.Sequential], Any], str]] = {
    "traced": (lambda model: torch.jit.trace(model, X[0]), "^model is traced by torch.jit.*give the Python module"),
    "scripted": (torch.jit.script, "^model is scripted by torch.jit"),
    "scripted part": (
        lambda model: nn.Sequential(torch.jit.script(model), nn.Conv2d(4, 4, 1)).eval(),
        r"^model\.0 is scripted by torch.jit.*script or trace the pruned model again",
    ),
    "parallel": (nn.DataParallel, r"^model is wrapped in DataParallel: prune the plain module inside, model\.module"),
    "in quantization-aware training": (
        quantized,
        r"^model\.2 is in quantization-aware training.*put model\.2\.to_float\(\) in its place, prune the float model",
    ),
    "compiled and parallel": (
        lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
        "^model is wrapped in DataParallel",
    ),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_hides_its_operations_is_refused_alike_by_all_verbs(kind: str, tmp_path: Path) -> None:
    make, message = REFUSED[kind]
    model, pruned = make(net()), lnr.prune(net(), X, HALF)
    pruned.save(tmp_path / "small.safetensors")
    said = set()
    for verb in (
        lambda: lnr.inspect(model, X[0]),
        lambda: lnr.prune(model, X, HALF),
        lambda: lnr.sweep(model, X, [HALF]),
        lambda: lnr.fold(model),
        lambda: lnr.apply_plan(pruned.plan, model),
        lambda: lnr.load(tmp_path / "small.safetensors", model),
    ):
        with pytest.raises(GraphError, match=message) as caught:
            verb()
        said.add(str(caught.value))
    assert len(said) == 1

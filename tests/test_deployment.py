"""Pruned modules and pruned graphs go wherever the original goes: torch.export, torch.compile, ONNX, training."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lnr_prune as lnr
from tests.helpers import held, models, patterns
from tests.helpers.models import randomised

CASES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "residual": (models.Residual, torch.randn(4, 3, 8, 8)),
    "attributes": (held.HeldHeads, torch.randn(4, 5, 16)),
    "multihead": (patterns.TorchAttention, torch.randn(4, 5, 12)),
}


@pytest.fixture(params=[(name, into) for name in CASES for into in ("copy", "graph")], ids=str)
def pruned(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    name, into = request.param
    make, x = CASES[name]
    return lnr.prune(randomised(make()), [x], lnr.Keep(0.5), into=into).model, x


def test_torch_export(pruned: tuple[nn.Module, Tensor]) -> None:
    model, x = pruned
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        program = torch.export.export(model, (x,), strict=False)
        exported = program.module()(x)
    torch.testing.assert_close(exported, model(x))


def test_torch_compile(pruned: tuple[nn.Module, Tensor]) -> None:
    model, x = pruned
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, model(x))


def test_onnx(pruned: tuple[nn.Module, Tensor]) -> None:
    pytest.importorskip("onnxscript", reason="needs onnx and onnxscript")
    model, x = pruned
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert program is not None
    graph = program.model.graph
    assert [tuple(output.shape) for output in graph.outputs] == [tuple(model(x).shape)]
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {graph.inputs[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), model(x).detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_training_copies_and_flags(name: str) -> None:
    make, x = CASES[name]
    model = randomised(make())
    frozen = next(iter(dict(model.named_parameters())))
    model.get_parameter(frozen).requires_grad_(False)
    flags = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    small = lnr.prune(model, [x], lnr.Keep(0.5)).model
    assert type(small) is type(model)
    assert {key: parameter.requires_grad for key, parameter in small.named_parameters()} == flags
    twin = copy.deepcopy(small)
    torch.testing.assert_close(twin(x), small(x))
    before = small(x)
    optimizer = torch.optim.SGD([p for p in twin.train().parameters() if p.requires_grad], 0.01)
    twin(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(twin.eval()(x), before)
    torch.testing.assert_close(small(x), before, rtol=0, atol=0)

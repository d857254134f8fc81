"""The pruned graph equals the masked model, for any batch size, and is an ordinary module in evaluation mode."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import lnr_prune as lnr
from lnr_prune.calibration.calls import Call
from lnr_prune.collapse.graph_module import PrunedGraph, pruned_graph
from lnr_prune.collapse.masks import masked_weights
from lnr_prune.collapse.plan import Plan, make_plan
from lnr_prune.errors import GraphError, VerificationError
from lnr_prune.graph.groups import find_groups
from lnr_prune.graph.module import named_tensors
from lnr_prune.testing import random_network
from tests.helpers import held, models, patterns
from tests.helpers.models import outputs, randomised

IMAGE, SEQUENCE = torch.randn(4, 3, 8, 8), torch.randn(4, 5, 12)
CASES: list[tuple[Callable[[], nn.Module], Tensor]] = [
    (held.HeldHeads, torch.randn(4, 5, 16)),
    (held.DerivedSizes, SEQUENCE),
    (held.MergedHeads, SEQUENCE),
    (held.UniformBias, SEQUENCE),
    (held.HeldByParts, torch.randn(4, 4)),
    (models.cnn, torch.randn(4, 2, 12, 12)),
    (models.Residual, IMAGE),
    (patterns.ChannelShuffle, IMAGE),
    (patterns.PaddedShortcut, IMAGE),
    (patterns.PackedAttention, SEQUENCE),
    (patterns.GroupedQueries, torch.randint(11, (4, 5))),
    (patterns.TorchAttention, SEQUENCE),
    (lambda: patterns.TorchAttention(batch_first=False), SEQUENCE),
    (patterns.AuxiliaryHead, IMAGE),
    (patterns.Tokens, torch.randint(11, (4, 5))),
    (patterns.RelativeBias, SEQUENCE),
    (patterns.NoKeyBias, SEQUENCE),
    (patterns.CachedBias, SEQUENCE),
    (patterns.Gated, torch.randn(4, 3, 7)),
    (patterns.Conv1D, torch.randn(4, 4)),
    (patterns.Grouped, IMAGE),
    (patterns.GroupedUpsampling, IMAGE),
    (patterns.ChannelsLast, IMAGE),
]


def at_random(model: nn.Module, call: Call, seed: int = 0) -> tuple[Plan, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    supports = {}
    for group in find_groups(model, *call).groups:
        support = torch.rand(group.size, generator=generator) < 0.5
        support[torch.randint(group.size, (1,), generator=generator)] = True
        supports[group] = support
    return make_plan(supports), masked_weights(supports, named_tensors(model))


@pytest.mark.parametrize(("make", "x"), CASES, ids=[getattr(make, "__name__", "sequence-first") for make, _ in CASES])
def test_equals_the_masked_model_at_any_batch_size(make: Callable[[], nn.Module], x: Tensor) -> None:
    model = randomised(make()).double()
    x = x.double() if x.is_floating_point() else x
    plan, masked = at_random(model, ((x,), {}), seed=1)
    assert plan
    graph = pruned_graph(model, plan, masked, ((x,), {}))
    assert graph.batch_size is None
    for size in (1, 3, 4):
        torch.testing.assert_close(graph(x[:size]), functional_call(model, masked, (x[:size],)))
    original, own = named_tensors(model), named_tensors(graph)
    assert own.keys() <= original.keys()
    assert not {id(tensor) for tensor in original.values()} & {id(tensor) for tensor in own.values()}
    for name, dims in plan.indices.items():
        if name in own:
            shape = [len(dims[dim]) if dim in dims else size for dim, size in enumerate(original[name].shape)]
            assert list(own[name].shape) == shape


@pytest.mark.parametrize("seed", range(6))
def test_random_networks(seed: int) -> None:
    model, x = random_network(seed, depth=1 + seed % 5)
    plan, masked = at_random(model, ((x,), {}), seed)
    graph = pruned_graph(model, plan, masked, ((x,), {}))  # which verifies itself
    assert graph.batch_size is None
    expected = outputs(model, x[:1], masked)
    torch.testing.assert_close(outputs(graph, x[:1]), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_arguments_and_outputs_are_the_models_own() -> None:
    model = held.DerivedSizes()
    model.up.weight.requires_grad_(False)
    x, scale = torch.randn(6, 5, 12), torch.ones(6, 1, 1) * 2
    pruned = lnr.prune(model, [{"x": x, "scale": scale}], lnr.Keep(0.5), into="graph")
    graph = pruned.model
    assert isinstance(graph, PrunedGraph)
    assert graph.get_parameter("qkv.weight").shape == (12 if pruned.plan.channels["qkv"] == (0,) else 24, 12)
    assert pruned.report.params_after < pruned.report.params_before
    assert pruned.report.macs_after < pruned.report.macs_before
    outputs = graph(x=x[:5], scale=scale[:5])
    expected = functional_call(model, dict(pruned.masked), (x[:5],), {"scale": scale[:5]})
    torch.testing.assert_close(outputs, expected)
    assert isinstance(outputs["last"], tuple)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in graph.named_parameters()} == flags


def test_deepcopy_save_and_evaluation_only() -> None:
    graph = lnr.prune(held.DerivedSizes(), [SEQUENCE], lnr.Keep(0.5), into="graph").model
    twin = copy.deepcopy(graph)
    assert isinstance(twin, PrunedGraph)
    assert twin.batch_size is None
    with torch.no_grad():
        twin.get_parameter("up.bias").add_(1)
    assert not torch.equal(twin(SEQUENCE)["y"], graph(SEQUENCE)["y"])
    buffer = io.BytesIO()
    torch.save(graph.state_dict(), buffer)
    buffer.seek(0)
    twin.load_state_dict(torch.load(buffer, weights_only=True))
    torch.testing.assert_close(twin(SEQUENCE), graph(SEQUENCE))
    assert graph.eval() is graph
    assert not graph.training
    with pytest.raises(GraphError, match="evaluation mode only"):
        graph.train()


def test_what_only_training_uses_is_not_in_the_graph() -> None:
    pruned = lnr.prune(randomised(patterns.AuxiliaryHead()), [IMAGE], lnr.Keep(0.5), into="graph")
    assert {name.split(".")[0] for name in pruned.model.state_dict()} == {"a", "norm", "b", "head"}


def test_the_reference_models_lambdas_are_no_obstacle() -> None:
    model, x = models.ReferenceLeNet5().eval(), torch.randn(20, 1, 28, 28)
    pruned = lnr.prune(model, [x], lnr.Keep(0.5), into="graph")
    torch.testing.assert_close(pruned.model(x), functional_call(model, dict(pruned.masked), (x,)))


def test_a_forward_that_holds_the_batch_size_says_so() -> None:
    class FixedBatch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).relu().view(2, 1, 6)).view(2, 3)

    model, x = FixedBatch(), torch.randn(2, 4)
    plan, masked = at_random(model, ((x,), {}))
    graph = pruned_graph(model, plan, masked, ((x,), {}))
    assert graph.batch_size == 2
    torch.testing.assert_close(graph(x), functional_call(model, masked, (x,)))


def test_wrong_ints_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model, call = held.HeldHeads(), ((torch.randn(4, 5, 16),), {})  # type: ignore[var-annotated]
    plan, masked = at_random(model, call)
    monkeypatch.setattr("lnr_prune.collapse.graph_module.counts", lambda *_: iter(()))
    with pytest.raises(VerificationError):
        pruned_graph(model, plan, masked, call)

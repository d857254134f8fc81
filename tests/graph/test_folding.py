"""Computed weights: folded exactly where a copy is pruned; else frozen, with the call that removes them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import prune as masks

import lnr_prune as lnr
from lnr_prune.errors import GraphError, PlanError
from tests.helpers.untouched import Untouched

Change = Callable[[nn.Module], nn.Module]
HALF = lnr.Keep(0.5)
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")


class Doubled(nn.Module):
    """A parametrization of one's own."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Noisy(nn.Module):
    """Another value in every forward pass."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight + 0.01 * torch.randn_like(weight)


def _masked(layer: nn.Module) -> nn.Module:
    masks.l1_unstructured(layer, "weight", 0.3)
    masks.random_unstructured(layer, "weight", 0.2)  # the two become a container
    return layer


def _own(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Doubled())
    parametrize.register_parametrization(layer, "bias", Doubled())
    return layer


def _spectral(layer: nn.Module) -> nn.Module:
    return torch.nn.utils.spectral_norm(layer)


KINDS: dict[str, tuple[Change, str]] = {
    "weight norm, hook": (torch.nn.utils.weight_norm, "WeightNorm"),
    "weight norm": (parametrizations.weight_norm, "WeightNorm"),
    "spectral norm, hook": (_spectral, "SpectralNorm"),
    "spectral norm": (parametrizations.spectral_norm, "SpectralNorm"),
    "orthogonal": (
        lambda layer: layer if isinstance(layer, nn.ConvTranspose1d) else parametrizations.orthogonal(layer),
        "Orthogonal",
    ),
    "masks": (_masked, "a mask of torch.nn.utils.prune"),
    "of one's own": (_own, "Doubled"),
}


def net(change: Change = lambda layer: layer) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv1d(4, 16, 3, padding=1), nn.ConvTranspose1d(16, 12, 4, 2, 1), nn.Conv1d(12, 12, 3, padding=1),
        nn.Conv1d(12, 2, 1),
    ]  # fmt: skip
    return nn.Sequential(*[part for layer in layers for part in (change(layer), nn.ReLU())][:-1]).train()


def trained(change: Change) -> nn.Sequential:
    """After two steps, so that hooks hold what they computed with gradients."""
    torch.manual_seed(0)
    model = net(change)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(torch.randn(8, 4, 20)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


X = torch.randn(32, 4, 20)
PLAIN = [["bias", "weight"]] * 4


def tensors_of(model: nn.Module) -> list[list[str]]:
    return [sorted(dict(model.get_submodule(str(i)).named_parameters())) for i in (0, 2, 4, 6)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_folded_weight_is_exact_and_prunes_as_a_plain_one(kind: str, tmp_path: Path) -> None:
    change, by = KINDS[kind]
    model = trained(change)
    classes, plainly = [type(module) for module in model.modules()], [type(module) for module in net().modules()]
    before = Untouched(model, tmp_path)
    plain = lnr.fold(model)
    with torch.no_grad():
        assert plain(X).equal(model(X))
    assert tensors_of(plain) == PLAIN
    assert [type(module) for module in plain.modules()] == plainly
    assert not any(module._forward_pre_hooks or module._state_dict_hooks for module in plain.modules())
    found, pruned = lnr.inspect(model, X), lnr.prune(model, X, HALF)
    assert [(group.name, group.size) for group in found.groups] == [("0", 16), ("2", 12), ("4", 12)]
    assert dict(found.frozen) == {"6": "output of the model"}
    changed = [str(i) for i in (0, 2, 4, 6) if kind != "orthogonal" or i != 2]
    assert list(found.folded) == changed == list(pruned.report.folded)
    assert found.folded["0"].startswith(f"its weight, computed by {by}, is a plain parameter of the same value")
    assert "folded: its weight, computed by" in " ".join(str(pruned.report).split())
    assert "Folded weights" in pruned.report.section()
    assert "Folded weights" in found.section()
    assert tensors_of(pruned.model) == PLAIN
    before.check()
    new = torch.randn(5, 4, 13)
    expected = torch.func.functional_call(plain, dict(pruned.masked), (new,))
    torch.testing.assert_close(pruned.model(new), expected, rtol=1e-4, atol=1e-5)
    assert [type(module) for module in model.modules()] == classes
    for name in changed:  # and they are computed as before
        values = [p for p in model.get_submodule(name).parameters() if p.dim() > 1]
        with torch.no_grad():
            old = model(X).clone()
            values[-1][0].mul_(3)
            assert not model(X).equal(old)


@pytest.mark.parametrize("kind", KINDS)
def test_files_and_plans_fit_the_model_as_it_was_and_the_folded_one(kind: str, tmp_path: Path) -> None:
    change, path = KINDS[kind][0], tmp_path / "small.safetensors"
    model = trained(change)
    pruned = lnr.prune(model, X, HALF)
    pruned.save(path)
    new = torch.randn(5, 4, 13)
    for into in ("copy", "model"):
        assert lnr.load(path, lnr.fold(net(change)), into=into).eval()(new).equal(pruned.model(new))
    assert lnr.load(path, net(change), example=X).eval()(new).equal(pruned.model(new))
    with pytest.raises(PlanError, match=r"'0.*or lnr.fold\(model\) if its computed weights were folded"):
        lnr.load(path, net(change), into="model")
    other = trained(change)
    cut = lnr.apply_plan(pruned.plan, other, example=X)
    torch.testing.assert_close(cut(new), lnr.apply_plan(pruned.plan, lnr.fold(other), example=X)(new))
    assert lnr.apply_plan(pruned.plan, lnr.fold(other), into="model")(new).equal(cut(new))
    model.load_state_dict(other.state_dict())  # dense checkpoints stay what they are
    again = lnr.prune(model, X, HALF, into="graph")
    plain = lnr.fold(model)
    torch.testing.assert_close(
        again.model(new), torch.func.functional_call(plain, dict(again.masked), (new,)), rtol=1e-4, atol=1e-5
    )


CALLS = {
    "weight norm, hook": r"torch.nn.utils.remove_weight_norm\(model.2, 'weight'\)",
    "weight norm": r"torch.nn.utils.parametrize.remove_parametrizations\(model.2, 'weight'\)",
    "spectral norm, hook": r"torch.nn.utils.remove_spectral_norm\(model.2, 'weight'\)",
    "spectral norm": r"torch.nn.utils.parametrize.remove_parametrizations\(model.2, 'weight'\)",
    "masks": r"torch.nn.utils.prune.remove\(model.2, 'weight'\)",
}


@pytest.mark.parametrize("kind", CALLS)
def test_in_place_they_are_frozen_with_the_call_that_removes_them(kind: str, tmp_path: Path) -> None:
    model = trained(KINDS[kind][0])
    before = Untouched(model, tmp_path)
    message = (
        f"2: its weight is computed in every forward pass by {KINDS[kind][1]}: call {CALLS[kind]}, "
        r"or prune lnr.fold\(model\)"
    )
    with pytest.raises(GraphError, match=message):
        lnr.prune(model, X, HALF, into="model")
    before.check()
    plain = lnr.fold(model)
    assert lnr.prune(plain, X, HALF, into="model").model is plain
    assert dict(lnr.inspect(plain, X).folded) == {}


def test_what_is_not_constant_is_not_folded() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    parametrize.register_parametrization(model[2], "weight", Noisy())
    assert parametrize.is_parametrized(lnr.fold(model)[2])  # type: ignore[index]
    found = lnr.inspect(model, torch.randn(3, 4))
    assert dict(found.folded) == {}
    sentence = "is computed in every forward pass by Noisy: it changes from pass to pass, so it cannot be folded"
    assert sentence in found.frozen["2"]
    assert "remove_parametrizations(model.2, 'weight')" in found.frozen["2"]


def test_a_layer_is_folded_as_a_whole_or_not_at_all() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), _own(nn.Linear(8, 2))).eval()
    parametrize.register_parametrization(model[2], "bias", Noisy())
    assert parametrize.is_parametrized(lnr.fold(model).get_submodule("2"), "weight")


def test_a_recurrent_layer_and_the_model_itself_are_folded() -> None:
    x = torch.randn(3, 5, 4)
    for layer in (nn.LSTM(4, 6), parametrizations.weight_norm(nn.LSTM(4, 6), "weight_hh_l0")):
        layer = torch.nn.utils.weight_norm(layer, "weight_ih_l0").eval()
        plain = lnr.fold(layer)
        assert plain(x)[0].equal(layer(x)[0])
        assert sorted(dict(plain.named_parameters())) == sorted(dict(nn.LSTM(4, 6).named_parameters()))
        with torch.no_grad():
            plain.get_parameter("weight_hh_l0").zero_()  # is the tensor that the forward uses
        assert not plain(x)[0].equal(layer(x)[0])


def test_what_is_shared_frozen_or_of_another_dtype_stays_so() -> None:
    shared = parametrizations.weight_norm(nn.Linear(4, 4)).to(torch.bfloat16)
    shared.get_parameter("parametrizations.weight.original0").requires_grad_(False)
    shared.get_parameter("parametrizations.weight.original1").requires_grad_(False)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    plain = lnr.fold(model)
    weight = plain.get_parameter("0.weight")
    assert plain[0] is plain[2]  # type: ignore[index]
    assert (weight.dtype, weight.requires_grad) == (torch.bfloat16, False)
    assert plain.get_parameter("0.bias").requires_grad
    assert list(dict(plain.named_parameters())) == ["0.weight", "0.bias"]


def test_a_parametrized_buffer_becomes_a_buffer() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    parametrize.register_parametrization(model[1], "running_var", Doubled())
    plain, x = lnr.fold(model), torch.randn(3, 4)
    assert plain(x).equal(model(x))
    assert "1.running_var" in dict(plain.named_buffers())


def test_a_forward_that_closes_over_the_model_is_refused_with_the_call() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 2))
    model.steps = [lambda x: model[0](x)]  # type: ignore[assignment]
    with pytest.raises(GraphError, match=r"close over the original.*remove_parametrizations\(model.0, 'weight'\)"):
        lnr.fold(model)


def test_a_plain_model_is_copied_and_pruned_as_it_is() -> None:
    model = net().eval()
    plain = lnr.fold(model)
    assert plain is not model
    assert repr(plain) == repr(model)
    pruned = lnr.prune(model, X, HALF)
    assert dict(pruned.report.folded) == {}

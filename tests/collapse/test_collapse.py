"""The collapse makes a smaller module of the same kind, whose attributes are true, and can be undone."""

import copy
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lnr_prune as lnr
from lnr_prune.calibration.calls import Call
from lnr_prune.collapse.collapse import collapse, restore_point
from lnr_prune.collapse.masks import masked_weights
from lnr_prune.collapse.plan import Plan, make_plan
from lnr_prune.collapse.trial import shrinkable
from lnr_prune.collapse.verify import Reference, copied
from lnr_prune.errors import GraphError, PlanError, VerificationError
from lnr_prune.graph.groups import ChannelGroup, Consumer, Graph, find_groups
from lnr_prune.graph.module import named_tensors
from tests.helpers.models import FixedView, ReferenceLeNet5, Residual, cnn, mlp, randomised
from tests.helpers.patterns import GroupedUpsampling, TorchAttention


def prune_at_random(model: nn.Module, graph: Graph, seed: int) -> tuple[Plan, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    supports = {}
    for group in graph.groups:
        support = torch.rand(group.size, generator=generator) < 0.6
        support[torch.randint(group.size, (1,), generator=generator)] = True
        supports[group] = support
    return make_plan(supports), masked_weights(supports, named_tensors(model))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("model", "shape"),
    [(mlp(4, 9, 8, 3), (5, 4)), (randomised(cnn()), (3, 2, 12, 12)), (randomised(Residual()), (3, 3, 8, 8))],
)
def test_pruned_equals_masked(model: nn.Module, shape: tuple[int, ...], seed: int) -> None:
    model, x = copy.deepcopy(model).double(), torch.randn(*shape, dtype=torch.float64)
    plan, masked = prune_at_random(model, find_groups(model, (x,), {}), seed)
    expected = torch.func.functional_call(model, masked, (x,))
    collapse(model, plan, masked)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def test_attributes_state_dict_deepcopy_and_save_are_those_of_a_smaller_model() -> None:
    model, x = randomised(Residual()), torch.randn(2, 3, 8, 8)
    model.head.bias.requires_grad_(False)
    stream, side, squeeze = find_groups(model, (x,), {}).groups
    plan = make_plan({stream: torch.arange(8) % 2 == 0, side: torch.arange(4) < 3, squeeze: torch.arange(6) > 3})
    collapse(model, plan)
    assert repr(model.stem) == "Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))"
    assert repr(model.depthwise) == "Conv2d(4, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=4)"
    assert model.norm.num_features == 4
    assert repr(model.squeeze) == "Linear(in_features=7, out_features=2, bias=True)"
    assert (model.head.in_features, model.head.out_features) == (7 * 16, 5)
    assert [p.requires_grad for p in (model.head.weight, model.head.bias)] == [True, False]
    assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in model.parameters())
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    twin = copy.deepcopy(model)
    twin.load_state_dict(torch.load(buffer, weights_only=True))
    torch.testing.assert_close(twin(x), model(x))
    model.train()(x).sum().backward()  # it trains


def test_attributes_of_transposed_convolutions_in_groups() -> None:
    model, x = GroupedUpsampling(), torch.randn(2, 3, 4, 4)
    (group,) = find_groups(model, (x,), {}).groups
    collapse(model, make_plan({group: torch.arange(4) > 0}))
    assert repr(model.up) == "ConvTranspose2d(6, 9, kernel_size=(2, 2), stride=(2, 2), groups=3)"
    assert repr(model.depthwise) == "ConvTranspose2d(9, 9, kernel_size=(3, 3), stride=(1, 1), groups=9, bias=False)"


def test_a_restore_point_undoes_the_collapse_to_the_last_object() -> None:
    model, x = randomised(cnn()), torch.randn(2, 2, 12, 12)
    before, text, output = dict(named_tensors(model)), repr(model), model(x)
    restore = restore_point(model)
    plan, masked = prune_at_random(model, find_groups(model, (x,), {}), 0)
    collapse(model, plan, masked)
    assert repr(model) != text
    restore()
    assert repr(model) == text
    assert all(tensor is before[name] for name, tensor in named_tensors(model).items())
    torch.testing.assert_close(model(x), output, rtol=0, atol=0)


def test_tied_parameters_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2))
    model.append(nn.Identity())
    model[5].register_parameter("twin", nn.Parameter(torch.empty(0)))
    model[5].twin = model[4].weight
    (group,) = (g for g in find_groups(model, (torch.randn(2, 3),), {}).groups if g.name == "2")
    collapse(model, make_plan({group: torch.arange(5) < 2}))
    assert model[5].twin is model[4].weight
    assert model[4].weight.shape == (2, 2)


def test_the_plan_names_nothing_that_stays_whole() -> None:
    (group,) = find_groups(mlp(4, 6, 3), (torch.randn(2, 4),), {}).groups
    assert not make_plan({group: torch.ones(6, dtype=torch.bool)})
    plan = make_plan({group: torch.arange(6) < 2})
    assert plan.channels == {"0": (0, 1)}
    assert plan.indices == {"0.weight": {0: (0, 1)}, "0.bias": {0: (0, 1)}, "2.weight": {1: (0, 1)}}


def test_verification_refuses_a_model_that_differs() -> None:
    model, x = mlp(4, 6, 3), torch.randn(2, 4)
    reference = Reference(model, {}, ((x,), {}))
    reference.check(copy.deepcopy(model))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter("2.bias").add_(1e-5)  # beyond float64 rounding
    with pytest.raises(VerificationError, match="differs from the masked one by"):
        reference.check(other)
    with pytest.raises(VerificationError, match="shapes"):
        reference.check(mlp(4, 6, 2))
    with pytest.raises(VerificationError, match="does not run"):
        reference.check(mlp(5, 6, 3))


def test_verification_falls_back_to_the_models_own_dtype() -> None:
    class Insists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.fc(x) @ torch.ones(2, 2)  # float32 only
            return y, y.argmax(-1)

    model = Insists()
    reference = Reference(model, {}, ((torch.randn(2, 4),), {}))
    assert not reference.wide
    reference.check(copy.deepcopy(model))
    with torch.no_grad():
        model.fc.weight.neg_()
    with pytest.raises(VerificationError, match="differs"):
        reference.check(model)


def test_groups_whose_sizes_the_forward_holds_are_left_out_with_the_reason() -> None:
    model = FixedView()
    example: Call = ((torch.randn(2, 1, 8, 8),), {})
    text = repr(model)
    groups, refused = shrinkable(model, find_groups(model, *example).groups, example)
    assert [group.name for group in groups] == ["conv1"]
    assert list(refused) == ["conv2"]
    assert "fixed in the model's forward" in refused["conv2"]
    assert repr(model) == text


def test_the_trial_finds_a_wrong_group_that_real_weights_would_hide() -> None:
    class Gated(nn.Module):
        """A gate of zero hides that the second use of the hidden channels is not known."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.gate = nn.Linear(4, 6), nn.Linear(6, 2), nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(h) + self.gate * h.sum(-1, keepdim=True)

    model = Gated()
    example: Call = ((torch.randn(2, 4),), {})
    group = ChannelGroup(
        "a",
        6,
        ("a",),
        (Consumer("b", "b.weight", "b.bias", "linear", torch.arange(6)),),
        {("a.weight", 0): torch.arange(6), ("a.bias", 0): torch.arange(6), ("b.weight", 1): torch.arange(6)},
        (("a.weight", 0),),
    )
    assert shrinkable(model, (group,), example)[0] == ()
    assert find_groups(model, *example).groups == ()


def test_a_copy_that_runs_on_the_originals_layers_is_refused() -> None:
    example: Call = ((torch.randn(2, 1, 28, 28),), {})
    with pytest.raises(GraphError, match=r"deep copy of ReferenceLeNet5.*conv1.*into='model'"):
        copied(ReferenceLeNet5(), example)
    assert isinstance(copied(mlp(28, 3), example), nn.Sequential)


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model = mlp(4, 2)
    model.stream = (i for i in range(3))  # type: ignore[assignment]
    with pytest.raises(GraphError, match=r"cannot be deep-copied.*into='model'"):
        copied(model, ((torch.randn(2, 4),), {}))


def test_two_plans_in_one_take_out_what_both_do(tmp_path: Path) -> None:
    model, data = TorchAttention().eval(), [torch.randn(32, 5, 12)]
    first = lnr.prune(model, data, lnr.Keep(0.7))
    second = lnr.prune(first.model, data, lnr.Keep(0.5))
    both = replace(second, plan=first.plan.then(second.plan))
    assert {name: len(kept) for name, kept in both.plan.channels.items()} == {
        group.name: group.kept for group in second.report.groups
    }
    both.save(tmp_path / "twice.safetensors")
    again = lnr.load(tmp_path / "twice.safetensors", TorchAttention().eval())
    torch.testing.assert_close(again(data[0]), second.model(data[0]), atol=1e-5, rtol=1e-5)
    with pytest.raises(PlanError, match="not made for what the first one leaves"):
        first.plan.then(first.plan)
    with pytest.raises(PlanError, match=r"first\.plan\.then\(second\.plan\)"):
        lnr.apply_plan(second.plan, model)


def test_memory_format_and_attributes_of_parameters_stay() -> None:
    layers = [nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1)]
    model: Any = nn.Sequential(*layers)
    model.to(memory_format=torch.channels_last)
    model[0].weight.lr_mult = 0.1
    model[4].bias.lr_mult = 0.2
    model[2].weight.requires_grad_(False)
    handle = model[2].register_forward_hook(lambda *_: None)
    images = torch.randn(8, 3, 8, 8).to(memory_format=torch.channels_last)
    pruned: Any = lnr.prune(model, [images] * 2, lnr.Keep(0.5)).model
    for layer in (0, 2, 4):
        assert pruned[layer].weight.is_contiguous(memory_format=torch.channels_last)
        assert not pruned[layer].weight.is_contiguous() or layer == 4
    assert (pruned[0].weight.lr_mult, pruned[4].bias.lr_mult) == (0.1, 0.2)
    assert [parameter.requires_grad for parameter in pruned.parameters()] == [True, True, False, True, True, True]
    assert len(pruned[2]._forward_hooks) == 1
    handle.remove()


class Bad(nn.Module):
    """Outputs where some values are NaN or Inf: in every model, or in those whose scale is too large."""

    def __init__(self, value: float, scale: float = 1.0, everywhere: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.value, self.everywhere = value, everywhere

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.scale
        y = torch.where(y.abs() > 1e6, float("inf"), y)
        y = torch.full_like(y, self.value) if self.everywhere else y
        return torch.cat([y, torch.full_like(y[:, :1], self.value)], 1)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_values_that_are_meant_to_be_infinite_are_equal_to_themselves_only(value: float) -> None:
    call: Call = ((torch.ones(2, 3),), {})
    reference = Reference(Bad(value), {"scale": torch.tensor(2.0)}, call)
    reference.check(Bad(value, 2.0))
    for other in (Bad(0.0, 2.0), Bad(-value if value == value else float("inf"), 2.0), Bad(value, 2.1)):
        with pytest.raises(VerificationError):
            reference.check(other)
    overflow = Reference(Bad(value), {"scale": torch.tensor(1e9)}, call)  # infinite, which the model itself is not
    with pytest.raises(VerificationError):
        overflow.check(Bad(value, 1e9))
    nothing = Reference(Bad(value, everywhere=True), {}, call)
    with pytest.raises(VerificationError, match="all NaN or Inf"):
        nothing.check(Bad(value, everywhere=True))

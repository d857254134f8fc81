"""The front door, end to end on small nets."""

import copy
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lnr_prune as lnr
from lnr_prune.collapse.verify import Reference
from lnr_prune.errors import CalibrationError, GraphError, VerificationError
from lnr_prune.graph.module import named_tensors
from lnr_prune.settings import Amount
from tests.helpers.faults import failing
from tests.helpers.models import FixedView, Functional, ReferenceLeNet5, Residual, cnn, mlp, randomised
from tests.helpers.untouched import Untouched

IMAGES = torch.randn(40, 2, 12, 12, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def distance(pruned: nn.Module, model: nn.Module, x: Tensor) -> float:
    return float((pruned(x) - model(x)).square().sum() / model(x).square().sum())


def rows(pruned: lnr.Pruned) -> dict[str, tuple[int, int]]:
    return {group.name: (group.size, group.kept) for group in pruned.report.groups}


def equals_masked(model: nn.Module, pruned: lnr.Pruned, x: Tensor) -> bool:
    with torch.no_grad():
        masked = torch.func.functional_call(model, dict(pruned.masked), (x,))
        return torch.allclose(pruned.model(x), masked, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("refit", [lnr.Refit(), None])
@pytest.mark.parametrize("selector", ["group_lasso", "norm", "random"])
def test_every_selector_and_form_gives_the_masked_model(selector: str, refit: lnr.Refit | None, bias: bool) -> None:
    model = randomised(cnn())
    pruned = lnr.prune(model, IMAGES.split(16), lnr.Keep(0.5), selector=selector, refit=refit, bias=bias)
    assert rows(pruned) == {"0": (6, 3), "3": (8, 4), "6": (6, 3), "10": (10, 5)}
    assert type(pruned.model) is nn.Sequential
    assert equals_masked(model, pruned, IMAGES)
    assert pruned.report.params_after == sum(p.numel() for p in pruned.model.parameters())
    assert pruned.report.macs_after < pruned.report.macs_before


def test_without_bias_the_consumers_keep_theirs() -> None:
    model = mlp(8, 16, 4)
    pruned = lnr.prune(model, torch.randn(100, 8), lnr.Keep(6), bias=False)
    assert torch.equal(pruned.model.get_parameter("2.bias"), model.get_parameter("2.bias"))
    pruned = lnr.prune(model, torch.randn(100, 8), lnr.Keep(6))
    assert not torch.equal(pruned.model.get_parameter("2.bias"), model.get_parameter("2.bias"))


@pytest.mark.parametrize(
    ("amount", "expected"),
    [
        (lnr.Keep(5), {"0": 5, "2": 5}),
        (lnr.Keep(0.25), {"0": 3, "2": 2}),
        (lnr.Keep(0.01), {"0": 1, "2": 1}),
        (lnr.Keep(100), {"0": 12, "2": 8}),
        (lnr.Keep(1.0), {"0": 12, "2": 8}),
        (lnr.Keep({"0": 4}), {"0": 4, "2": 8}),
        (lnr.Keep({"2": np.int64(3), "0": np.float64(0.5)}), {"0": 6, "2": 3}),
        (lnr.Penalty(0.0), {"0": 12, "2": 8}),
        (lnr.Penalty(ratio={"2": 1.0}), {"0": 12, "2": 1}),
        (lnr.Penalty({"2": 1e9}), {"0": 12, "2": 1}),
    ],
)
def test_how_much_is_kept(amount: Amount, expected: dict[str, int]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))
    pruned = lnr.prune(model, torch.randn(200, 6), amount)
    assert {name: kept for name, (_, kept) in rows(pruned).items()} == expected
    assert equals_masked(model, pruned, torch.randn(9, 6))


@pytest.mark.parametrize("amount", [lnr.Keep({}), lnr.Penalty({}), lnr.Penalty(ratio={})])
def test_a_mapping_that_names_no_layer_leaves_all_whole_and_solves_nothing(amount: Amount) -> None:
    pruned = lnr.prune(mlp(8, 16, 4), torch.randn(100, 8), amount)
    assert [(row.kept, row.gap) for row in pruned.report.groups] == [(16, None)]
    assert not pruned.plan


def test_a_matrix_that_comes_out_zero_keeps_one_channel_and_says_so() -> None:
    pruned = lnr.prune(mlp(8, 16, 4), torch.randn(100, 8), lnr.Penalty(ratio=1.5))
    (row,) = pruned.report.groups
    assert (row.kept, row.gap) == (1, 0.0)
    assert "keeps nothing: one channel was kept" in row.note


@pytest.mark.parametrize(
    ("settings", "values", "error", "message"),
    [
        (lnr.Penalty, {}, ValueError, "one of lam and ratio, got neither"),
        (lnr.Penalty, {"lam": 0.1, "ratio": 0.1}, ValueError, "got lam and ratio"),
        (lnr.Keep, {"channels": 0}, ValueError, "at least one channel"),
        (lnr.Keep, {"channels": -2}, ValueError, "at least one channel"),
        (lnr.Keep, {"channels": 0.0}, ValueError, r"fraction in \(0, 1\], got 0.0"),
        (lnr.Keep, {"channels": 1.5}, ValueError, r"fraction in \(0, 1\]"),
        (lnr.Keep, {"channels": float("nan")}, ValueError, r"fraction in \(0, 1\]"),
        (lnr.Keep, {"channels": True}, TypeError, "must be a number"),
        (lnr.Keep, {"channels": "half"}, TypeError, "must be a number"),
        (lnr.Keep, {"channels": {"0": 0}}, ValueError, "at least one channel"),
        (lnr.Penalty, {"lam": -1.0}, ValueError, "lam must be finite and >= 0"),
        (lnr.Penalty, {"lam": float("inf")}, ValueError, "lam must be finite and >= 0"),
        (lnr.Penalty, {"ratio": float("nan")}, ValueError, "ratio must be finite"),
        (lnr.Lasso, {"solver": "sgd"}, ValueError, "known solvers: proximal_gradient, fista"),
        (lnr.Refit, {"ridge": -1.0}, ValueError, "ridge must be >= 0"),
    ],
)
def test_settings_check_themselves(
    settings: Callable[..., object], values: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        settings(**values)


@pytest.mark.parametrize(
    ("amount", "selector", "message"),
    [
        (lnr.Keep({"nobody": 3}), "norm", "'nobody', which is not a prunable producer; known: 0"),
        (lnr.Keep({"2": 3}), "norm", r"'2', which is not a prunable producer \(output of the model\)"),
        (lnr.Keep(3), "best", "known: group_lasso, backward"),
        (lnr.Penalty(1.0), "norm", "a penalty needs the group lasso"),
    ],
)
def test_bad_arguments(amount: Amount, selector: str, message: str) -> None:
    model = mlp(4, 6, 3)
    with pytest.raises(ValueError, match=message):
        lnr.prune(model, torch.randn(20, 4), amount, selector=selector)
    assert repr(model) == repr(mlp(4, 6, 3))


@pytest.mark.parametrize("into", ["copy", "model"])
def test_the_users_model_is_untouched_unless_asked_and_whenever_something_fails(
    into: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = randomised(cnn()).train()
    model[3].eval()
    modes, before = [module.training for module in model.modules()], Untouched(model, tmp_path)
    with pytest.raises(CalibrationError):
        lnr.prune(model, [IMAGES, IMAGES * float("nan")], lnr.Keep(0.5), into=into)
    before.check()

    with monkeypatch.context() as patch:  # the trial passes, the final check does not
        fails = failing(2, VerificationError("broken on purpose"), Reference.check)
        patch.setattr("lnr_prune.collapse.verify.Reference.check", fails)
        with pytest.raises(VerificationError, match="on purpose"):
            lnr.prune(model, [IMAGES], lnr.Keep(0.5), into=into)
    before.check()
    pruned = lnr.prune(model, [IMAGES], lnr.Keep(0.5), into=into)
    assert (pruned.model is model) == (into == "model")
    assert [module.training for module in pruned.model.modules()] == modes
    if into == "copy":
        before.check()


def test_the_reference_model_is_refused_as_a_copy_and_pruned_in_place() -> None:
    model, x = ReferenceLeNet5().eval(), torch.randn(30, 1, 28, 28)
    with pytest.raises(GraphError, match="into='model'"):
        lnr.prune(model, [x], lnr.Keep(0.5))
    original = {name: tensor.detach() for name, tensor in named_tensors(model).items()}
    pruned = lnr.prune(model, [(x, torch.zeros(30))], lnr.Keep(0.5), into="model")
    assert pruned.model is model
    assert [tuple(p.shape) for name, p in model.named_parameters() if "weight" in name] == [
        (3, 1, 5, 5),
        (5, 3, 5, 5),
        (10, 80),
        (10, 10),
    ]
    fresh = ReferenceLeNet5().eval()
    fresh.load_state_dict({**original, **pruned.masked})
    torch.testing.assert_close(model(x), fresh(x), rtol=1e-4, atol=1e-5)


def test_a_forward_that_names_positions_is_found_out() -> None:
    class Rotates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).relu()
            return self.c(self.b(torch.cat([x[:, 3:], x[:, :3]], 1)).relu())

    pruned = lnr.prune(Rotates(), torch.randn(30, 4), lnr.Keep(0.5))
    assert rows(pruned) == {"b": (8, 4)}
    assert "positions are fixed" in pruned.report.frozen["a"]


def test_a_forward_with_fixed_sizes_is_pruned_where_it_can_be() -> None:
    pruned = lnr.prune(FixedView(), torch.randn(30, 1, 8, 8), lnr.Keep(0.5))
    assert rows(pruned) == {"conv1": (6, 3)}
    assert "fixed in the model's forward" in pruned.report.frozen["conv2"]
    with pytest.raises(ValueError, match=r"'conv2', which is not a prunable producer \(its sizes or positions"):
        lnr.prune(FixedView(), torch.randn(30, 1, 8, 8), lnr.Keep({"conv2": 2}))


@pytest.mark.parametrize(("model", "shape"), [(Residual(), (30, 3, 8, 8)), (Functional(), (30, 5))])
def test_joint_groups_concatenations_and_shared_weights(model: nn.Module, shape: tuple[int, ...]) -> None:
    model, x = randomised(model), torch.randn(*shape)
    pruned = lnr.prune(model, [x], lnr.Keep(0.5))
    assert all(group.kept == group.size // 2 for group in pruned.report.groups)
    assert equals_masked(model, pruned, x)


@settings(max_examples=20)
@given(
    sizes=st.lists(st.integers(2, 9), min_size=3, max_size=5),
    keep=st.floats(0.1, 1.0),
    seed=st.integers(0, 1000),
    norm=st.booleans(),
)
def test_pruned_equals_masked_on_random_networks(sizes: list[int], keep: float, seed: int, norm: bool) -> None:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for c, k in pairwise(sizes):
        layers += [nn.Conv2d(c, k, 3, padding=1), nn.BatchNorm2d(k) if norm else nn.Identity(), nn.LeakyReLU()]
    model = randomised(nn.Sequential(*layers, nn.Flatten(), nn.Linear(sizes[-1] * 16, 3)).double(), seed)
    x = torch.randn(8, sizes[0], 4, 4, dtype=torch.float64)
    pruned = lnr.prune(model, [x], lnr.Keep(keep), refit=lnr.Refit(ridge=1e-8))
    masked = torch.func.functional_call(model, dict(pruned.masked), (x,))
    torch.testing.assert_close(pruned.model(x), masked, rtol=1e-9, atol=1e-9)


def test_channels_that_are_combinations_of_others_cost_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)).double()
    with torch.no_grad():
        for rows in (model.get_parameter("0.weight"), model.get_parameter("0.bias")):
            rows.copy_(torch.cat([rows[:3], 2 * rows[:3], 0.5 * rows[:3]]))  # copies, up to scale
    x = torch.randn(100, 6, dtype=torch.float64)
    pruned = lnr.prune(model, [x], lnr.Keep(3))
    torch.testing.assert_close(pruned.model(x), model(x), rtol=1e-8, atol=1e-8)


def test_later_layers_aim_from_the_pruned_inputs_at_the_original_outputs() -> None:
    torch.manual_seed(0)
    model, x = mlp(8, 20, 20, 4).double(), torch.randn(300, 8, dtype=torch.float64)
    model.requires_grad_(False)
    found = lnr.prune(model, [x], lnr.Keep({"0": 4}), refit=lnr.Refit(ridge=0.0), logits=False)  # all of the last
    pruned = cast(nn.Sequential, found.model)
    hidden = torch.cat([pruned[:4](x), torch.ones(300, 1)], 1)
    residual = model(x) - pruned(x)
    assert float(residual.abs().mean()) > 1e-3
    torch.testing.assert_close(hidden.T @ residual / 300, torch.zeros(21, 4, dtype=torch.float64), atol=1e-9, rtol=0)


def test_refit_and_lasso_lower_the_error() -> None:
    torch.manual_seed(0)
    model, x = mlp(8, 40, 6), torch.randn(500, 8)

    def error(**options: Any) -> float:
        return distance(lnr.prune(model, [x], lnr.Keep(10), **options).model, model, x)

    assert error() < error(selector="random") < error(selector="random", refit=None)
    assert error() < error(refit=None)
    assert error() < error(bias=False)


def test_the_report_tells_the_error_of_each_group() -> None:
    torch.manual_seed(0)
    model, x = mlp(8, 40, 6).double(), torch.randn(500, 8, dtype=torch.float64)
    pruned = lnr.prune(model, [x], lnr.Keep(10))
    (row,) = pruned.report.groups
    assert row.error == pytest.approx(distance(pruned.model, model, x), rel=1e-9)
    assert row.gap is not None
    assert row.gap <= 1e-6
    assert "40" in str(pruned.report)
    assert "frozen: output of the model" in str(pruned.report)


def test_nothing_to_prune_is_an_error_that_says_why() -> None:
    with pytest.raises(GraphError, match=r"Sequential has no channel that can be pruned\. 0: output of the model"):
        lnr.prune(mlp(4, 3), torch.randn(10, 4), lnr.Keep(0.5))
    with pytest.raises(GraphError, match="It has no layers"):
        lnr.prune(nn.ReLU(), torch.randn(10, 4), lnr.Keep(0.5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model, x = mlp(8, 16, 4).to(dtype), torch.randn(100, 8).to(dtype)
    pruned = lnr.prune(model, [x], lnr.Keep(8))
    assert {p.dtype for p in pruned.model.parameters()} == {dtype}


@pytest.mark.parametrize("seed", [0, 1])
def test_deterministic_for_a_fixed_seed(seed: int) -> None:
    model = randomised(cnn())
    first, second = (lnr.prune(model, [IMAGES], lnr.Keep(0.5), selector=lnr.Random(seed)) for _ in range(2))
    assert first.plan == second.plan
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_pruning_again_and_training_go_on() -> None:
    model = randomised(cnn())
    once = lnr.prune(model, [IMAGES], lnr.Keep(0.5))
    twice = lnr.prune(once.model, [IMAGES], lnr.Keep(0.5))
    assert {kept for _, kept in rows(twice).values()} == {2}
    twice.model.train()(IMAGES).sum().backward()
    assert all(p.grad is not None for p in twice.model.parameters())
    copy.deepcopy(twice.model)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    model = randomised(cnn()).cuda()
    pruned = lnr.prune(model, IMAGES.split(16), lnr.Keep(0.5))
    assert {p.device.type for p in pruned.model.parameters()} == {"cuda"}


def test_too_few_samples_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp(8, 40, 6, 3)
    report = lnr.prune(model, torch.randn(20, 8), lnr.Keep({"0": 20})).report
    assert [(layer.name, layer.samples, layer.columns) for layer in report.layers] == [("2", 20, 21), ("4", 20, 7)]
    assert "('2' has 41 columns; there are 20 calibration samples)" in caplog.text


class Cache:
    """Keys and values of earlier positions, as language models return them; no type that torch.export knows."""

    def __init__(self) -> None:
        self.entries: list[Tensor] = []

    def update(self, key: Tensor) -> None:
        self.entries.append(key)

    def get_seq_length(self) -> int:
        return self.entries[0].shape[1] if self.entries else 0


class Caching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        cache, hidden = Cache(), self.up(x).relu()
        cache.update(hidden)
        return {"logits": self.down(hidden), "cache": cache}


@pytest.mark.parametrize("into", ["copy", "graph"])
def test_a_cache_among_the_outputs_shrinks_along(into: str) -> None:
    model = Caching()
    pruned = lnr.prune(model, torch.randn(50, 4), lnr.Keep(0.5), into=into)
    assert rows(pruned) == {"up": (8, 4)}
    cache = pruned.model(torch.randn(3, 4))["cache"]
    assert cache is None if into == "graph" else cache.entries[0].shape == (3, 4)
    assert "forward" not in vars(model)


def test_logits_are_fitted_to_their_probabilities() -> None:
    torch.manual_seed(0)
    model, x = mlp(6, 24, 24, 4).requires_grad_(False), 2 * torch.randn(1200, 6)
    model.get_parameter("4.weight").mul_(8)
    plain, fitted = (lnr.prune(model, x[:900].split(150), lnr.Keep(0.25), logits=logits) for logits in (False, True))

    def kl(pruned: nn.Module) -> float:
        p, q = model(x[900:]).log_softmax(1), pruned(x[900:]).log_softmax(1)
        return float((p.exp() * (p - q)).sum(1).mean())

    assert kl(fitted.model) < 0.98 * kl(plain.model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parameters_are_stored_densely_and_alone(dtype: torch.dtype) -> None:
    pruned = lnr.prune(mlp(6, 24, 1).to(dtype), [torch.randn(60, 6, dtype=dtype)], lnr.Keep(0.5))
    for parameter in pruned.model.parameters():
        assert parameter.stride() == torch.empty(parameter.shape).stride()
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()

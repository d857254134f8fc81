"""The sequential refit: every layer on the pruned network's inputs, aimed at the original one's outputs."""

import threading
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lnr_prune.calibration import rows
from lnr_prune.calibration.adapter import AdaptedLayer
from lnr_prune.calibration.data import calibrate
from lnr_prune.calibration.gather import gather
from lnr_prune.calibration.moments import SecondMoments
from lnr_prune.errors import CalibrationError
from lnr_prune.graph.groups import find_groups
from lnr_prune.refit.fit import STEP
from lnr_prune.refit.refit import Refit, refit
from lnr_prune.refit.regression import RIDGES, ridge_regression, softmax_regression
from tests.helpers.layers import layers_of
from tests.helpers.models import Functional, cnn, mlp, randomised


def moments(x: Tensor, y: Tensor) -> SecondMoments:
    return SecondMoments.of(torch.cat([x, torch.ones(len(x), 1)], 1), y)


def net(seed: int = 0) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(seed)
    return mlp(5, 12, 12, 3).double().requires_grad_(False), torch.randn(200, 5, dtype=torch.float64)


def first_four(d: int) -> Tensor:
    return torch.arange(d + 1).lt(4) | torch.arange(d + 1).eq(d)  # and the bias


@pytest.mark.parametrize("batches", [1, 2, 5])
def test_one_sweep_does_what_one_pass_a_layer_would(batches: int) -> None:
    model, x = net()
    done = refit(
        model,
        layers_of(model, x),
        {"2.weight": first_four(12)},
        calibrate(model, x.split(200 // batches)),
        settings=Refit(ridge=1e-3),
    )
    assert set(done.weights) == {"2.weight", "2.bias", "4.weight", "4.bias"}  # layer 0 has nothing to undo
    hidden, inputs = model[:2](x), {"2": model[:2](x)}
    for name, target in (("2", model[:3](x)), ("4", model(x))):
        layer, x_ = model.get_submodule(name), inputs[name]
        W = torch.cat([layer.weight, layer.bias[:, None]], 1)  # type: ignore[list-item,index]
        kept = first_four(12) if name == "2" else torch.ones(13, dtype=torch.bool)
        aim = moments(x_, target)
        M, fit = ridge_regression(aim, None, kept, torch.arange(13) < 12, W, 1e-3)
        if name == "2":  # a ReLU follows
            got = x_ @ M[:, :12].T + M[:, 12]
            aim = moments(x_, got + STEP * (target.relu() - got.relu()))
            M, _ = ridge_regression(aim, None, kept, torch.arange(13) < 12, W, 1e-3)
        torch.testing.assert_close(done.weights[f"{name}.weight"], M[:, :12])
        torch.testing.assert_close(done.weights[f"{name}.bias"], M[:, 12])
        assert done.layers[f"{name}.weight"].error == pytest.approx(fit.error)
        inputs["4"] = torch.relu(hidden @ M[:, :12].T + M[:, 12])


def test_the_batches_do_not_matter_where_only_some_rows_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "ROWS_PER_COLUMN", 2)
    model, x = randomised(cnn()).double().requires_grad_(False), torch.randn(24, 2, 12, 12, dtype=torch.float64)
    kept = {"3.weight": torch.arange(37) % 3 > 0}
    whole, split = (
        refit(model, layers_of(model, x[:2]), kept, calibrate(model, data), settings=Refit(ridge=1e-3))
        for data in ([x], x.split(7))
    )
    assert whole.layers["3.weight"].samples < 24 * 42
    for name, weight in whole.weights.items():
        torch.testing.assert_close(weight, split.weights[name], rtol=1e-6, atol=1e-8)


def test_nothing_dropped_changes_nothing() -> None:
    model, x = net()
    assert refit(model, layers_of(model, x), {}, calibrate(model, [x])).weights == {}


def test_the_model_runs_and_is_left_in_its_own_mode() -> None:
    model, x = net()
    model.train()
    model[0].eval()
    refit(model, layers_of(model, x), {"2.weight": first_four(12)}, calibrate(model, [x]))
    assert [module.training for module in model] == [False, True, True, True, True]


def test_a_repeated_layer_is_fitted_to_all_its_calls() -> None:
    model, x = Functional().double().requires_grad_(False), torch.randn(60, 5, dtype=torch.float64)
    graph = find_groups(model, (x,), {})
    assert graph.repeated == {"w1", "w2"}
    sums = SecondMoments.of(torch.rand(60, 8), torch.empty(60, 0))
    kept = torch.arange(8) < 5
    done = refit(
        model,
        layers_of(model, x),
        {"w2": kept},
        calibrate(model, [x]),
        repeated={"w2": sums},
        settings=Refit(ridge=1e-9),
    )
    expected, _ = ridge_regression(sums.through(model.w2), None, kept, torch.ones(8, dtype=torch.bool), model.w2, 1e-9)
    torch.testing.assert_close(done.weights["w2"], expected)


def test_batches_may_take_different_paths() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).relu()
            return self.c(self.b(h).relu() if len(x) == 30 else h)

    model, x = Branching().requires_grad_(False), torch.randn(50, 4)
    layers = layers_of(model, x[:30])
    done = refit(
        model, layers, {"b.weight": first_four(6)}, calibrate(model, [x[:20], x[20:]]), settings=Refit(ridge=0.0)
    )
    assert set(done.weights) == {"b.weight", "b.bias", "c.weight", "c.bias"}
    assert done.layers["b.weight"].samples == 30
    assert done.layers["c.weight"].samples == 50


def test_failures_are_raised_and_leave_no_thread_behind() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if float(x.sum()) > 1e6:
                raise RuntimeError("broken on purpose")
            return x

    model, x = net()
    model = nn.Sequential(*model, Fails(), nn.Linear(3, 2, dtype=torch.float64)).eval()
    layers = layers_of(model[:5], x[:2])
    poisoned = x.clone()
    poisoned[120] = 1e9
    threads = threading.active_count()
    with pytest.raises(CalibrationError, match="broken on purpose"):
        refit(model, layers, {"2.weight": first_four(12)}, calibrate(model, poisoned.split(50)))
    assert threading.active_count() == threads
    poisoned[120] = float("nan")
    with pytest.raises(CalibrationError, match="layer '0' are not finite"):
        refit(model, layers, {"2.weight": first_four(12)}, calibrate(model, poisoned.split(50)))
    assert threading.active_count() == threads
    with pytest.raises(CalibrationError, match="no batch"):
        refit(model, layers, {}, calibrate(model, []))


def test_the_ridge_is_chosen_on_samples_that_were_held_out() -> None:
    torch.manual_seed(0)
    W = torch.randn(2, 30, dtype=torch.float64)
    x = torch.randn(4000, 30, dtype=torch.float64) @ torch.diag(torch.logspace(0, -2, 30, dtype=torch.float64))
    kept, everything = torch.arange(30) < 20, torch.ones(30, dtype=torch.bool)
    y = (x @ W.T).relu()  # not linear: few samples over-fit
    few, more, unseen = (SecondMoments.of(x[part], y[part]) for part in (slice(0, 24), slice(24, 32), slice(32, None)))
    M, fit = ridge_regression(few, more, kept, everything, W)
    plain, _ = ridge_regression(few, more, kept, everything, W, 1e-12)
    assert fit.ridge > 1e-6
    assert unseen.error(M) < unseen.error(plain)
    assert fit.samples == 32


@given(seed=st.integers(0, 999), ridge=st.sampled_from([0.0, 1e-9, 1e-3, 1.0]), dead=st.booleans())
def test_ridge_regression_meets_its_optimality_condition(seed: int, ridge: float, dead: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(40, k, generator=generator, dtype=torch.float64) for k in (6, 3))
    W = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    if dead:
        x[:, 2] = 0
    kept, ridged = torch.tensor([1, 0, 1, 1, 0, 1, 1]).bool(), torch.arange(7) < 6
    M, fit = ridge_regression(moments(x, y), None, kept, ridged, W, ridge)
    sums = moments(x, y)
    R, B = sums.xx / 40, sums.yx / 40
    centred = R - R[:, 6:] @ R[6:] / R[6, 6]
    scale = centred.diagonal()[kept & ridged].mean()
    gradient = M @ R - B + fit.ridge * scale * (M - W) * ridged
    torch.testing.assert_close(gradient[:, kept], torch.zeros(3, 5, dtype=torch.float64), atol=1e-9, rtol=0)
    assert not bool(M[:, ~kept].any())
    assert fit.ridge == ridge or (dead and ridge == 0)


def _classes() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs, logits that are not linear in them, a fourth of the rows held out, and the least-squares fit."""
    torch.manual_seed(0)
    x = torch.cat([torch.randn(800, 5, dtype=torch.float64), torch.ones(800, 1, dtype=torch.float64)], 1)
    y = 2 * (x @ torch.randn(6, 4, dtype=torch.float64)).relu()
    return x, y, torch.arange(800) % 4 == 3, torch.linalg.lstsq(x, y).solution.T


def _kl(x: Tensor, y: Tensor, M: Tensor) -> Tensor:
    return nn.functional.kl_div((x @ M.T).log_softmax(1), y.log_softmax(1), reduction="batchmean", log_target=True)


def test_softmax_regression_is_optimal_at_a_ridge_of_the_list() -> None:
    x, y, held, M0 = _classes()
    M = softmax_regression(x, y, held, M0, torch.linalg.lstsq(x[~held], y[~held]).solution.T)
    assert M is not None
    found = M.clone().requires_grad_()
    _kl(x, y, found).backward()
    assert found.grad is not None
    residuals = [found.grad + 2 * ridge * x.square().mean() * (M - M0) for ridge in RIDGES]
    assert min(float(residual.abs().max()) for residual in residuals) < 1e-4
    assert _kl(x, y, M) < 0.95 * _kl(x, y, M0)


def test_softmax_regression_changes_nothing_that_it_cannot_judge() -> None:
    x, y, held, M0 = _classes()
    assert softmax_regression(x, y, torch.zeros_like(held), M0, M0) is None


def test_outputs_that_are_no_logits_are_not_fitted_as_if_they_were() -> None:
    x, _, held, _ = _classes()
    y = 3 * x @ torch.randn(6, 4, dtype=x.dtype) + 2 * (x[:, :1] * x[:, 1:2])  # shifts of all classes: softmax is blind
    y = y + torch.randn(800, 4, dtype=x.dtype) * x[:, 2:3]
    M, start = (torch.linalg.lstsq(x[rows], y[rows]).solution.T for rows in (held | ~held, ~held))
    found = softmax_regression(x, y, held, M, start, squares=True)
    errors = [float(((y - x @ m.T)[held]).square().sum()) for m in (M, M if found is None else found)]
    assert errors[1] <= 1.02 * errors[0]


@pytest.mark.parametrize("bias", [True, False])
def test_products_of_shifted_images_change_nothing(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(2, 6, 3, padding=1, bias=bias), nn.BatchNorm2d(6), nn.ReLU()]
    convolutions += [nn.Conv2d(6, 4, 3, padding=1, bias=bias), nn.BatchNorm2d(4), nn.ReLU()]
    model = randomised(nn.Sequential(*convolutions)).double().requires_grad_(False)
    x = torch.randn(20, 2, 6, 6, dtype=torch.float64)
    layers, data = layers_of(model, x[:2]), calibrate(model, x.split(8))
    kept = {"3.weight": torch.cat([(torch.arange(6) < 4).repeat_interleave(9), torch.ones(int(bias)).bool()])}
    used = list[int]()
    faster = AdaptedLayer.second_moments

    def watched(pair: AdaptedLayer, calls: Any) -> Tensor | None:
        found = faster(pair, calls)
        used.append(0 if found is None else len(found))
        return found

    monkeypatch.setattr(AdaptedLayer, "second_moments", watched)
    one = refit(model, layers, kept, data)
    sums = gather(model, layers, data)
    assert 54 + bias in used
    monkeypatch.setattr(AdaptedLayer, "second_moments", lambda *_: None)
    other = refit(model, layers, kept, data)
    for name, weight in other.weights.items():
        torch.testing.assert_close(one.weights[name], weight, rtol=1e-6, atol=1e-9)
    for name, of in gather(model, layers, data).items():
        torch.testing.assert_close(sums[name].whole.xx, of.whole.xx)
        assert sums[name].whole.count == of.whole.count

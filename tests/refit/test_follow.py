"""What becomes of a layer's output, and that the refit aims at it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lnr_prune as lnr
from lnr_prune.calibration.data import calibrate
from lnr_prune.calibration.functions.pause import Manner, Pause, Replay, begin, go_on
from lnr_prune.calibration.watch import LayerCall, Watch
from lnr_prune.graph.module import evaluating, named_tensors
from lnr_prune.refit import fit
from lnr_prune.refit.downstream import Downstream, Steps, added_at
from lnr_prune.refit.follow import wiring_of
from lnr_prune.refit.refit import Refit, refit
from tests.helpers.layers import layers_of
from tests.helpers.models import randomised

After = Callable[[Any, Tensor, Tensor], Tensor]


class Through(nn.Module):
    """A layer, and what a function makes of its output y and of an earlier h."""

    def __init__(self, after: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.before, self.layer, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.norm, self.late, self.gain = nn.BatchNorm1d(6), nn.Linear(4, 6), nn.Parameter(torch.rand(6) + 0.5)
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x).sigmoid()
        self.x = x
        return self.last(self.after(self, self.layer(h), h))


def seen(after: After) -> tuple[Downstream, Through, Tensor]:
    torch.manual_seed(0)
    model, x = randomised(Through(after)).eval().requires_grad_(False), torch.randn(7, 4)
    return wiring_of(model, ["layer.weight"], ((x,), {})).layers["layer.weight"], model, x


def waiting(model: nn.Module, x: Tensor) -> Pause:
    """A pass that has just called the layer."""

    def see(name: str, layer: LayerCall) -> None:
        replay.halt_after()

    start = begin(((x,), {}))
    replay = Replay(start)
    with evaluating(model):
        pause, _ = go_on(model, start, replay, Manner(), around=[Watch(named_tensors(model), ["layer.weight"], see)])
    assert pause is not None
    return pause


AFTER: dict[str, tuple[After, int, int, Callable[[Tensor], Tensor] | None]] = {
    "nothing": (lambda m, y, h: y, 0, 0, None),
    "relu": (lambda m, y, h: y.relu(), 0, 0, F.relu),
    "relu in place": (lambda m, y, h: F.relu_(y), 0, 0, F.relu),
    "gelu": (lambda m, y, h: F.gelu(y), 0, 0, F.gelu),
    "batch norm": (lambda m, y, h: m.norm(y), 1, 0, None),
    "gain and offset": (lambda m, y, h: 2 * (y * m.gain) - 1, 3, 0, None),
    "dropout": (lambda m, y, h: F.dropout(y, training=False).tanh(), 1, 0, torch.tanh),
    "shortcut": (lambda m, y, h: y + h, 1, 1, None),
    "shortcut in place, twice": (lambda m, y, h: m.norm(y).add_(h).sub_(h, alpha=3).relu_(), 3, 2, F.relu),
    "shortcut made on the way": (lambda m, y, h: (m.norm(y) + F.pad(h[:, 2:], (1, 1))).relu(), 2, 1, F.relu),
    "layer after the layer": (lambda m, y, h: (2 * y + m.late(m.x)).relu(), 1, 0, None),
    "used twice": (lambda m, y, h: y * y.sigmoid(), 0, 0, None),
    "gate": (lambda m, y, h: y * h, 0, 0, None),
    "softmax": (lambda m, y, h: y.softmax(1), 0, 0, None),
    "layer norm": (lambda m, y, h: F.layer_norm(y, (6,)), 0, 0, None),
    "steep": (lambda m, y, h: torch.sin(5 * y), 1, 0, None),
    "concatenation": (lambda m, y, h: torch.cat([y, h], 1)[:, ::2], 0, 0, None),
}


@pytest.mark.parametrize("name", AFTER)
def test_a_layers_output_is_followed_as_far_as_it_is_not_mixed(name: str) -> None:
    after, steps, shortcuts, activation = AFTER[name]
    downstream, _, _ = seen(after)
    assert len(downstream.affine.functions) == steps
    assert len([shortcut for shortcut in downstream.affine.shortcuts if shortcut]) == shortcuts
    assert (downstream.activation is None) == (activation is None)
    if activation is not None and downstream.activation is not None:
        z = torch.randn(7, 6)
        torch.testing.assert_close(downstream.activation(z), activation(z))
    assert downstream.mean == ("norm.running_mean" if name in ("batch norm", *BATCH_NORM_FIRST) else None)


BATCH_NORM_FIRST = ("shortcut in place, twice", "shortcut made on the way")


@pytest.mark.parametrize("name", [name for name, (_, steps, _, _) in AFTER.items() if steps])
def test_the_affine_part_is_what_the_model_does(name: str) -> None:
    after = AFTER[name][0]
    downstream, model, x = seen(after)
    x = torch.randn(11, 4)  # another number of samples than the one recorded
    recorded = wiring_of(model, ["layer.weight"], ((x[:2],), {}))
    downstream, h = recorded.layers["layer.weight"], model.before(x).sigmoid()
    y, other = model.layer(h), torch.randn(11, 6)
    added, _ = added_at(recorded, "layer.weight", waiting(model, x), y)
    assert added is not None
    z = downstream.affine(y.clone(), added)
    if name not in ("layer after the layer", "steep"):
        torch.testing.assert_close(
            z if downstream.activation is None else downstream.activation(z), after(model, y.clone(), h)
        )
    nothing = [torch.zeros_like(s) for s in added]
    alpha = downstream.affine(torch.ones_like(y), nothing) - downstream.affine(torch.zeros_like(y), nothing)
    torch.testing.assert_close(z - downstream.affine(other, added), alpha * (y - other))


def test_a_forward_that_takes_another_path_is_not_followed() -> None:
    downstream, model, x = seen(lambda m, y, h: y + (h if len(y) < 9 else -h))
    wiring = wiring_of(model, ["layer.weight"], ((x,), {}))
    y = torch.zeros(7, 6)
    assert added_at(wiring, "layer.weight", waiting(model, x), y)[0] is not None
    other = replace(wiring, functions=(torch.relu, *wiring.functions[1:]))
    assert added_at(other, "layer.weight", waiting(model, x), y)[0] is None
    assert downstream.affine.added({}, x) is None


def test_a_shortcut_of_parameters_alone_is_known_at_the_recorded_size() -> None:
    downstream, model, x = seen(lambda m, y, h: y + m.gain.expand(len(y), 6))
    added = downstream.affine.added({}, model.layer(model.before(x)))
    torch.testing.assert_close(added, [model.gain.expand(7, 6)])
    assert downstream.affine.added({}, torch.zeros(11, 6)) is None


def test_a_layer_that_runs_twice_is_not_followed() -> None:
    assert seen(lambda m, y, h: m.layer(y).relu())[0].affine.functions == ()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d, e, f = self.layers
        s = a(x)
        s = s + c(b(s).tanh())
        return f(s + e(d(s).tanh()))


def test_a_later_block_undoes_the_error_of_the_shortcut(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Residual().double().requires_grad_(False), torch.randn(400, 6, dtype=torch.float64)
    kept = {"layers.2.weight": torch.arange(7) % 6 > 2}

    def error() -> float:
        weights = refit(
            model, layers_of(model, x[:2]), kept, calibrate(model, x.split(100)), settings=Refit(ridge=1e-9)
        ).weights
        reached: list[Tensor] = []
        model.layers[5].register_forward_pre_hook(lambda module, inputs: reached.append(inputs[0]))
        model(x)
        torch.func.functional_call(model, dict(weights), (x,))
        return float((reached[0] - reached[1]).square().mean())

    corrected = error()
    monkeypatch.setattr(Steps, "added", lambda *_: None)
    assert corrected < 0.5 * error()


def test_what_an_activation_lets_through_is_what_is_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 8), nn.ReLU()).double().requires_grad_(False)
    x = torch.randn(3000, 6, dtype=torch.float64)
    kept = {"2.weight": torch.arange(21) > 14}

    prolonged = fit.STEP

    def error(step: float) -> float:
        monkeypatch.setattr(fit, "STEP", step)
        weights = refit(
            model, layers_of(model, x[:2]), kept, calibrate(model, x.split(500)), settings=Refit(ridge=1e-9)
        ).weights
        return float((torch.func.functional_call(model, dict(weights), (x,)) - model(x)).square().mean())

    assert error(1.0) < 0.97 * error(0.0)
    assert error(prolonged) < error(1.0)


@pytest.mark.parametrize("bias", [True, False])
def test_a_running_mean_takes_up_the_intercept(bias: bool) -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()
    model = randomised(nn.Sequential(*layers).double()).eval().requires_grad_(False)
    model.get_parameter("0.weight")[2:4] = 0  # two channels that are constant
    model.get_parameter("0.bias")[2:4] = 0.7
    x = torch.randn(40, 3, 8, 8, dtype=torch.float64)
    kept = {"2.weight": ~torch.isin(torch.arange(54) // 9, torch.tensor([2, 3]))}
    done = refit(
        model, layers_of(model, x[:2]), kept, calibrate(model, x.split(10)), bias=bias, settings=Refit(ridge=1e-9)
    )
    assert ("3.running_mean" in done.weights) == bias
    z = torch.func.functional_call(model, dict(done.weights), (x,))
    exact = torch.allclose(z, model(x), atol=1e-6)
    assert exact == bias


def test_a_row_that_nothing_comes_of_stays() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU())
    model = randomised(model.double()).eval().requires_grad_(False)
    model.get_parameter("3.weight")[2] = 0
    x, kept = torch.randn(300, 5, dtype=torch.float64), torch.arange(12) > 4
    done = refit(model, layers_of(model, x[:2]), {"2.weight": kept}, calibrate(model, [x]), settings=Refit(ridge=1e-9))
    M, W = done.weights["2.weight"], model.get_parameter("2.weight")
    torch.testing.assert_close(M[2], W[2] * kept)
    assert not torch.isclose(M, W * kept)[[0, 1, 3, 4, 5]][:, kept].any()
    assert done.layers["2.weight"].error < 0.5


@pytest.mark.parametrize("bias", [True, False])
def test_a_bias_that_stays_is_scaled_too(bias: bool) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)]
    model = nn.Sequential(*layers).double().eval().requires_grad_(False)
    tensors = named_tensors(model)
    tensors["2.bias"].fill_(2.0)
    tensors["3.running_var"].fill_(9.0)
    for name in ("0.weight", "0.bias"):
        tensors[name][3:] = 2 * tensors[name][:3]  # so that the first three are all that there is
    x = torch.randn(400, 4, dtype=torch.float64)
    pruned = lnr.prune(model, [x], lnr.Keep({"0": 3}), run=lnr.Run(progress=False), bias=bias)
    torch.testing.assert_close(pruned.model(x), model(x))

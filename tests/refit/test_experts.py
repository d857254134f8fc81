"""Experts are pruned exactly, and each is refitted to the rows that reach it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import lnr_prune as lnr
from lnr_prune.calibration.adapter import adapters
from lnr_prune.collapse.masks import filled_up
from lnr_prune.graph.groups import find_groups
from lnr_prune.testing import check_adapter
from tests.helpers import experts, forms


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mixture(form: str) -> Any:
    torch.manual_seed(0)
    return experts.Mixture(form).eval()


@torch.no_grad()
def error(pruned: Any, model: nn.Module, x: Tensor) -> float:
    """Relative squared error of the outputs; the pruned model must equal the masked one."""
    y, expected = pruned.model(x), model(x)
    torch.testing.assert_close(y, functional_call(model, dict(pruned.masked), (x,)), atol=1e-5, rtol=1e-4)
    return float((y - expected).square().mean() / expected.var())


@pytest.mark.parametrize("form", forms.FORMS)
def test_every_form_is_pruned_and_refitted_alike(form: str) -> None:
    found, shape = [], (32, 5, 8)
    for each in (forms.FORMS[form], nn.functional.linear):
        model = forms.TwoLayers(each).eval()
        data, new = [drawn(*shape), drawn(*shape, seed=2)], drawn(*shape, seed=3)
        pruned: Any = lnr.prune(model, data, lnr.Keep(0.5))
        assert pruned.model.w1.shape == (8, 8)
        assert error(pruned, model, new) < error(lnr.prune(model, data, lnr.Keep(0.5), refit=None), model, new)
        found.append(pruned.masked)
    for name, weight in found[1].items():
        torch.testing.assert_close(found[0][name], weight, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("form", experts.FORMS)
def test_experts_are_pruned_exactly_and_refitted(form: str) -> None:
    model, data, new = mixture(form), [drawn(256, 8), drawn(256, 8, seed=2)], drawn(256, 8, seed=3)
    amount = lnr.Keep({"experts.up": 0.5})
    pruned: Any = lnr.prune(model, data, amount)
    assert pruned.model.experts.up_bias.shape == (3, 16)
    assert error(pruned, model, new) < 0.6 * error(lnr.prune(model, data, amount, refit=None), model, new)
    budget = lnr.prune(model, data, lnr.Budget(params=0.7, effort=lnr.Effort(samples=64, refits=1)))
    assert error(budget, model, new) < 1
    assert {layer.name for layer in budget.report.layers} >= {"experts.down[1]"}


def test_an_expert_is_solved_on_its_own_rows() -> None:
    model, x = mixture("picked").double(), drawn(512, 8).double()
    pruned = lnr.prune(model, [x], lnr.Keep({"experts.up": 0.5}), refit=lnr.Refit(ridge=1e-12))
    kept = list(pruned.plan.indices["experts.down"][2])
    mix = model.experts
    with torch.no_grad():
        rows = model.first(x)
        chosen = mix.router(rows).topk(2, -1).indices
        for part in range(3):
            own = rows[(chosen == part).any(-1)]
            h = mix.gated(own @ mix.up[part].T + mix.up_bias[part])
            best = torch.linalg.lstsq(h[:, kept], h @ mix.down[part].T).solution.T
            torch.testing.assert_close(pruned.masked["experts.down"][part][:, kept], best, atol=1e-5, rtol=1e-4)


def test_an_expert_that_no_row_reaches_keeps_its_weights() -> None:
    model = mixture("picked")
    with torch.no_grad():
        model.first.weight.zero_()  # all rows are alike to the router, which never picks one of the experts
    model.experts.router.weight.data[1] = -10 * model.first.bias.detach()
    pruned = lnr.prune(model, [drawn(64, 8)], lnr.Keep({"experts.up": 0.5}))
    kept = list(pruned.plan.indices["experts.down"][2])
    torch.testing.assert_close(pruned.masked["experts.down"][1][:, kept], model.experts.down[1][:, kept])


@pytest.mark.parametrize("form", experts.FORMS)
def test_the_contract_of_adapters_holds_for_experts(form: str) -> None:
    check_adapter(adapters()["columns"], mixture(form), drawn(12, 8))


@pytest.mark.parametrize("form", forms.FORMS)
def test_the_contract_of_adapters_holds_for_every_form(form: str) -> None:
    check_adapter(adapters()["columns"], forms.TwoLayers(forms.FORMS[form]), drawn(12, 8))


def test_multiples_are_filled_up_with_the_greatest() -> None:
    support = torch.tensor([True, False, False, True, False])
    assert filled_up(support, 4, torch.tensor([9.0, 1.0, 5.0, 9.0, 3.0])).tolist() == [True, False, True, True, True]
    assert filled_up(support, 2, torch.zeros(5)).tolist() == support.tolist()
    assert filled_up(support, 8, torch.zeros(5)).all()


@pytest.mark.parametrize("amount", [lnr.Keep({"experts.up": 5}), lnr.Penalty(ratio={"experts.up": 0.3})], ids=str)
def test_kernels_that_take_multiples_get_them(amount: lnr.Keep | lnr.Penalty) -> None:
    model, x = mixture("grouped"), drawn(64, 8)
    (_, group) = find_groups(model, (x,), {}).groups
    assert group.multiple == 4  # 16 bytes of float32
    pruned: Any = lnr.prune(model, [x], amount)
    count = pruned.model.experts.down.shape[1]
    assert count % 4 == 0
    assert 0 < count < 16

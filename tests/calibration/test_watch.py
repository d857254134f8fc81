"""A layer's calls are seen, and its weights swapped, in whichever way the forward writes them."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lnr_prune.calibration.watch import LayerCall, watch
from tests.helpers import experts, forms

Calls = list[tuple[str, LayerCall]]


def seen(model: nn.Module, x: Tensor, names: list[str]) -> Calls:
    calls: Calls = []
    watch(model, ((x,), {}), names, see=lambda name, call: calls.append((name, call)))
    return calls


def swapped(model: nn.Module, x: Tensor, new: Mapping[str, Tensor]) -> Tensor:
    """The output with other weights for the calls."""
    outputs: list[Tensor] = []
    hook = model.register_forward_hook(lambda module, args, output: outputs.append(output))
    watch(model, ((x,), {}), list(new), swap=lambda name, x: {"weight": new[name]})
    hook.remove()
    return outputs[0]


@pytest.mark.parametrize("shape", [(4, 8), (4, 5, 8)])
@pytest.mark.parametrize("form", forms.FORMS)
def test_every_form_is_seen_and_swapped(form: str, shape: tuple[int, ...]) -> None:
    model, x = forms.TwoLayers(forms.FORMS[form]).double(), torch.randn(shape, dtype=torch.float64)
    calls = seen(model, x, ["w1", "w2"])
    assert [name for name, _ in calls] == ["w1", "w2"]
    for name, call in calls:
        weight = getattr(model, name)
        torch.testing.assert_close(call.output, call.input @ weight.T)
        assert call.weight is weight
        bias = torch.arange(len(weight), dtype=torch.float64)
        again = call.again(input=call.input + 1, weight=2 * weight, bias=bias)
        torch.testing.assert_close(again, F.linear(call.input + 1, 2 * weight, bias))
    new = {"w1": torch.randn(16, 8, dtype=torch.float64), "w2": torch.randn(6, 16, dtype=torch.float64)}
    torch.testing.assert_close(swapped(model, x, new), functional_call(model, new, (x,)))


def test_the_bias_of_addmm_by_name() -> None:
    class Named(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return torch.addmm(input=self.bias, mat1=input, mat2=self.weight.T)

    model, x = Named(8, 3), torch.randn(5, 8)
    ((_, call),) = seen(model, x, ["weight"])
    assert call.bias is model.bias
    torch.testing.assert_close(call.again(bias=model.bias + 1), model(x) + 1)


@pytest.mark.parametrize("form", experts.FORMS)
def test_every_expert_sees_the_rows_that_reach_it(form: str) -> None:
    torch.manual_seed(0)
    model, x = experts.Experts(form).double(), torch.randn(40, 8, dtype=torch.float64)
    names = [f"{stack}[{part}]" for stack in ("up", "down") for part in range(3)]
    calls = seen(model, x, names)
    assert sorted(name for name, _ in calls) == sorted(names)
    chosen = model.router(x).topk(2, -1).indices
    for name, call in calls:
        stack, part = name.split("[")[0], int(name[-2])
        weight = getattr(model, stack)[part]
        weight = weight.T if form in ("picked transposed", "grouped") else weight
        torch.testing.assert_close(call.again(), call.output)
        torch.testing.assert_close(call.output, F.linear(call.input, weight, call.bias))
        reach = int((chosen == part).sum()) if form.startswith(("picked", "grouped")) else len(x)
        assert call.input.numel() == reach * weight.shape[1]


@pytest.mark.parametrize("form", experts.FORMS)
def test_the_weights_of_some_experts_are_swapped(form: str) -> None:
    torch.manual_seed(0)
    model, x = experts.Experts(form).double(), torch.randn(40, 8, dtype=torch.float64)
    new = {"up[1]": torch.randn_like(model.up[1]), "down[0]": torch.randn_like(model.down[0])}
    whole = {"up": model.up.detach().clone(), "down": model.down.detach().clone()}
    whole["up"][1], whole["down"][0] = new["up[1]"], new["down[0]"]
    torch.testing.assert_close(swapped(model, x, new), functional_call(model, whole, (x,)))


def test_a_tensor_at_the_place_of_a_freed_view_is_no_view() -> None:
    class Busy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(20):
                _ = self.w.T  # freed at once
                x = x @ torch.eye(4)
            return x @ self.w.T

    assert len(seen(Busy(), torch.randn(3, 4), ["w"])) == 1

"""Inspection tells what is there, what it costs, and leaves the model alone."""

import torch

import lnr_prune as lnr
from lnr_prune.graph.module import named_tensors
from tests.helpers.models import FixedView, Residual, cnn, randomised
from tests.helpers.patterns import Gated, PackedAttention


def test_the_cost_of_a_channel_is_what_leaves_with_it() -> None:
    for model, x in (
        (randomised(cnn()), torch.randn(4, 2, 12, 12)),
        (Gated(), torch.randn(4, 3, 7)),
        (PackedAttention(), torch.randn(4, 5, 12)),
    ):
        for group in lnr.inspect(model, x).groups:
            pruned = lnr.prune(model, [x], lnr.Keep({group.name: group.size - 1}), selector="random", refit=None)
            removed = pruned.report.params_before - pruned.report.params_after
            assert removed == group.parameters
            assert pruned.report.macs_before - pruned.report.macs_after == group.macs


def test_frozen_layers_say_why_and_the_model_is_as_before() -> None:
    model = FixedView()
    before, text = dict(named_tensors(model)), repr(model)
    found = lnr.inspect(model, (torch.randn(2, 1, 8, 8), torch.zeros(2)))
    assert [group.name for group in found.groups] == ["conv1"]
    assert "fixed in the model's forward" in found.frozen["conv2"]
    assert found.frozen["fc"] == "output of the model"
    assert repr(model) == text
    assert all(tensor is before[name] for name, tensor in named_tensors(model).items())


def test_it_prints() -> None:
    found = lnr.inspect(randomised(Residual()), torch.randn(2, 3, 8, 8))
    assert 0.99 < found.reachable < 1  # all but the bias of the last layer
    assert "stem, point, excite" in str(found)
    assert "99.7% of the parameters are in groups" in str(found)


class Widened(torch.nn.Module):
    """Twice as many channels, the new ones without a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = torch.nn.Linear(3, 4), torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x).relu()
        result: torch.Tensor = self.fc(self.b(x) + torch.nn.functional.pad(x, (2, 2)))
        return result


def test_a_layer_that_may_lose_some_of_its_channels_says_why_not_the_others() -> None:
    found = lnr.inspect(Widened(), torch.randn(2, 3))
    assert [(group.producers, group.size) for group in found.groups] == [(("a", "b"), 4)]
    assert found.frozen["b"].startswith("4 of its 8 channels: meets a value that belongs to no known channel in add (")
    assert "a" not in found.frozen

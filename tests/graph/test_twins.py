"""What takes a tensor's place is like it: memory format, class, attributes; and what a forward changes is put back."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lnr_prune.graph.module import in_mode
from lnr_prune.graph.modules.twins import deep_copy, twin


class Marked(nn.Parameter):
    """A parameter that cannot be made without a name."""

    name_: str
    lr_mult: float

    def __new__(cls, data: Tensor, name: str) -> "Marked":
        made: Marked = torch.Tensor._make_subclass(cls, data, True)
        made.name_ = name
        return made


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(4, 6, 3, 3), (4, 6, 1, 1), (4, 1, 3, 3)])
def test_the_memory_format_stays(form: torch.memory_format, shape: tuple[int, ...]) -> None:
    like = torch.randn(shape).to(memory_format=form)
    value = torch.randn(2, *shape[1:])
    made = twin(value, like)
    assert torch.equal(made, value)
    assert made.is_contiguous(memory_format=form)
    assert made.data_ptr() != value.data_ptr()


def test_a_transposed_weight_stays_transposed() -> None:
    made = twin(torch.randn(5, 3), torch.randn(4, 6).T)
    assert made.stride() == (1, 5)


@pytest.mark.parametrize("grad", [True, False])
def test_a_parameter_keeps_its_class_and_its_attributes(grad: bool) -> None:
    like: Any = Marked(torch.randn(4, 3), "first").requires_grad_(grad)
    like.lr_mult = 0.1
    made: Any = twin(torch.randn(2, 3), like)
    assert type(made) is Marked
    assert (made.name_, made.lr_mult, made.requires_grad, made.is_leaf) == ("first", 0.1, grad, True)


def test_a_deep_copy_keeps_what_copy_deepcopy_drops() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[0].weight.lr_mult = 0.1
    model[0].bias = Marked(torch.zeros(3), "bias")
    made: Any = deep_copy(model)
    assert made[0].weight.lr_mult == 0.1
    assert made[0].bias.name_ == "bias"
    assert made[0].weight is made[1].weight
    assert made[0].weight is not model[0].weight
    assert made[0].weight.data_ptr() != model[0].weight.data_ptr()


class Changing(nn.Module):
    """Its forward writes to all that is not a parameter."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(2))
        self.register_buffer("cache", torch.ones(2))
        self.register_buffer("nothing", torch.tensor([1.0, float("nan")]))
        self.seen, self.parts = torch.zeros(2), [torch.zeros(2)]

    def forward(self) -> None:
        self.mean.data.add_(1.0)  # no version counts this
        self.cache = torch.zeros(5)
        self.seen += 1
        self.parts[0] += 1
        self.parts.append(torch.zeros(1))


def test_what_a_forward_changes_is_put_back() -> None:
    model: Any = Changing()
    held = {name: id(buffer) for name, buffer in model.named_buffers()}
    with in_mode(model, False):
        model()
        model()
        assert model.mean[0] == 3
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == held
    assert model.mean.tolist() == model.cache.tolist() == [1, 1]
    assert model.seen.tolist() == model.parts[0].tolist() == [0, 0]
    assert len(model.parts) == 1
    assert model.training

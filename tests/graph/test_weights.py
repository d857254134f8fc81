"""A linear layer is one however it is written, and an expert of a stack is one too."""

import math

import pytest
import torch
from torch import Tensor, nn

from lnr_prune.graph.groups import ChannelGroup, Graph, find_groups
from lnr_prune.graph.weights import contraction, part_name, spelled, tensor_named, whole_name, with_whole_stacks
from tests.helpers import experts, forms


def groups_of(model: nn.Module, x: Tensor) -> Graph:
    return find_groups(model.eval(), (x,), {})


def described(group: ChannelGroup) -> tuple[object, ...]:
    """A group, without what depends on the way its layers are written."""
    consumers = [(c.name, c.weight, c.op, c.dim, c.channels.tolist()) for c in group.consumers]
    return group.name, group.size, consumers, {slot: of.tolist() for slot, of in group.slots.items()}


@pytest.mark.parametrize("shape", [(4, 8), (4, 5, 8)])
@pytest.mark.parametrize("form", forms.FORMS)
def test_every_form_has_the_same_groups(form: str, shape: tuple[int, ...]) -> None:
    found = groups_of(forms.TwoLayers(forms.FORMS[form]), torch.randn(shape))
    (expected,) = groups_of(forms.TwoLayers(nn.functional.linear), torch.randn(shape)).groups
    assert [described(group) for group in found.groups] == [described(expected)]
    assert [layer.weight for layer in found.layers] == ["w1", "w2"]
    assert not found.repeated
    rows = math.prod(shape[:-1])
    assert found.macs == {"w1": rows * 16 * 8, "w2": rows * 6 * 16}
    assert found.flow == (("<input>", "w1"), ("w1", "w2"), ("w2", "<output>"))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(4, 8), (4, 5, 8)])
def test_falcon_has_the_groups_of_a_linear_layer(shape: tuple[int, ...], *, bias: bool) -> None:
    found, expected = (
        groups_of(forms.Residual(layer, bias=bias), torch.randn(shape)) for layer in (forms.FalconLinear, nn.Linear)
    )
    assert [group.name for group in found.groups] == ["a"]
    assert found.groups[0].slots.keys() == expected.groups[0].slots.keys()


@pytest.mark.parametrize("shape", [(4, 8), (4, 5, 8)])
def test_a_weight_that_is_stored_the_other_way_round(shape: tuple[int, ...]) -> None:
    class Stored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w2 = nn.Parameter(torch.randn(8, 32)), nn.Parameter(torch.randn(32, 6))
            self.b = nn.Parameter(torch.randn(32))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x @ self.w1 + self.b) @ self.w2

    (group,) = groups_of(Stored(), torch.randn(shape)).groups
    assert set(group.slots) == {("w1", 1), ("b", 0), ("w2", 0)}
    assert [consumer.dim for consumer in group.consumers] == [0]


def test_tokens_that_a_weight_mixes_are_no_channels() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.tokens = nn.Linear(8, 16), nn.Linear(16, 4), nn.Parameter(torch.randn(5, 5))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.tokens @ self.a(x)))

    (group,) = groups_of(Mixer(), torch.randn(3, 5, 8)).groups
    assert (group.name, group.size) == ("a", 16)


@pytest.mark.parametrize("form", experts.FORMS)
def test_a_channel_of_every_expert_is_a_unit(form: str) -> None:
    found = groups_of(experts.Mixture(form), torch.randn(6, 8))
    stream, hidden = found.groups
    assert (hidden.name, hidden.size) == ("experts.up", 16)
    assert [consumer.weight for consumer in hidden.consumers] == [f"experts.down[{part}]" for part in range(3)]
    slots = {name: of for (name, _), of in hidden.slots.items()}
    assert set(slots) == {"experts.up", "experts.up_bias", "experts.down"}
    assert torch.bincount(slots["experts.up"]).eq(2).all()  # a row of the gate, and one of what it gates
    assert "experts.down[0]" in found.repeated
    assert {consumer.name for consumer in stream.consumers} >= {"experts.up[0]", "experts.up[2]", "experts.router"}
    assert "by their number in topk" in found.frozen["experts.router"]


def test_experts_that_a_forward_leaves_out_are_not_read() -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.stack = nn.Linear(8, 16), nn.Parameter(torch.randn(3, 4, 16))

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) @ self.stack[0].T + self.a(x) @ self.stack[2].T

    (group,) = groups_of(First(), torch.randn(5, 8)).groups
    assert [consumer.weight for consumer in group.consumers] == ["stack[0]", "stack[2]"]


def test_every_other_channel_leaves_with_its_neighbour() -> None:
    class Interleaved(nn.Module):
        def __init__(self, step: int) -> None:
            super().__init__()
            self.a, self.b, self.step = nn.Linear(8, 12), nn.Linear(12 // step, 4), step

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(sum(h[..., k :: self.step].tanh() for k in range(self.step)))

    for step in (2, 3):
        (group,) = groups_of(Interleaved(step), torch.randn(5, 8)).groups
        assert group.slots["a.weight", 0].tolist() == [k // step for k in range(12)]


def test_the_letters_of_an_einsum() -> None:
    assert spelled("...i,oi->...o", (3, 2)) == (["YZi", "oi"], "YZo")
    assert spelled("ij,jk", (2, 2)) is None
    found = contraction("bei,eoi->beo", (3, 3), 1)
    assert found is not None
    assert (found.x, found.y, found.weight) == ((1, 0, 2), (1, 0, 2), (0, 1, 2))
    for other in ("bi,oi->b", "bi,oj->bo", "bi,oi->boi", "bi,ii->bi", "bi,eoi->beo", "abi,oi->ao"):
        ranks = tuple(len(part) for part in other.partition("->")[0].split(","))
        assert contraction(other, (ranks[0], ranks[1]), 1) is None, other


def test_parts_have_names() -> None:
    stack, one = torch.randn(3, 2, 4), torch.randn(2, 4)
    tensors = {"stack": stack, "odd[1]": one}
    assert whole_name(part_name("stack", 2)) == ("stack", 2)
    assert whole_name("stack.weight") == ("stack.weight", None)
    assert torch.equal(tensor_named(tensors, "stack[2]"), stack[2])
    assert tensor_named(tensors, "odd[1]") is one
    whole = with_whole_stacks({"stack[1]": one, "odd[1]": one + 1}, tensors)
    assert torch.equal(whole["stack"], torch.stack([stack[0], one, stack[2]]))
    assert torch.equal(whole["odd[1]"], one + 1)

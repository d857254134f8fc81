"""The graph core finds what can leave together, and freezes what it does not understand."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lnr_prune as lnr
from lnr_prune.errors import GraphError
from lnr_prune.graph.closure import _ragged, close
from lnr_prune.graph.groups import Graph, find_groups
from lnr_prune.graph.owners import Cut, Owners
from tests.helpers.models import FixedView, Functional, ReferenceLeNet5, Residual, cnn, mlp, randomised


def groups_of(model: nn.Module, *shape: int) -> Graph:
    return find_groups(model, (torch.randn(*shape),), {})


def pairs(graph: Graph) -> list[tuple[tuple[str, ...], tuple[str, ...], int]]:
    return [(g.producers, tuple(c.name for c in g.consumers), g.size) for g in graph.groups]


def test_finds_the_three_pairs_of_the_reference_model_without_hints() -> None:
    graph = groups_of(ReferenceLeNet5(), 2, 1, 28, 28)
    assert pairs(graph) == [
        (("conv1",), ("conv2",), 6),
        (("conv2",), ("fc1",), 10),
        (("fc1",), ("fc2",), 20),
    ]
    assert graph.frozen == {"fc2": "output of the model"}


def test_a_flattened_channel_owns_its_whole_map() -> None:
    graph = groups_of(ReferenceLeNet5(), 2, 1, 28, 28)
    assert torch.equal(graph.groups[1].consumers[0].channels, torch.arange(10).repeat_interleave(16))


def test_flattening_after_a_permutation_interleaves_the_channels() -> None:
    class Interleaved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 3, 3), nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv(x).relu().permute(0, 2, 3, 1).flatten(1))

    (group,) = groups_of(Interleaved(), 2, 1, 4, 4).groups
    assert torch.equal(group.consumers[0].channels, torch.arange(3).repeat(4))


def test_batch_norm_entries_leave_with_their_channel() -> None:
    group = groups_of(randomised(cnn().eval()), 2, 2, 12, 12).groups[0]
    assert set(group.slots) == {
        ("0.weight", 0),
        ("1.weight", 0),
        ("1.bias", 0),
        ("1.running_mean", 0),
        ("1.running_var", 0),
        ("3.weight", 1),
    }


def test_residual_sums_couple_and_concatenations_do_not() -> None:
    stream, side, squeeze = groups_of(Residual(), 2, 3, 8, 8).groups
    assert stream.producers == ("stem", "point", "excite")
    assert {c.name for c in stream.consumers} == {"point", "side", "squeeze", "head"}
    assert side.producers == ("side", "excite")
    assert squeeze.producers == ("squeeze",)
    (head,) = (c for c in side.consumers if c.name == "head")
    assert head.channels[: 8 * 16].eq(-1).all()
    assert torch.equal(head.channels[8 * 16 :], torch.arange(4).repeat_interleave(16))


def test_raw_parameters_shared_weights_and_scales() -> None:
    (hidden,) = groups_of(Functional(), 4, 5).groups
    assert hidden.producers == ("w1",)
    assert [c.name for c in hidden.consumers] == ["w2"]
    assert ("scale", 0) in hidden.slots


def test_a_tied_weight_is_one_weight() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model[2].weight = model[0].weight
    graph = groups_of(model, 3, 4)
    # rows and columns of the shared weight are the input, which nobody owns: only the last stays
    assert all("2.weight" not in parameter for group in graph.groups for parameter, _ in group.slots)


class Applies(nn.Module):
    """linear -> an operation -> linear."""

    def __init__(self, operation: nn.Module) -> None:
        super().__init__()
        self.first, self.operation, self.second = nn.Linear(4, 6), operation, nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.operation(self.first(x)))


class Lambda(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.linspace(0, 1, 6)
        forms: dict[str, Callable[[], Tensor]] = {
            "flip": lambda: x.flip(-1),
            "cumsum": lambda: x.cumsum(-1),
            "positions": lambda: x + torch.arange(6),
            "constant": lambda: x * noise,
            "uniform": lambda: x * torch.full((6,), 2.0) + torch.zeros(1, 1).expand(-1, 6),
            "normalise": lambda: F.normalize(x, dim=-1),
            "sort": lambda: x.sort(-1).values,
            "renorm": lambda: x.renorm(2, 0, 1.0),
            "take": lambda: x.take(torch.arange(18)).view(3, 6),
            "matmul": lambda: x @ x.T @ x,
            "slice": lambda: torch.cat([x[:, 1:], x[:, :1]], 1),
            "halves": lambda: torch.cat([x[:, 3:], -x[:, : x.shape[1] // 2]], 1),
            "thirds": lambda: torch.cat(x.split([2, 4], 1)[::-1], 1),
            "uneven": lambda: torch.cat(x.chunk(4, 1), 1) + torch.cat(x.tensor_split(4, 1), 1),
            "select": lambda: x + x.select(1, 2)[:, None],
            "unbind": lambda: torch.stack(x.unbind(1), 1),
            "narrow": lambda: x.narrow(1, 0, 3).repeat(1, 2),
            "write": lambda: x.clone().index_fill_(1, torch.tensor([0]), 0.0),
            "where": lambda: torch.where(torch.arange(6) > 2, x, -x),
            "complex": lambda: torch.view_as_real(torch.complex(x, x)).sum(-1),
        }
        return forms[self.name]()


def test_unknown_operations_are_listed_with_the_line_that_calls_them() -> None:
    graph = groups_of(Applies(Lambda("renorm")), 3, 4)
    assert "no rule for renorm (operation" in graph.frozen["first"]
    assert "test_groups.py" in graph.frozen["first"]


def test_a_value_that_is_the_same_for_all_channels_holds_none() -> None:
    (group,) = groups_of(Applies(Lambda("uniform")), 3, 4).groups
    assert group.size == 6


def test_complex_values_belong_to_the_channels_of_their_parts() -> None:
    (group,) = groups_of(Applies(Lambda("complex")), 3, 4).groups
    assert group.size == 6


def test_parts_in_proportion_need_not_shrink_alike() -> None:
    class Packed(nn.Module):  # four query heads for two of keys and values, in one matrix
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 16), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (part.unflatten(-1, (-1, 2)).transpose(1, 2) for part in self.first(x).split([8, 4, 4], -1))
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
            return self.second(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    (group,) = groups_of(Packed(), 3, 5, 4).groups
    assert group.slots["first.weight", 0].tolist() == [0] * 4 + [1] * 4 + [0, 0, 1, 1] * 2


OF_TWO = torch.tensor([0, 1, 1, 0]).repeat(32)  # both own as much of every two channels, but not the same one


@pytest.mark.parametrize(
    ("units", "size", "left"), [(OF_TWO, 1, 1), (OF_TWO, 2, 2), (OF_TWO, 4, 2), (torch.arange(128), 2, 2)]
)
def test_units_that_own_as_much_of_every_part_stay_apart(units: Tensor, size: int, left: int) -> None:
    """Others are joined with those at the same place in other parts, of which there are many."""
    owners = Owners({"weight": torch.zeros(128, 1)})
    ids = owners.slot("weight", 0)
    for of_unit in (ids[units == unit] for unit in units.unique()):
        owners.couple(of_unit, of_unit[:1].expand_as(of_unit), "to start with")
    owners.cuts.append(Cut(ids, 0, tuple(range(size, 129, size)), "parts"))
    assert len(close(owners)[ids].unique()) == left


@pytest.mark.parametrize(
    "name",
    ["renorm", "take", "positions", "constant", "where"],
)
def test_operations_without_a_rule_freeze_what_they_touch(name: str) -> None:
    graph = groups_of(Applies(Lambda(name)), 3, 4)
    assert graph.groups == ()
    assert graph.frozen["first"] != "output of the model"
    assert "can only be removed together" not in graph.frozen["first"]


def test_data_movement_is_followed_exactly() -> None:
    (group,) = groups_of(Applies(Lambda("flip")), 3, 4).groups
    assert group.consumers[0].channels.tolist() == [5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize(
    "mixing",
    [
        nn.LayerNorm(6),
        nn.Softmax(-1),
        *map(Lambda, ("cumsum", "sort", "write", "normalise", "matmul", "slice")),
    ],
)
def test_channels_that_are_mixed_can_only_leave_together(mixing: nn.Module) -> None:
    graph = groups_of(Applies(mixing), 3, 4)
    assert graph.groups == ()
    assert "operation" in graph.frozen["first"]
    assert "can only be removed together" in graph.frozen["first"]


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("halves", [0, 1, 2, 0, 1, 2]),
        ("narrow", [0, 1, 2, 0, 1, 2]),
        ("thirds", [0, 1, 0, 1, 0, 1]),
        ("uneven", None),
        ("select", None),
        ("unbind", None),
    ],
)
def test_parts_that_the_forward_names_shrink_alike_or_not_at_all(name: str, channels: list[int] | None) -> None:
    graph = groups_of(Applies(Lambda(name)), 3, 4)
    assert [group.slots["first.weight", 0].tolist() for group in graph.groups] == ([channels] if channels else [])


def test_tokens_that_are_mixed_each_are_no_channels() -> None:
    """As in CaiT: a class token and the others have owners of their own, but none of them can leave."""

    class ClassToken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.token, self.norm = nn.Linear(3, 8), nn.Parameter(torch.randn(1, 1, 8)), nn.LayerNorm(8)
            self.b, self.c = nn.Linear(8, 12), nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            tokens = torch.cat([self.token.expand(len(x), -1, -1), self.norm(self.a(x))], 1)
            out: Tensor = self.c(self.b(self.norm(tokens)).relu())
            return out

    assert [(group.name, group.size) for group in groups_of(ClassToken(), 2, 5, 3).groups] == [("b", 12)]


def test_a_group_norm_keeps_its_groups_whole() -> None:
    (group,) = groups_of(Applies(nn.GroupNorm(2, 6)), 3, 4).groups
    assert group.slots["first.weight", 0].tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("form", ["unary", "scalar", "dtype", "reshape", "dropout", "prelu"])
def test_channelwise_operations_pass(form: str) -> None:
    class Passes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.prelu = nn.PReLU()

        def forward(self, x: Tensor) -> Tensor:
            forms: dict[str, Callable[[], Tensor]] = {
                "unary": lambda: F.silu(x).tanh().exp(),
                "scalar": lambda: (x * 2 + 1).clamp(0, 3),
                "dtype": lambda: x.double().float(),
                "reshape": lambda: x.unsqueeze(1).permute(0, 2, 1).squeeze(2).contiguous(),
                "dropout": lambda: F.dropout(x, 0.1, self.training),
                "prelu": lambda: self.prelu(x),
            }
            return forms[form]()

    (group,) = groups_of(Applies(Passes()), 3, 4).groups
    assert group.size == 6


def test_weights_that_are_computed_are_frozen() -> None:
    model = mlp(4, 6, 2)
    nn.utils.parametrizations.weight_norm(model[2])
    assert groups_of(model, 3, 4).groups == ()


def test_units_are_whole_slabs_of_every_activation() -> None:
    class Grid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            grid = self.first(x).unflatten(1, (2, 3))
            return self.second(grid.relu().flatten(1))

    (group,) = groups_of(Grid(), 3, 4).groups
    assert group.slots["first.weight", 0].tolist() == [0, 1, 2, 0, 1, 2]


def test_the_trace_leaves_modes_alone_and_fixed_sizes_are_no_matter_here() -> None:
    model = FixedView().train()
    model.conv1.eval()
    assert len(groups_of(model, 2, 1, 8, 8).groups) == 2
    assert (model.training, model.conv1.training, model.conv2.training) == (True, False, True)


def test_what_cannot_be_traced_is_refused_with_advice() -> None:
    class Untraceable(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if bool(x.sum() > 0) else -x

    with pytest.raises(GraphError, match=r"could not trace Untraceable.*test_groups.py:\d+, `return x if.*torch.where"):
        groups_of(Untraceable(), 2, 3)


def test_closing_a_large_table_takes_no_more_memory_than_the_table() -> None:
    owners = Owners({"mask": torch.zeros(40, 50, 60)})
    owners.value("mask")  # every element owns itself, and none is a whole slab
    owners.couple(owners.elements["mask"][0, 0, 0], owners.elements["mask"][1, 1, 1], "to start with")
    pairs = _ragged(owners.elements["mask"])
    assert sum(edges.shape[1] for edges in pairs) <= 40 * 50 * 60
    assert len(torch.unique(close(owners)[1:])) == 59  # slabs along the longest axis, two of them coupled


class Forked(nn.Module):
    """The first three channels are tied to one layer, the other five to another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.fc = nn.Linear(6, 8), nn.Linear(6, 3), nn.Linear(6, 5), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc((self.a(x) + torch.cat([self.b(x), self.c(x)], -1)).relu())
        return result


def test_a_layer_in_several_groups() -> None:
    torch.manual_seed(0)
    model, x = Forked(), torch.randn(200, 6)
    groups = find_groups(model, (x,), {}).groups
    assert [(group.name, group.producers, group.size) for group in groups] == [
        ("a", ("a", "b"), 3),
        ("c", ("a", "c"), 5),
    ]
    both = lnr.prune(model, x, lnr.Keep(0.4), selector="backward")
    assert [(group.name, group.kept) for group in both.report.groups] == [("a", 1), ("c", 2)]
    assert [len(both.model.get_parameter(f"{name}.weight")) for name in "abc"] == [3, 1, 2]
    of_one = lnr.prune(model, x, lnr.Keep({"c": 2}), selector="backward")
    assert [group.kept for group in of_one.report.groups] == [3, 2]
    of_each = lnr.prune(model, x, lnr.Keep({"a": 1}), selector="backward")
    assert [group.kept for group in of_each.report.groups] == [1, 1]
    for budget in (lnr.Budget(params=0.6), lnr.Budget(params=0.6, grid=lnr.Grid(leave=("b",)))):
        allocated = lnr.prune(model, x, budget, selector="backward").report
        assert allocated.params_after <= 0.6 * allocated.params_before
    with pytest.raises(ValueError, match="leave names every channel group"):
        lnr.prune(model, x, lnr.Budget(params=0.9, grid=lnr.Grid(leave=("a",))))

"""Heads that run in training only: their own channels go too, and the pruned model trains like the masked one."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import lnr_prune as lnr
from lnr_prune.calibration.calls import Call
from lnr_prune.collapse.collapse import collapse
from lnr_prune.collapse.masks import masked_weights, random_weights
from lnr_prune.collapse.plan import make_plan
from lnr_prune.collapse.trial import shrinkable
from lnr_prune.collapse.verify import Reference
from lnr_prune.errors import VerificationError
from lnr_prune.graph.groups import find_groups
from lnr_prune.graph.module import named_tensors
from lnr_prune.runtime.optional import import_torchvision
from tests.helpers.models import randomised

IMAGE = torch.randn(6, 3, 8, 8)


class Deep(nn.Module):
    """A stem, a head, and an auxiliary head of several layers, with a held size, batch norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.body = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3)
        self.width, self.reduce, self.reduced = 36, nn.Conv2d(8, 4, 4), nn.BatchNorm2d(4)
        self.fc1, self.fc2, self.head = nn.Linear(36, 10), nn.Linear(10, 5), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.norm(self.stem(x)).relu()
        y = self.head(self.body(x).relu().mean((2, 3)))
        if not self.training:
            return y
        auxiliary = self.reduced(self.reduce(x)).relu().view(-1, self.width)
        return y, self.fc2(F.dropout(self.fc1(auxiliary).relu(), 0.5, self.training))


def train_step(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Running statistics after a step in training mode."""
    tensors = {name: weights.get(name, tensor).detach().clone() for name, tensor in named_tensors(model).items()}
    functional_call(copy.deepcopy(model).train(), tensors, (IMAGE.double(),))
    return {name: tensor for name, tensor in tensors.items() if "running" in name}


def test_groups_of_the_head_say_that_only_training_reads_them() -> None:
    groups = {group.name: group for group in find_groups(Deep(), (IMAGE,), {}).groups}
    assert {name: group.size for name, group in groups.items()} == {"stem": 8, "body": 6, "reduce": 4, "fc1": 10}
    for name, consumers, training in (("stem", ["body"], ["reduce"]), ("reduce", [], ["fc1"]), ("fc1", [], ["fc2"])):
        assert [consumer.name for consumer in groups[name].consumers] == consumers
        assert [consumer.name for consumer in groups[name].training] == training


@pytest.mark.parametrize("selector", ["group_lasso", "norm", "random"])
def test_pruned_trains_like_the_masked_model(selector: str) -> None:
    model = randomised(Deep()).double()
    pruned = lnr.prune(model, [IMAGE.double()], lnr.Keep(0.5), selector=selector)
    assert pruned.plan.attributes == {"": {"width": 18}}
    assert {row.name: row.kept for row in pruned.report.groups} == {"stem": 4, "body": 3, "reduce": 2, "fc1": 5}
    Reference(model, pruned.masked, ((IMAGE,), {}), training=True).check(pruned.model)
    statistics, masked = train_step(pruned.model, {}), train_step(model, dict(pruned.masked))
    for name, tensor in statistics.items():
        kept = torch.tensor(pruned.plan.indices[name][0])
        torch.testing.assert_close(tensor, masked[name][kept])
    y, auxiliary = pruned.model.train()(IMAGE.double())
    (y.sum() + auxiliary.sum()).backward()


def test_without_data_the_largest_columns_stay_as_they_are() -> None:
    model = randomised(Deep())
    pruned = lnr.prune(model, [IMAGE], lnr.Keep({"fc1": 4}))
    largest = model.fc2.weight.norm(dim=0).topk(4).indices.sort().values
    assert pruned.plan.channels == {"fc1": tuple(largest.tolist())}
    torch.testing.assert_close(pruned.model.get_parameter("fc2.weight"), model.fc2.weight[:, largest])
    torch.testing.assert_close(pruned.model.get_parameter("fc2.bias"), model.fc2.bias)


def test_attention_drops_out_nothing_in_the_comparison() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(5, 12), nn.Linear(12, 7), nn.Linear(7, 2)
            self.attention = nn.MultiheadAttention(12, 3, dropout=0.5, batch_first=True)

        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            y = self.head(self.b(self.a(x)).relu())
            return (y, self.attention(*(3 * [self.a(x)]))[0]) if self.training else y

    model, call = Attends(), ((torch.randn(2, 4, 5),), {})  # type: ignore[var-annotated]
    groups, refused = shrinkable(model, find_groups(model, *call).groups, call)
    assert not refused
    assert {group.name: len(group.training) for group in groups} == {"a": 1, "b": 0, "attention.in_proj_weight": 1}


def test_a_model_that_differs_in_training_only_is_refused() -> None:
    model = randomised(Deep())
    call: Call = ((IMAGE,), {})
    reference, other = Reference(model, {}, call, training=True), copy.deepcopy(model)
    reference.check(other)
    with torch.no_grad():
        other.fc2.bias.add_(1e-4)
    Reference(model, {}, call).check(other)
    with pytest.raises(VerificationError, match="differs"):
        reference.check(other)


def test_groups_that_training_reads_stay_where_the_example_cannot_be_run_in_training() -> None:
    class NeedsLabels(Deep):
        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            if self.training and not torch.compiler.is_exporting():
                raise RuntimeError("labels are needed in training")
            return super().forward(x)

    model = randomised(NeedsLabels())
    groups, refused = shrinkable(model, find_groups(model, (IMAGE,), {}).groups, ((IMAGE,), {}))
    assert [group.name for group in groups] == ["body"]
    assert set(refused) == {"stem", "reduce", "fc1"}
    assert "labels are needed" in refused["stem"]


def test_googlenets_auxiliary_heads() -> None:
    model = import_torchvision().models.googlenet(weights=None, init_weights=False).eval()
    call: Call = ((torch.randn(2, 3, 64, 64),), {})
    groups, refused = shrinkable(model, find_groups(model, *call).groups, call)
    assert not refused
    reached = {slot[0] for group in groups for slot in group.slots}
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert sum(size for name, size in sizes.items() if name in reached) > 0.999 * sum(sizes.values())
    supports = {group: torch.arange(group.size) % 3 > 0 for group in groups}
    weights = random_weights(model)
    masked = {**weights, **masked_weights(supports, weights)}
    reference = Reference(model, masked, call, training=True)
    collapse(model, make_plan(supports), masked)
    reference.check(model)

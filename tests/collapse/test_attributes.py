"""Ints that submodules hold change with the channels that they count: the right ones, and nothing that others share."""

import json
from enum import Enum
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lnr_prune as lnr
from lnr_prune.calibration.calls import Call
from lnr_prune.calibration.outputs import outputs_of
from lnr_prune.collapse.attributes import assign, ints
from lnr_prune.collapse.collapse import collapse, restore_point
from lnr_prune.collapse.masks import masked_weights, random_weights
from lnr_prune.collapse.plan import Plan, make_plan
from lnr_prune.collapse.trial import shrinkable
from lnr_prune.collapse.verify import Reference
from lnr_prune.graph.groups import ChannelGroup, find_groups
from lnr_prune.graph.module import named_tensors
from tests.helpers import held, models, patterns

TOKENS = torch.randn(4, 5, 12)


def prune_first_channels(
    model: nn.Module, groups: tuple[ChannelGroup, ...], call: Call, dropped: int = 1
) -> tuple[Plan, Reference]:
    supports = {group: torch.arange(group.size) >= dropped for group in groups}
    masked = masked_weights(supports, named_tensors(model))
    reference, plan = Reference(model, masked, call), make_plan(supports)
    collapse(model, plan, masked)
    return plan, reference


class Kind(Enum):
    TWO = 2


class Pair(NamedTuple):
    first: int
    second: str


def heads_of(model: nn.Module) -> list[int]:
    return [value for module in model.modules() for path, value in ints(module) if path == "settings.heads"]


def test_heads_and_widths_shrink_and_what_is_equal_by_coincidence_stays() -> None:
    model = held.HeldHeads()
    call: Call = ((torch.randn(2, 5, 16),), {})
    before = dict(vars(model))
    groups, refused = shrinkable(model, find_groups(model, *call).groups, call)
    assert not refused
    assert vars(model) == before
    plan, reference = prune_first_channels(model, groups, call)
    assert plan.attributes == {"": {"num_heads": 3, "attn_dim": 12, "qkv_dim": 36}}
    assert json.loads(json.dumps(plan.attributes)) == plan.attributes
    assert (model.num_heads, model.attn_dim, model.head_dim, model.unused) == (3, 12, 4, 4)
    reference.check(model)


def test_a_restore_point_undoes_attributes_too() -> None:
    model = held.HeldBySettings(SimpleNamespace(heads=4, width=12))
    call: Call = ((TOKENS,), {})
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    groups, _ = shrinkable(model, find_groups(model, *call).groups, call)
    restore = restore_point(model)
    prune_first_channels(model, groups, call)
    assert heads_of(model) == [4, 3, 3]
    restore()
    assert {name: vars(module) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("kind", [held.Settings, SimpleNamespace])
@pytest.mark.parametrize("into", ["copy", "model"])
def test_settings_that_submodules_share_are_never_written_to(kind: Any, into: str) -> None:
    settings = kind(heads=4, width=12)
    model = held.HeldBySettings(settings).eval()
    pruned = lnr.prune(model, [TOKENS], lnr.Keep({"blocks.1.qkv": 2}), into=into).model
    assert (settings.heads, settings.width) == (4, 12)
    assert heads_of(pruned) == [4, 4, 2]
    assert into == "copy" or pruned.settings is settings


def test_entries_of_tuples_and_ints_of_outer_modules() -> None:
    model = held.HeldByParts().eval()
    pruned = lnr.prune(model, [torch.randn(50, 4)], lnr.Keep(0.5))
    assert not any(isinstance(why, str) and "fixed" in why for why in pruned.report.frozen.values())
    assert isinstance(pruned.model, held.HeldByParts)
    assert (pruned.model.sizes, pruned.model.outer) == ((4, 2), 3)
    assert (model.sizes, model.outer) == ((8, 4), 6)


def test_sizes_that_no_attribute_changes_are_refused_and_the_rest_goes() -> None:
    call: Call = ((TOKENS,), {})
    model: nn.Module = held.DerivedSizes()
    groups, refused = shrinkable(model, find_groups(model, *call).groups, call)
    assert [group.name for group in groups] == ["up"]
    assert list(refused) == ["qkv"]
    assert "into='graph'" in refused["qkv"]
    model = held.MergedHeads()
    groups, refused = shrinkable(model, find_groups(model, *call).groups, call)
    assert not groups
    assert "q" in refused


def test_one_reference_and_one_trial_where_no_forward_holds_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    original = outputs_of

    def counted(model: nn.Module, *args: Any, **kwargs: Any) -> list[Tensor]:
        runs.append(model)
        return original(model, *args, **kwargs)

    monkeypatch.setattr("lnr_prune.collapse.verify.outputs_of", counted)
    cases = [(models.cnn(), torch.randn(2, 2, 12, 12)), (patterns.PackedAttention(), TOKENS)]
    for more, (model, x) in enumerate(cases):  # three more for an int that only counts: the heads
        runs.clear()
        shrinkable(model, find_groups(model, (x,), {}).groups, ((x,), {}))
        assert len(runs) == 2 + 3 * more


def test_equal_blocks_share_their_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = []
    original = Reference.check

    def counted(self: Reference, pruned: nn.Module) -> None:
        checks.append(pruned)
        original(self, pruned)

    monkeypatch.setattr(Reference, "check", counted)
    counts = []
    for blocks in (2, 5):
        checks.clear()
        model = nn.Sequential(*(held.HeldHeads() for _ in range(blocks)))
        call: Call = ((torch.randn(2, 5, 16),), {})
        groups, _ = shrinkable(model, find_groups(model, *call).groups, call)
        assert len(groups) == blocks
        counts.append(len(checks))
    assert counts[0] == counts[1] < 20


def test_where_the_ints_are_found_and_how_they_are_written() -> None:
    module = nn.Identity()
    shared = {
        "count": 3, "flag": True, "sizes": [4, (5, 6)], "pair": Pair(7, "x"), "settings": held.Settings(8, 9), "f": len,
    }  # fmt: skip
    vars(module).update(shared, kind=Kind.TWO, code=json)  # neither of the two has copies
    assert dict(ints(module)) == {
        "count": 3, "sizes.0": 4, "sizes.1.0": 5, "sizes.1.1": 6, "pair.0": 7, "settings.heads": 8,
        "settings.width": 9,
    }  # fmt: skip
    for path, _ in list(ints(module)):
        assign(module, path, 1)
    written = {name: vars(module)[name] for name in shared}
    assert written == {
        "count": 1, "flag": True, "sizes": [1, (1, 1)], "pair": Pair(1, "x"), "settings": held.Settings(1, 1), "f": len,
    }  # fmt: skip
    assert (shared["sizes"], shared["pair"], shared["settings"]) == (
        [4, (5, 6)],
        Pair(7, "x"),
        held.Settings(8, 9),
    )


def test_attention_weights_that_nobody_uses_freeze_nothing() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(12, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]  # averages its weights over the heads, in vain

    model, call = Attends(), ((TOKENS,), {})  # type: ignore[var-annotated]
    groups, refused = shrinkable(model, find_groups(model, *call).groups, call)
    assert [(group.name, group.size) for group in groups] == [("attention.in_proj_weight", 3)]
    assert not refused
    _, reference = prune_first_channels(model, groups, call)
    reference.check(model)


class FrozenNorm(nn.Module):
    """A batch norm written by hand, with ints that no operation needs, and one that is equal by coincidence."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.num_features, self.normalized_shape, self.period = channels, (channels,), channels
        self.weight: Tensor
        self.bias: Tensor
        self.register_buffer("weight", torch.rand(channels) + 0.5)
        self.register_buffer("bias", torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class Projection(nn.Module):
    """A square linear layer written by hand."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.in_features = self.out_features = self.features = size
        self.weight = nn.Parameter(torch.randn(size, size))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


class Scaled(nn.Module):
    """Its outputs depend on the int that counts its channels."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.dim, self.scale = size, nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale / self.dim**0.5


def test_ints_that_only_count_channels_follow_them(tmp_path: Any) -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, 24, 3), FrozenNorm(24), nn.ReLU(), nn.Conv2d(24, 16, 3)).eval()
    images = torch.randn(8, 3, 8, 8)
    pruned = lnr.prune(model, [images], lnr.Keep(0.5))
    pruned.save(tmp_path / "m.safetensors")
    for made in (pruned.model, lnr.load(tmp_path / "m.safetensors", model), lnr.apply_plan(pruned.plan, model)):
        norm: Any = made.get_submodule("1")
        assert (norm.num_features, norm.normalized_shape, norm.period, len(norm.weight)) == (12, (12,), 24, 12)
    assert (model[1].num_features, model[1].normalized_shape) == (24, (24,))


def test_what_is_read_and_what_is_made_are_counted_apart() -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), Projection(16), nn.ReLU(), nn.Linear(16, 2))
    layer: Any = lnr.prune(model, [torch.randn(64, 4)], lnr.Keep({"0": 10, "2": 6})).model.get_submodule("2")
    assert (layer.in_features, layer.out_features, tuple(layer.weight.shape)) == (10, 6, (6, 10))
    assert layer.features == 16  # of what?


def test_an_int_that_the_outputs_depend_on_stays() -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), Scaled(16), FrozenLast(16), nn.Linear(16, 2))
    pruned: Any = lnr.prune(model, [torch.randn(64, 4)], lnr.Keep(0.5)).model
    assert (pruned[2].dim, len(pruned[2].scale)) == (16, 8)


class Grouped(nn.Module):
    """Two query heads read one key and value; the forward asks for the size of a head only, as transformers' do."""

    def __init__(self, scaled: bool = False) -> None:
        super().__init__()
        self.num_heads, self.n_kv_heads, self.head_dim, self.all_head_size, self.patience = 4, 2, 3, 12, 4
        self.q, self.k, self.v, self.o = nn.Linear(8, 12), nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(12, 8)
        self.scaled = scaled

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
        y = y.transpose(1, 2).flatten(2)
        return self.o(y / self.num_heads if self.scaled else y)


@pytest.mark.parametrize("scaled", [False, True])
def test_heads_are_counted_around_their_projections_unless_the_outputs_depend_on_it(scaled: bool) -> None:
    attention: Any = lnr.prune(Grouped(scaled), [torch.randn(32, 5, 8)], lnr.Keep({"q": 1})).model
    numbers = {name: getattr(attention, name) for name in ("num_heads", "n_kv_heads", "all_head_size")}
    assert attention.q.out_features == 6
    expected = {"num_heads": 2, "n_kv_heads": 1, "all_head_size": 6}
    assert numbers == ({"num_heads": 4, "n_kv_heads": 2, "all_head_size": 12} if scaled else expected)
    assert (attention.head_dim, attention.patience) == (3, 4)


class FrozenLast(nn.Module):
    """A scale with an int that only counts."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.weight = size, nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class TwoHeads(nn.Module):
    """Two heads of two channels: ``width`` is no count of heads, though a table has as many columns."""

    index: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.width, self.qkv, self.out = 2, nn.Linear(4, 12), nn.Linear(4, 4)
        self.table = nn.Parameter(torch.randn(7, 2))
        self.register_buffer("index", torch.arange(4)[:, None] - torch.arange(4) + 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.width)).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index].permute(2, 0, 1)
        y: Tensor = self.out(F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2))
        return y


def test_an_int_that_only_looks_like_a_count_stays_though_one_trial_is_blind(monkeypatch: pytest.MonkeyPatch) -> None:
    def blind(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
        weights = random_weights(model, seed)
        return weights if seed else {**weights, "out.weight": torch.zeros(4, 4)}

    monkeypatch.setattr("lnr_prune.collapse.trial.random_weights", blind)
    model = TwoHeads().eval()
    call: Call = (torch.randn(3, 4, 4),), {}
    ((group,), _) = shrinkable(model, find_groups(model, *call).groups, call)
    assert group.attributes == {}

"""Patterns of modern networks: the right groups, and pruned == masked in float64."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import lnr_prune as lnr
from lnr_prune.calibration.visible.attention import FewerHeads, visible_attention
from lnr_prune.calibration.watch import watch
from lnr_prune.collapse.collapse import collapse
from lnr_prune.collapse.masks import masked_weights
from lnr_prune.collapse.plan import make_plan
from lnr_prune.collapse.trial import shrinkable
from lnr_prune.collapse.verify import Reference
from lnr_prune.graph.groups import ChannelGroup, find_groups
from lnr_prune.graph.module import named_tensors
from tests.helpers import families, patterns
from tests.helpers.models import randomised

Sizes = dict[str, int]
IMAGE, SEQUENCE = torch.randn(4, 3, 8, 8), torch.randn(4, 5, 12)

DECODER = {"self_attn.in_proj_weight": 3, "multihead_attn.in_proj_weight": 3, "linear1": 24}

FAMILIES: list[tuple[Callable[[], nn.Module], Tensor, Sizes, tuple[int, ...]]] = [  # the last: another image size
    (families.Yolo, torch.randn(4, 3, 16, 16), {}, (24, 16)),
    (
        families.UNet,
        torch.randn(4, 3, 12, 12),
        {"down.0.0": 6, "down.1.0": 12, "middle.0": 16, "up.0.0": 12, "up.1.0": 6},
        (15, 9),
    ),
    (families.VaeDecoder, torch.randn(4, 3, 4, 4), {}, (3, 6)),
    (families.Vocoder, torch.randn(4, 3, 6), {}, (11,)),
    (families.DiffusionUNet, IMAGE, {}, (12, 4)),
    (
        families.DiT,
        IMAGE,
        {"time.0": 20, "time.2": 12, "blocks.0.qkv": 3, "blocks.0.up": 48, "blocks.1.qkv": 3, "blocks.1.up": 48},
        (4, 12),
    ),
]
CASES: list[tuple[Callable[[], nn.Module], Tensor, Sizes]] = [
    (patterns.ChannelShuffle, IMAGE, {"a": 4}),
    (patterns.PaddedShortcut, IMAGE, {"stem": 4, "conv1": 8}),
    (patterns.PackedAttention, SEQUENCE, {"qkv": 3, "up": 48}),
    (patterns.GroupedQueries, torch.randint(11, (4, 5)), {"q": 2, "gate": 24}),
    (patterns.TorchAttention, SEQUENCE, {}),
    (lambda: patterns.TorchAttention(batch_first=False), SEQUENCE, {}),
    (patterns.SeparateProjections, SEQUENCE, {"query": 3}),
    (
        patterns.Decoder,
        SEQUENCE,
        {"layer.self_attn.in_proj_weight": 3, "layer.multihead_attn.in_proj_weight": 3, "layer.linear1": 24},
    ),
    (patterns.ComputedWeights, IMAGE, {"a": 8, "c.parametrizations.weight.original1": 6}),
    (patterns.AuxiliaryHead, IMAGE, {"a": 8, "b": 6}),
    (patterns.Tokens, torch.randint(11, (4, 5)), {"free": 8}),
    (patterns.RelativeBias, SEQUENCE, {"qkv": 3}),
    (patterns.NoKeyBias, SEQUENCE, {"qkv": 3}),
    (patterns.CachedBias, SEQUENCE, {"qkv": 3}),
    (patterns.Gated, torch.randn(4, 3, 7), {"a": 8, "b": 4, "up": 6}),
    (patterns.Conv1D, torch.randn(4, 4), {"weight": 10, "second": 8}),
    (patterns.Grouped, IMAGE, {"a": 4, "c": 2}),
    (patterns.GroupedUpsampling, IMAGE, {"a": 4}),
    (patterns.ChannelsLast, IMAGE, {"up": 24}),
    (patterns.Recurrent, torch.randn(3, 2, 4), {"a": 6, "lstm.weight_ih_l0": 5, "b": 7}),
    (patterns.ReadsText, IMAGE, {"conv": 6, "lstm.weight_ih_l0": 7}),
    (patterns.Language, torch.randint(11, (4, 5)), {"embed": 8, "lstm.weight_ih_l0": 9}),
    *((make, x, sizes) for make, x, sizes, _ in FAMILIES),
]
IDS = [getattr(make, "__name__", "sequence-first") for make, _, _ in CASES]


@pytest.mark.parametrize(("make", "x", "sizes"), CASES, ids=IDS)
def test_the_right_groups(make: Callable[[], nn.Module], x: Tensor, sizes: Sizes) -> None:
    graph = find_groups(make(), (x,), {})
    if sizes:
        assert {group.name: group.size for group in graph.groups} == sizes


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("make", "x", "sizes"), CASES, ids=IDS)
def test_pruned_equals_masked(make: Callable[[], nn.Module], x: Tensor, sizes: Sizes, seed: int) -> None:
    torch.manual_seed(seed)
    model = randomised(make())
    groups, refused = shrinkable(model, find_groups(model, (x,), {}).groups, ((x,), {}))
    assert not refused
    supports = dict[ChannelGroup, Tensor]()
    for group in groups:
        support = torch.rand(group.size) < 0.5
        support[torch.randint(group.size, (1,))] = True
        supports[group] = support
    masked = masked_weights(supports, named_tensors(model))
    reference = Reference(model, masked, ((x,), {}))
    assert reference.wide
    collapse(model, make_plan(supports), masked)
    reference.check(model)
    assert not any(support.all() and group.size > 4 for group, support in supports.items())


@pytest.mark.parametrize(("make", "x", "sizes"), CASES, ids=IDS)
def test_the_front_door(make: Callable[[], nn.Module], x: Tensor, sizes: Sizes) -> None:
    model = randomised(make())
    pruned = lnr.prune(model, [x], lnr.Keep(0.5))
    assert all(group.kept < group.size for group in pruned.report.groups)
    again = copy.deepcopy(pruned.model)
    torch.testing.assert_close(again(x), pruned.model(x))


@pytest.mark.parametrize(("make", "x", "sizes", "other"), FAMILIES, ids=[case[0].__name__ for case in FAMILIES])
def test_other_batch_and_image_sizes(
    make: Callable[[], nn.Module], x: Tensor, sizes: Sizes, other: tuple[int, ...]
) -> None:
    model = randomised(make()).eval()
    pruned = lnr.prune(model, [x], lnr.Keep(0.5))
    assert len(pruned.report.groups) > 4
    for shape in ((3, *x.shape[1:]), (2, 3, *other)):
        y = torch.randn(shape)
        torch.testing.assert_close(pruned.model(y), functional_call(model, dict(pruned.masked), (y,)))


@pytest.mark.parametrize(
    ("make", "x", "size", "rows"),
    [
        (patterns.SeparateProjections, SEQUENCE, 4, {"query": 1, "key": 1, "value": 1}),
        (patterns.PackedAttention, SEQUENCE, 4, {"qkv": 1}),
        (patterns.GroupedQueries, torch.randint(11, (4, 5)), 4, {"q": 2, "k": 1, "v": 1}),
    ],
)
def test_heads_leave_as_a_whole(make: Callable[[], nn.Module], x: Tensor, size: int, rows: dict[str, int]) -> None:
    (heads,) = (group for group in find_groups(make(), (x,), {}).groups if set(rows) <= set(group.producers))
    for name, queries in rows.items():
        channels = heads.slots[f"{name}.weight", 0].view(-1, heads.size, queries * size)
        assert torch.equal(channels, torch.arange(heads.size)[:, None].expand_as(channels))
    (output,) = heads.consumers
    assert output.blocks


def test_shuffled_channels_leave_in_pairs() -> None:
    (group,) = find_groups(patterns.ChannelShuffle(), (IMAGE,), {}).groups
    assert group.slots["a.weight", 0].tolist() == group.slots["b.weight", 0].tolist() == [0, 1, 2, 3] * 2


def test_padding_of_a_shortcut_belongs_to_nobody() -> None:
    stem, hidden = find_groups(patterns.PaddedShortcut(), (IMAGE,), {}).groups
    assert (
        stem.slots["conv2.weight", 0].tolist() == stem.slots["head.weight", 1].tolist() == [-1, -1, 0, 1, 2, 3, -1, -1]
    )
    assert hidden.producers == ("conv1",)


def test_heads_that_run_in_training_only_shrink_too() -> None:
    model = randomised(patterns.AuxiliaryHead())
    pruned = lnr.prune(model, [IMAGE], lnr.Keep(0.5))
    assert pruned.report.groups[0].consumers == ("b",)
    y, auxiliary = pruned.model.train()(IMAGE)
    assert y.shape == auxiliary.shape == (4, 4)
    assert pruned.model.get_parameter("auxiliary.weight").shape == (4, 4)


@pytest.mark.parametrize("masking", ["none", "bool", "float", "padding"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_with_fewer_heads_computes_the_same_function(masking: str, need_weights: bool) -> None:
    torch.manual_seed(0)
    dense = nn.MultiheadAttention(12, 3, batch_first=True).double().eval()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    options = {
        "none": {},
        "bool": {"attn_mask": torch.rand(5, 5) < 0.3},
        "float": {"attn_mask": torch.randn(6, 5, 5, dtype=torch.float64)},
        "padding": {"key_padding_mask": torch.arange(5).expand(2, 5) > 3},
    }[masking]
    expected, weights = dense(x, x, x, need_weights=need_weights, **options)
    of_one, _ = dense(x[0], x[0], x[0])
    with visible_attention(dense):
        assert type(dense) is FewerHeads
        output, same_weights = dense(x, x, x, need_weights=need_weights, **options)
        unbatched, _ = dense(x[0], x[0], x[0], need_weights=need_weights)
    torch.testing.assert_close(output, expected)
    if need_weights:
        torch.testing.assert_close(same_weights, weights)
    torch.testing.assert_close(unbatched, of_one)


def test_the_packed_weight_of_visible_self_attention_can_be_seen() -> None:
    """A TorchFunctionMode knows weights by identity: chunks of a weight would be strangers to it."""
    model, x = nn.MultiheadAttention(12, 3, batch_first=True), torch.randn(2, 5, 12)
    seen: list[tuple[str, torch.Size]] = []
    watch(model, ((x, x, x), {}), ["in_proj_weight"], lambda name, call: seen.append((name, call.output.shape)))
    assert seen == [("in_proj_weight", (2, 5, 36))]


def test_what_a_forward_caches_is_forgotten() -> None:
    model = patterns.CachedBias()
    groups, _ = shrinkable(model, find_groups(model, (SEQUENCE,), {}).groups, ((SEQUENCE,), {}))
    assert len(groups) == 1
    assert model.cache == {}

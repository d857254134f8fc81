"""Random networks: pruned == masked in float64, at the cost that was predicted; the original stays as it was.

`LNR_PRUNE_FUZZ=1000 LNR_PRUNE_FUZZ_FROM=5000 pytest tests/test_fuzz.py` for a long run on seeds of its own; the seed of
a network that fails is in the test's name, and hypothesis shrinks what it finds to the patterns that matter.
"""

import copy
import os
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import lnr_prune as lnr
from lnr_prune.collapse.collapse import collapse
from lnr_prune.collapse.masks import masked_weights
from lnr_prune.collapse.plan import make_plan
from lnr_prune.collapse.trial import shrinkable
from lnr_prune.collapse.verify import Reference
from lnr_prune.errors import LnrPruneError
from lnr_prune.graph.groups import find_groups
from lnr_prune.graph.module import Example, named_tensors
from lnr_prune.graph.weights import with_whole_stacks
from lnr_prune.selection.costs import cost
from lnr_prune.selection.costs.cost_model import cost_of
from lnr_prune.testing import PATTERNS, Network, networks, random_network
from lnr_prune.testing.layers import Experts, Picked, Written
from lnr_prune.testing.operations import CHANNELWISE, FREEZING, SHARED_NOISE

COUNT = int(os.environ.get("LNR_PRUNE_FUZZ", "24"))
FIRST = int(os.environ.get("LNR_PRUNE_FUZZ_FROM", "0"))
REFITS = (lnr.Refit(), lnr.Refit(window=2, iterations=1), lnr.Refit(window=2, iterations=2))
FREEZES = {
    "slice": "fixed positions in slice",  # names single positions
    "standardised": "computed weight",
    "weight norm": "computed weight",
}


def prune_at_random(model: Network, x: Tensor, seed: int) -> None:
    """Prunes random channels of every group and compares with the masked network.

    Raises:
        AssertionError: If a group cannot leave, a shape or a cost is not the one planned, or the original has changed.
        VerificationError: If the outputs differ.
    """
    original, state = copy.deepcopy(model), {k: v.clone() for k, v in model.state_dict().items()}
    example, *others = (((), batch) for batch in model.batches(x))
    also = list(map(Example, others))
    graph = find_groups(model, *example, also)
    groups, refused = shrinkable(model, graph.groups, example, also)
    assert not refused  # the patterns hold no sizes: only a wrong group fails its trial
    generator = torch.Generator().manual_seed(seed)
    supports = {}
    for group in groups:
        support = torch.rand(group.size, generator=generator) < 0.6
        support[int(torch.randint(group.size, (1,), generator=generator))] = True
        supports[group] = support
    tensors = named_tensors(model)
    masked = with_whole_stacks(masked_weights(supports, tensors), tensors)
    reference = Reference(model, masked, example, also=also)
    assert reference.wide
    pruned, plan = copy.deepcopy(model), make_plan(supports)
    collapse(pruned, plan, masked)
    reference.check(pruned)
    sizes = {group: int(support.sum()) for group, support in supports.items()}
    predicted = {kind: cost_of(model, graph, kind, len(x), sizes.keys())(sizes) for kind in ("params", "macs")}
    assert predicted["params"] == pytest.approx(cost.parameters(pruned), abs=1)
    kinds, macs = set(map(type, model.modules())), cost.macs(pruned, example)
    if Picked not in kinds:  # there, the data says how many rows it computes
        alone = 1 in sizes.values() and kinds & {Written, Experts}  # einsum multiplies one channel without a product
        assert predicted["macs"] == pytest.approx(macs, abs=1) or (alone and predicted["macs"] > macs)
    for name, tensor in named_tensors(pruned).items():
        kept = plan.indices.get(name, {})
        shape = tuple(len(kept.get(dim, range(size))) for dim, size in enumerate(tensors[name].shape))
        assert tuple(tensor.shape) == shape
    assert repr(model) == repr(original)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("seed", range(FIRST, FIRST + COUNT))
def test_random_networks(seed: int) -> None:
    prune_at_random(*random_network(seed, depth=1 + seed % 7), seed)


@pytest.mark.parametrize("seed", [*range(FIRST, FIRST + max(8, COUNT // 10)), 50006])
def test_random_budgets(seed: int) -> None:
    """Of the last seed, no row comes to one of the experts."""
    model, x = random_network(seed, depth=1 + seed % 7)
    kind, share = ("params", "macs", "size")[seed % 3], (0.8, 0.6, 0.4, 0.2)[seed % 4]
    limit: dict[str, Any] = {kind: share}
    images = torch.randn(3, *x.shape, generator=torch.Generator().manual_seed(seed))
    batches = [batch for x in images for batch in model.batches(x)]
    budget = lnr.Budget(**limit, effort=lnr.Effort(samples=len(x), refits=seed % 5, search=seed % 2))
    try:
        report = lnr.prune(
            model, batches, budget, selector="backward", refit=REFITS[seed % 3], run=lnr.Run(progress=False)
        ).report
    except ValueError as error:
        if "out of reach" not in str(error):
            raise
        return
    assert getattr(report, f"{kind}_after") <= share * getattr(report, f"{kind}_before") + 1
    assert 0 <= report.error < float("inf")


@settings(max_examples=max(10, COUNT // 10), deadline=None)
@given(network=networks())
def test_networks_of_a_strategy(network: tuple[Network, Tensor]) -> None:
    prune_at_random(*network, seed=0)


def test_the_strategy_says_that_it_needs_hypothesis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(LnrPruneError, match="pip install hypothesis"):
        networks()


@pytest.mark.parametrize("name", PATTERNS)
def test_no_pattern_freezes_what_is_in_front_of_it(name: str) -> None:
    block, channels = PATTERNS[name](6, 4)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), block, nn.Conv2d(channels, 2, 1)).eval()
    graph = find_groups(model, (torch.randn(2, 3, 4, 4),), {})
    found = {producer for group in graph.groups for producer in group.producers}
    assert ("0" in found) == (name not in FREEZES)
    assert FREEZES.get(name, "") in graph.frozen.get("0", "")
    if name in CHANNELWISE | SHARED_NOISE | FREEZING:
        assert ("1.layers.a" in found) == (name not in FREEZING)

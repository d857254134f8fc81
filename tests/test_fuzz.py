"""Random networks: whatever is pruned, pruned == masked in float64, and the original stays as it was."""

import copy
import os

import pytest
import torch

from lnr_prune.collapse import collapse
from lnr_prune.graph import find_groups, named_tensors
from lnr_prune.plan import make_plan
from lnr_prune.random_networks import PATTERNS, random_network
from lnr_prune.verify import Reference, masked_weights, shrinkable

COUNT = int(os.environ.get("LNR_PRUNE_FUZZ", "40"))  # LNR_PRUNE_FUZZ=1000 for a long run


@pytest.mark.parametrize("seed", range(COUNT))
def test_random_networks(seed: int) -> None:
    model, x = random_network(seed, depth=1 + seed % 7)
    original, state = copy.deepcopy(model), {k: v.clone() for k, v in model.state_dict().items()}
    graph = find_groups(model, (x,), {})
    groups, _ = shrinkable(model, graph.groups, ((x,), {}))
    generator = torch.Generator().manual_seed(seed)
    supports = []
    for group in groups:
        support = torch.rand(group.size, generator=generator) < 0.6
        support[int(torch.randint(group.size, (1,), generator=generator))] = True
        supports.append((group, support))
    masked = masked_weights(supports, named_tensors(model))
    reference = Reference(model, masked, ((x,), {}))
    assert reference.wide
    pruned = copy.deepcopy(model)
    collapse(pruned, make_plan(supports), masked)
    reference.check(pruned)
    assert repr(model) == repr(original)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", PATTERNS)
def test_no_pattern_freezes_what_is_in_front_of_it(name: str) -> None:
    block, channels = PATTERNS[name](6, 4)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 1), block, torch.nn.Conv2d(channels, 2, 1)).eval()
    graph = find_groups(model, (torch.randn(2, 3, 4, 4),), {})
    found = {producer for group in graph.groups for producer in group.producers}
    assert ("0" in found) == (name != "slice")  # which names single positions

"""Every operation whose ints count channels gets the ints of the smaller model."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lnr_prune.calibration.calls import Call
from lnr_prune.collapse.graph_module import pruned_graph
from lnr_prune.collapse.masks import masked_weights
from lnr_prune.collapse.plan import make_plan
from lnr_prune.graph.groups import find_groups
from lnr_prune.graph.module import named_tensors

FILTERS = torch.randn(16, 2, 1, dtype=torch.float64)
# (n, 8) -> (n, any), and the channels of the one group
CUTS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {
    "view": (lambda h, _: h.view(-1, 2, 4).sum(1), 4),
    "reshape": (lambda h, _: h.reshape(h.shape[0] * 2, 4).reshape(h.shape[0], 8), 4),
    "merged": (lambda h, _: h.reshape(h.shape[0] * 8, 1).reshape(h.shape[0], 8), 8),
    "expand": (lambda h, _: h[:, None].expand(h.shape[0], 3, 8).flatten(1), 8),
    "unflatten": (lambda h, _: h.unflatten(1, (2, 4)).sum(1), 4),
    "split": (lambda h, _: torch.cat(h.split(4, 1)[::-1], 1), 4),
    "split into sizes": (lambda h, _: torch.cat(h.split([4, 2, 2], 1)[::-1], 1), 2),
    "tensor_split": (lambda h, _: torch.cat(h.tensor_split([2, 6], 1)[::-1], 1), 2),
    "chunk": (lambda h, _: torch.mul(*h.chunk(2, 1)), 4),
    "slice": (lambda h, _: h[:, :4] - h[:, 4:], 4),
    "slice from the end": (lambda h, _: h[:, :-2] - h[:, 2:], 2),
    "slices that only concatenate": (lambda h, _: torch.cat([h[:, 4:], h[:, :4]], 1), 4),
    "narrow": (lambda h, _: h.narrow(1, 4, 4) - h.narrow(1, 0, 4), 4),
    "group_norm": (lambda h, _: F.group_norm(h, 4), 4),
    "groups": (lambda h, w: F.conv1d(h[..., None], w, groups=4)[..., 0], 4),
}


class Cut(nn.Module):
    def __init__(self, cut: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.cut, self.filters = cut, nn.Parameter(FILTERS.clone())
        self.a = nn.Linear(5, 8, dtype=torch.float64)
        width = cut(torch.zeros(2, 8, dtype=torch.float64), FILTERS).shape[1]
        self.b = nn.Linear(width, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.cut(self.a(x), self.filters).sin())


@pytest.mark.parametrize("name", CUTS)
def test_ints_of_the_smaller_model(name: str) -> None:
    cut, size = CUTS[name]
    model, x = Cut(cut), torch.randn(4, 5, dtype=torch.float64)
    call: Call = ((x,), {})
    (group,) = find_groups(model, *call).groups
    assert group.size == size
    for seed in range(2):
        support = torch.rand(size, generator=torch.Generator().manual_seed(seed)) < 0.5
        support[seed % size], support[(seed + 1) % size] = True, False
        masked = masked_weights({group: support}, named_tensors(model))
        graph = pruned_graph(model, make_plan({group: support}), masked, call)
        assert graph.batch_size is None
        assert graph.get_parameter("a.weight").shape[0] == 8 * int(support.sum()) // size
        torch.testing.assert_close(graph(x[:1]), functional_call(model, masked, (x[:1],)))


@pytest.mark.parametrize("name", CUTS)
def test_held_ints_lose_what_a_channel_counts(name: str) -> None:
    cut, size = CUTS[name]
    (group,) = find_groups(Cut(cut), (torch.randn(4, 5, dtype=torch.float64),), {}).groups
    if name in ("chunk",):
        assert not group.held
    for held in group.held:
        assert (held.module, len(held.per_channel)) == ("", size)
        assert "test_sizes.py" in held.line
        assert int(held.per_channel.sum()) == held.value  # all that these ints count are channels of the group

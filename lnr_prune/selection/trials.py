"""Trials: what happens to the outputs, and to the latency, when groups keep so many channels."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from lnr_prune.calibration.calls import Call
from lnr_prune.calibration.data import Calibration, first_samples
from lnr_prune.calibration.divergence import output_error
from lnr_prune.calibration.reading import GroupPasses
from lnr_prune.collapse.collapse import collapse, restore_point
from lnr_prune.collapse.masks import masked_weights
from lnr_prune.collapse.plan import make_plan
from lnr_prune.graph.groups import ChannelGroup, Graph
from lnr_prune.graph.module import named_tensors
from lnr_prune.lasso.backward import Elimination
from lnr_prune.refit.network import refit_network
from lnr_prune.refit.refit import Refit
from lnr_prune.runtime.work import Work
from lnr_prune.selection import cost
from lnr_prune.selection.cost_model import Sizes
from lnr_prune.selection.curves import error_curves


@dataclass(frozen=True, eq=False)
class Trials:
    """A network to try sizes on: its errors are measured on some samples, and it is refitted to others.

    Attributes:
        model: The original model.
        target: The module that is to be shrunk; it is, to measure latencies, and is as before afterwards.
        graph: The model's channel groups.
        groups: Those that may shrink.
        passes: They, with their second moments.
        fit: Calibration data that trials are refitted to.
        judge: Full-size weights -> how far the outputs are from the original's, on other samples.
        example: The call whose latency counts.
        refit: How the layers will be refitted; None = not at all.
        bias: Whether biases are refitted.
        logits: Whether the outputs are logits.
        work: The processes, who is told, and where what was measured is kept.
    """

    model: nn.Module
    target: nn.Module
    graph: Graph
    groups: Sequence[ChannelGroup]
    passes: GroupPasses
    fit: Calibration
    judge: Callable[[Mapping[str, Tensor]], float]
    example: Call
    refit: Refit | None
    bias: bool
    logits: bool
    work: Work

    @property
    def curves(self) -> dict[ChannelGroup, Tensor]:
        """Group -> its error curve, see `error_curves`."""
        return self._measured[0]

    @cached_property
    def _measured(self) -> tuple[dict[ChannelGroup, Tensor], dict[ChannelGroup, Elimination]]:
        return error_curves(named_tensors(self.model), self.passes, self.judge, self.work)

    def error(self, doing: str, sizes: Sizes[ChannelGroup]) -> float:
        """Error of the outputs when the groups are eliminated to these sizes, and all layers refitted."""

        def measure() -> float:
            self.work.step(doing)
            eliminations, tensors = self._measured[1], named_tensors(self.model)
            supports = {group: eliminations[group].support(size) for group, size in sizes.items()}
            done = refit_network(
                self.model, self.graph, supports, self.fit,
                bias=self.bias, logits=self.logits, repeated=self.passes.moments_of(self.graph.repeated),
                work=replace(self.work.forgetful(), step=lambda _: None),  # a trial is remembered as a whole
            )  # fmt: skip
            masked = masked_weights(supports, tensors)
            return self.work.ranks.all_gather(self.judge({**masked, **done.weights}))[0]

        return self.work.remembered(_named("trial", sizes), float, measure)

    def latency(self, sizes: Sizes[ChannelGroup]) -> float:
        """Time of a forward pass at these sizes, as a fraction of the original's."""

        def measure() -> float:
            plan = make_plan({group: torch.arange(group.size) < size for group, size in sizes.items()})
            whole, restore = self._whole, restore_point(self.target)  # measured before anything shrinks
            try:
                collapse(self.target, plan)
                return self._seconds() / whole
            finally:
                restore()

        return self.work.remembered(_named("latency", sizes), float, measure)

    @cached_property
    def _whole(self) -> float:
        return self.work.remembered("latency", float, self._seconds)

    def _seconds(self) -> float:
        return self.work.ranks.share_out([lambda: cost.latency(self.target, self.example)])[0]


def trials_of(
    model: nn.Module,
    target: nn.Module,
    graph: Graph,
    groups: Sequence[ChannelGroup],
    passes: GroupPasses,
    data: Calibration,
    *,
    samples: int,
    refit: Refit | None,
    bias: bool,
    logits: bool,
    work: Work,
) -> Trials:
    """Trials on the first calibration samples: every second batch judges, the others are refitted to.

    Args:
        model: The original model.
        target: The module that is to be shrunk.
        graph: The model's channel groups.
        groups: Those that may shrink.
        passes: They, with their second moments.
        data: The calibration data.
        samples: Calibration samples that judge, and about as many to refit to.
        refit: How the layers will be refitted; None = not at all.
        bias: Whether biases are refitted.
        logits: Whether the outputs are logits.
        work: The processes, who is told, and where what was measured is kept.
    """
    batches = first_samples(data, 2 * samples, work.ranks)
    judge = output_error(model, batches[1::2] or batches, logits)  # all ranks have all
    fit = Calibration(work.ranks.shard(batches[::2]), lambda call: call)
    return Trials(model, target, graph, groups, passes, fit, judge, data.example(), refit, bias, logits, work)


def _named(what: str, sizes: Sizes[ChannelGroup]) -> str:
    return f"{what} at {sorted((group.name, size) for group, size in sizes.items())}"

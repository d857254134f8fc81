"""Trials: what happens to the outputs, and to the latency, when the groups have other sizes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from lnr_prune.calibration.calls import Call
from lnr_prune.calibration.data import Calibration, first_of_each_half, first_samples
from lnr_prune.calibration.divergence import output_error
from lnr_prune.calibration.reading import GroupPasses, Part, fit
from lnr_prune.collapse.collapse import collapse, restore_point
from lnr_prune.collapse.masks import Supports, masked_weights
from lnr_prune.collapse.plan import make_plan
from lnr_prune.graph.groups import ChannelGroup, Graph
from lnr_prune.graph.module import named_tensors
from lnr_prune.graph.weights import with_whole_stacks
from lnr_prune.lasso.backward import Elimination
from lnr_prune.refit.network import prepared_network, refit_network
from lnr_prune.refit.refit import Prepared, Refit
from lnr_prune.runtime.progress import silent
from lnr_prune.runtime.work import Work
from lnr_prune.selection.allocation import Allocation
from lnr_prune.selection.amount import at_sizes
from lnr_prune.selection.costs import cost
from lnr_prune.selection.costs.cost_model import Sizes
from lnr_prune.selection.curves import error_curves
from lnr_prune.selection.select import as_selected, select, supports_of
from lnr_prune.selection.selectors import Backward, Selector

TRIED = 64  # trials are refitted to so many samples, or to a quarter of those that judge, if that is more


@dataclass(frozen=True, eq=False)
class Trials:
    """A network to try sizes on: its errors are measured on some samples, and it is refitted to others.

    Attributes:
        model: The original model.
        target: The module that will be shrunk. It is shrunk to measure latencies, and restored afterwards.
        graph: The model's channel groups.
        groups: The groups that may shrink.
        passes: These groups, with their second moments.
        fit: Calibration data that the network is refitted to before its error is promised.
        tried: The part of it that trials are refitted to.
        judge: Full-size weights -> how far the outputs are from the original's, on other samples.
        example: The call whose latency counts.
        refit: How the layers will be refitted; None = not at all. Trials use plain least squares on ``tried``,
            except the last one, whose error is promised.
        bias: Whether biases are refitted.
        logits: Whether the outputs are logits.
        work: The processes, the progress, and where measurements are kept.
    """

    model: nn.Module
    target: nn.Module
    graph: Graph
    groups: Sequence[ChannelGroup]
    passes: GroupPasses
    fit: Calibration
    tried: Calibration
    judge: Callable[[Mapping[str, Tensor]], float]
    example: Call
    refit: Refit | None
    bias: bool
    logits: bool | None
    work: Work
    _known: dict[str, float] = field(default_factory=dict)

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
            return self._judged(self._supports(sizes), Refit(), self._prepared)

        name = _named("trial", sizes)
        if name not in self._known:
            self._known[name] = self.work.remembered(name, float, measure)
        return self._known[name]

    def promised(
        self, allocation: Allocation[ChannelGroup], selector: Selector, seed: int = 0
    ) -> dict[ChannelGroup, float]:
        """The groups' errors to expect on new data; they sum to the error of the outputs.

        Channels are selected and layers refitted as they will be in the end, but on one half of the samples. The other
        half judges the result, and the groups' predicted errors are scaled to its error.

        Args:
            allocation: The groups' sizes.
            selector: How their channels will be chosen.
            seed: Seed of what is drawn.
        """

        def measure() -> float:
            self.work.step("predicting")
            if selector == Backward() and self.refit is not None:
                return self._judged(self._supports(allocation.sizes), self.refit, self.fit)
            _, weights = self.weights(allocation.sizes, selector, seed, fit, self.fit)
            return self.work.ranks.all_gather(self.judge(weights))[0]

        total = self.work.remembered("promise", float, measure)
        scale = total / allocation.error if allocation.error > 0 else 1.0
        return {group: error * scale for group, error in allocation.errors.items()}

    def weights(
        self, sizes: Sizes[ChannelGroup], selector: Selector, seed: int, part: Part, data: Calibration
    ) -> tuple[Supports, Mapping[str, Tensor]]:
        """What is kept, and the masked model's full-size weights, when the model is pruned to these sizes.

        Args:
            sizes: Channels that every group keeps.
            selector: Chooses the channels.
            seed: Seed of what is drawn.
            part: Picks the samples whose moments are used.
            data: The samples that the layers are refitted to.
        """
        tensors = named_tensors(self.model)
        selected = select(
            self.passes, at_sizes(sizes, selector), tensors,
            seed=seed, coefficients=self.refit is None, part=part, work=self._quiet,
        )  # fmt: skip
        supports = supports_of(selected)
        if self.refit is None:
            new = as_selected(selected, tensors).weights
        else:
            new = self._refitted(supports, self.refit, data)
        return supports, with_whole_stacks({**masked_weights(supports, tensors), **new}, tensors)

    def _supports(self, sizes: Sizes[ChannelGroup]) -> Supports:
        return {group: self._measured[1][group].support(size) for group, size in sizes.items()}

    def _judged(self, supports: Supports, settings: Refit, data: Calibration | Prepared) -> float:
        """Error of the outputs with these channels, and all layers refitted to the data."""
        masked = masked_weights(supports, named_tensors(self.model))
        new = self._refitted(supports, settings, data)
        return self.work.ranks.all_gather(self.judge({**masked, **new}))[0]

    def _refitted(self, supports: Supports, settings: Refit, data: Calibration | Prepared) -> Mapping[str, Tensor]:
        """The weights of the layers that are refitted to the data."""
        return refit_network(
            self.model, self.graph, supports, data,
            settings=settings, bias=self.bias, logits=self.logits,
            repeated=self.passes.moments_of(self.graph.repeated), work=self._quiet,
        ).weights  # fmt: skip

    @cached_property
    def _prepared(self) -> Prepared:
        return prepared_network(self.model, self.graph, self.tried, bias=self.bias, work=self.work)

    @property
    def _quiet(self) -> Work:
        return replace(self.work.forgetful(), step=silent)  # a trial is remembered as a whole

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
    logits: bool | None,
    work: Work,
) -> Trials:
    """Trials on the first calibration samples of each half: layers are refitted to one half, the other half judges.

    Args:
        model: The original model.
        target: The module that will be shrunk.
        graph: The model's channel groups.
        groups: The groups that may shrink.
        passes: These groups, with their second moments.
        data: The calibration data.
        samples: Calibration samples that judge, and about as many to refit to.
        refit: How the layers will be refitted; None = not at all.
        bias: Whether biases are refitted.
        logits: Whether the outputs are logits.
        work: The processes, the progress, and where measurements are kept.
    """
    fitted, judging = first_of_each_half(data, samples, work.ranks)  # all ranks have all
    error, tensors = output_error(model, judging or fitted, logits, data.counts), named_tensors(model)

    def judge(weights: Mapping[str, Tensor]) -> float:
        return error(with_whole_stacks(weights, tensors))

    few = first_samples(fitted, tried_samples(samples))
    whole, part = (Calibration(work.ranks.shard(calls), lambda call: call, data.counts) for calls in (fitted, few))
    return Trials(model, target, graph, groups, passes, whole, part, judge, data.example(), refit, bias, logits, work)


def tried_samples(samples: int) -> int:
    """Number of samples that trials are refitted to, when so many judge."""
    return min(samples, max(TRIED, samples // 4))


def _named(what: str, sizes: Sizes[ChannelGroup]) -> str:
    return f"{what} at {sorted((group.name, size) for group, size in sizes.items())}"

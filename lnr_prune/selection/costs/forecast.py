"""How long a prune takes, known before the data is read: forward passes of the calibration data, and solves.

Each stage needs passes through the network, or a part of it, and arithmetic of its own: products of rows
``x x^T`` and Cholesky factorisations. How long a pass takes, and a multiplication, is measured. The factors of the
arithmetic were measured, too, on two cores; so the forecast says how long, roughly.
"""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.benchmark.utils.timer import timer as now

from lnr_prune.calibration.adapter import AdaptedLayer
from lnr_prune.calibration.calls import Call, run, samples_in
from lnr_prune.calibration.data import Calibration, first_samples
from lnr_prune.calibration.reading import adapted_layers
from lnr_prune.calibration.rows import ROWS_PER_COLUMN
from lnr_prune.graph.groups import ChannelGroup, Graph
from lnr_prune.graph.module import named_tensors
from lnr_prune.refit.network import refitted_layers
from lnr_prune.refit.refit import Refit
from lnr_prune.runtime.progress import Stage, duration
from lnr_prune.selection.budget import Effort
from lnr_prune.selection.costs.memory import shape_of
from lnr_prune.selection.curves import SHARES
from lnr_prune.selection.trials import tried_samples

logger = logging.getLogger("lnr_prune")
TIMED = 32  # samples of the pass that is timed
GATHER = 1.2  # passes in which the statistics are gathered
REFIT = 2.5  # passes of a refit: two networks, and what they wait for
SUFFIX = 0.6  # share of a pass that is behind a group, in the mean
LADDER = 12.0  # Cholesky factorisations of a layer's refit
ELIMINATION = 20.0  # of the elimination of a group, for each of its consumers
IN_FLOAT32 = 0.75  # cost of a multiplication, in those of float64
WINDOW = 3.0  # passes of an iteration in which two layers are refitted together
PRODUCT = 512  # rows of the product that is timed


@dataclass(frozen=True)
class Speed:
    """How fast the model and the machine are.

    Attributes:
        sample: Seconds of a forward pass, per sample.
        multiplication: Seconds of a multiplication and addition in float64, within a large product.
    """

    sample: float
    multiplication: float


@dataclass(frozen=True)
class Arithmetic:
    """The arithmetic of a layer with d columns and h rows.

    Attributes:
        d: Columns of x.
        h: Columns of y.
        positions: Rows of x in a sample.
    """

    d: int
    h: int
    positions: float

    def products(self, samples: float) -> float:
        """Multiplications of ``x x^T`` and ``y x^T`` over the rows that are read, and of the step behind phi."""
        rows = min(samples * self.positions, ROWS_PER_COLUMN * self.d)
        return rows * self.d * (self.d / 2 + 3 * self.h) * IN_FLOAT32

    @property
    def factorisation(self) -> float:
        """Multiplications of one Cholesky factorisation, and of the solve with it."""
        return self.d**3 / 6 + self.d**2 * self.h


def forecast(
    model: nn.Module,
    graph: Graph,
    groups: Sequence[ChannelGroup],
    data: Calibration,
    example: Call,
    refit: Refit | None,
    *,
    effort: Effort | None = None,
    evaluations: int = 0,
    bias: bool = True,
    passes: int = 1,
) -> list[Stage]:
    """The stages of a prune, and how long they take; they are logged, too.

    Args:
        model: The model.
        graph: Its channel groups.
        groups: The groups that may be pruned.
        data: The calibration data.
        example: The call that was traced.
        refit: How the layers are refitted; None = not at all.
        effort: How carefully a budget is shared out; None = sizes are not measured.
        evaluations: Models that are pruned and measured on the way.
        bias: Whether biases are refitted.
        passes: Passes in which the statistics are gathered.
    """
    tensors, samples = named_tensors(model), data.samples
    macs = {name: count / samples_in(example) for name, count in graph.macs.items()}

    def arithmetic(layers: Iterable[AdaptedLayer]) -> list[Arithmetic]:
        shapes = [(layer.consumer.weight, *shape_of(layer, tensors)) for layer in layers]
        return [Arithmetic(d, h, macs.get(name, 0) / max(1, d * h)) for name, h, d in shapes]

    read = arithmetic({layer.consumer.weight: layer for g in groups for layer in adapted_layers(g, bias)}.values())
    solved = arithmetic(refitted_layers(graph, groups, bias).values()) if refit else []
    eliminated = ELIMINATION * sum(layer.factorisation for layer in read)
    speed = measured_speed(model, first_samples(data, TIMED) or [example])

    def stage(name: str, steps: int, passed: float, multiplied: float) -> Stage:
        return Stage(name, steps, passed * speed.sample + multiplied * speed.multiplication)

    def refitted(settings: Refit | None, fitted: float, share: float = 1.0) -> tuple[float, float]:
        ladders = LADDER * sum(layer.factorisation for layer in solved)
        windows = WINDOW * settings.joint_iterations if settings else 0.0
        passed = (REFIT + windows) * share * fitted if settings else 0.0
        return passed, share * (ladders + sum(layer.products(fitted) for layer in solved))

    gathered = GATHER * samples * passes, sum(layer.products(samples) for layer in read)
    batches = -(-samples // samples_in(next(iter(data), example)))  # a process may have none
    stages = [stage("statistics", passes * batches, *gathered)]
    if effort is not None:
        judging = min(effort.samples, samples / 2)
        curves = len(SHARES) * len(groups) * SUFFIX * judging
        stages.append(stage("measuring", len(groups), curves, eliminated))
        passed, multiplied = refitted(Refit(), min(tried_samples(effort.samples), samples / 2), SUFFIX)
        for name, trials in (("trying", min(effort.refits, len(groups)) if refit else 0), ("searching", effort.search)):
            stages.append(stage(name, trials, trials * (passed + judging), trials * multiplied))
        passed, multiplied = refitted(refit, samples)
        stages.append(stage("evaluating", evaluations, evaluations * passed, evaluations * (multiplied + eliminated)))
        passed, multiplied = refitted(refit, judging)
        stages.append(stage("predicting", 1, passed + judging, multiplied))
    stages.append(stage("selecting", len(groups), 0, eliminated))
    passed, multiplied = refitted(refit, samples)
    stages.append(stage("refitting", len(solved), passed, multiplied))
    stages = [stage for stage in stages if stage.steps]
    _log(stages, samples, speed)
    return stages


def _log(stages: Sequence[Stage], samples: int, speed: Speed) -> None:
    one, total = samples * speed.sample or math.inf, sum(stage.seconds for stage in stages)
    parts = " + ".join(f"{stage.name} {stage.seconds / one:.1f}" for stage in stages)
    logger.info("plan: %s forward passes of %d samples, about %s here", parts, samples, duration(total))


def measured_speed(model: nn.Module, calls: Sequence[Call]) -> Speed:
    """Times a forward pass of a few samples, and a product."""
    device = next(iter(named_tensors(model).values()), torch.empty(0)).device
    A = torch.ones(PRODUCT, PRODUCT, dtype=torch.float64, device="cpu" if device.type == "mps" else device)
    _seconds(lambda: [run(model, call) for call in calls[:1]])  # what is done once only
    passed = _seconds(lambda: [run(model, call) for call in calls])
    product = min(_seconds(lambda: A @ A) for _ in range(3))
    return Speed(passed / sum(map(samples_in, calls)), product / PRODUCT**3)


def _seconds(work: Callable[[], object]) -> float:
    begin = now()
    work()
    return float(now() - begin)

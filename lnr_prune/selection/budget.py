"""What a pruned model may cost, which sizes its groups may take, and how carefully these are measured."""

from collections.abc import Iterable
from dataclasses import dataclass

from lnr_prune.graph.groups import ChannelGroup, Graph
from lnr_prune.runtime.checks import check_count, check_flags, check_share
from lnr_prune.selection.amount import groups_named


@dataclass(frozen=True)
class Grid:
    """Sizes that groups may take.

    Attributes:
        round_to: Groups keep a multiple of so many channels (8 suits most accelerators).
        minimum: The least number of channels that a group keeps.
        leave: Producers whose channels all stay.

    Raises:
        ValueError, TypeError: If a value is out of range, or of the wrong type.
    """

    round_to: int = 1
    minimum: int = 1
    leave: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        leave = (self.leave,) if isinstance(self.leave, str) or not isinstance(self.leave, Iterable) else self.leave
        object.__setattr__(self, "leave", tuple(leave))
        if wrong := [name for name in self.leave if not isinstance(name, str)]:
            raise TypeError(f"leave must be names of layers, got {wrong[0]!r}")
        check_count("round_to", self.round_to, 1)
        check_count("minimum", self.minimum, 1)


@dataclass(frozen=True)
class Effort:
    """How carefully a budget is shared out.

    Attributes:
        samples: Number of calibration samples on which the outputs are judged, twice for every group. Trials are
            refitted to a quarter as many others, but at least to 64. With few samples, the sizes depend on which ones
            they are.
        refits: Number of groups, spread evenly along the depth, for which it is measured how much of their error is
            left after a refit of all layers. Four are nearly as good as all; 0 takes the errors as they are.
        search: Number of trials of a local search; 0 = no search. Each trial refits the whole network at other sizes
            within the budget, and keeps them if the outputs suffer less.

    Raises:
        ValueError, TypeError: If a value is out of range, or not an int.
    """

    samples: int = 256
    refits: int = 4
    search: int = 0

    def __post_init__(self) -> None:
        check_count("samples", self.samples, 1)
        check_count("refits", self.refits, 0)
        check_count("search", self.search, 0)


@dataclass(frozen=True)
class Budget:
    """What the pruned model may cost, as fractions of the original's cost; all limits that are given must hold.

    Channels are removed where the outputs, measured on some of the calibration data, suffer least.

    Attributes:
        params: Fraction of the parameters, in (0, 1].
        macs: Fraction of the multiply-accumulates, in (0, 1].
        size: Fraction of the bytes of parameters and buffers, in (0, 1].
        latency: Fraction of the time of a forward pass of the first calibration batch, measured on the
            model's device, in (0, 1].
        error: Instead of a cost: the model becomes as small as possible while the predicted relative squared error
            of the outputs, ``E||f(x) - f'(x)||^2 / E||f(x) - E f(x)||^2``, stays below this.
        uniform: Whether all groups of a kind keep the same number of channels: those of the same layers in all blocks,
            such as ``layers.0.mlp.up_proj``, ``layers.1.mlp.up_proj``. Settings of a Hugging Face model can say such
            sizes, so vLLM, converters and quantizers can use it; but the error is larger.
        grid: Sizes that groups may take.
        effort: How carefully the budget is shared out.

    Raises:
        ValueError, TypeError: If no limit is given, or a value is out of range or not a number.

    Example:
        >>> Budget(macs=0.5, grid=Grid(round_to=8)).grid.round_to
        8
    """

    params: float | None = None
    macs: float | None = None
    size: float | None = None
    latency: float | None = None
    error: float | None = None
    uniform: bool = False
    grid: Grid = Grid()
    effort: Effort = Effort()

    def __post_init__(self) -> None:
        limits = {name: getattr(self, name) for name in ("params", "macs", "size", "latency", "error")}
        given = {name: value for name, value in limits.items() if value is not None}
        if not given:
            raise ValueError(f"a budget needs a limit: one or more of {', '.join(limits)}")
        for name, value in given.items():
            check_share(f"budget {name}", value)
        check_flags(uniform=self.uniform)
        if not isinstance(self.grid, Grid):
            raise TypeError(f"budget grid must be settings such as Grid(round_to=8), got {self.grid!r}")
        if not isinstance(self.effort, Effort):
            raise TypeError(f"budget effort must be settings such as Effort(samples=512), got {self.effort!r}")

    def groups(self, graph: Graph) -> list[ChannelGroup]:
        """The groups that may lose channels.

        Raises:
            ValueError: If ``grid.leave`` names a layer that is not a prunable producer.
        """
        stay = {group for layer in self.grid.leave for group in groups_named(graph, layer, "leave")}
        return [group for group in graph.groups if group not in stay]

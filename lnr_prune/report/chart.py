"""Where the parts of a chart are: curves over a cost, as a share of the original model's cost."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LABELS = {"params": "parameters left", "macs": "MACs left", "size": "bytes left", "latency": "latency left"}
WIDTH, HEIGHT = 400, 270
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 30, 44
WIDE = 10.0  # ratio of the largest to the smallest value from which an axis is logarithmic
Points = Sequence[tuple[float, float]]


class Axis:
    """Values -> positions between two ends, linear or logarithmic.

    Args:
        values: Values that must lie on the axis.
        first: Position of the smallest value.
        last: Position of the largest value.
    """

    def __init__(self, values: Sequence[float], first: float, last: float) -> None:
        low, high = min(values), max(values)
        self.logarithmic = low > 0 and high / low > WIDE
        low, high = (math.log10(low), math.log10(high)) if self.logarithmic else (low, high)
        margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
        self.low, self.high = low - margin, high + margin
        self.first, self.last = first, last

    def __call__(self, value: float) -> float:
        """The position of a value."""
        at = math.log10(value) if self.logarithmic else value
        return self.first + (at - self.low) / (self.high - self.low) * (self.last - self.first)

    def ticks(self) -> list[float]:
        """About five round values."""
        if self.logarithmic:
            decades = range(math.floor(self.low), math.ceil(self.high) + 1)
            steps = (1, 2, 5) if self.high - self.low < 2 else (1,)
            values = [step * 10.0**decade for decade in decades for step in steps]
            inside = [value for value in values if self.low <= math.log10(value) <= self.high]
            return inside[:: math.ceil(len(inside) / 7) or 1]
        rough = (self.high - self.low) / 5
        unit = 10.0 ** math.floor(math.log10(rough))
        step = unit * min((1, 2, 5, 10), key=lambda times: abs(times * unit - rough))
        return [step * i for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


@dataclass(frozen=True)
class Chart:
    """A chart, ready to be drawn by a template: all positions are in units of ``size``.

    Attributes:
        x_label, y_label: What the axes show.
        x_ticks, y_ticks: Positions, and the values there as text.
        curves: At most two curves, as corners.
        level: Where a dotted line is; None = nowhere.
        size: Width and height.
        left, right, top, bottom: The ends of the axes.
    """

    x_label: str
    y_label: str
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    curves: Mapping[str, Points]
    level: float | None
    size: tuple[int, int] = (WIDTH, HEIGHT)
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def chart(curves: Mapping[str, Points], x_label: str, y_label: str, level: float | None = None) -> Chart | None:
    """Curves of (share, value), and a line at ``level``; None if no point is finite."""
    finite = {
        name: sorted((x, y) for x, y in points if math.isfinite(x) and math.isfinite(y))
        for name, points in curves.items()
    }
    shares = [x for points in finite.values() for x, _ in points]
    values = [y for points in finite.values() for _, y in points]
    if not shares:
        return None
    if level is not None and not math.isfinite(level):
        level = None
    x = Axis(shares, LEFT, WIDTH - RIGHT)
    y = Axis(values if level is None else [*values, level], HEIGHT - BOTTOM, TOP)
    return Chart(
        x_label,
        y_label,
        tuple((round(x(at), 1), f"{100 * at:.3g}%") for at in x.ticks()),
        tuple((round(y(at), 1), f"{at:.3g}") for at in y.ticks()),
        {name: [(round(x(at), 1), round(y(value), 1)) for at, value in points] for name, points in finite.items()},
        None if level is None else round(y(level), 1),
    )

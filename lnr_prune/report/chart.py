"""One chart as SVG: curves over a cost, as a share of the original model's cost."""

import math
from collections.abc import Mapping, Sequence
from html import escape

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


def svg(curves: Mapping[str, Points], x_label: str, y_label: str, level: float | None = None) -> str:
    """At most two curves of (share, value), and a dotted line at ``level``; points must be finite to be drawn."""
    finite = {
        name: sorted((x, y) for x, y in points if math.isfinite(x) and math.isfinite(y))
        for name, points in curves.items()
    }
    shares = [x for points in finite.values() for x, _ in points]
    values = [y for points in finite.values() for _, y in points]
    if not shares:
        return "<p>No point to draw.</p>"
    x = Axis(shares, LEFT, WIDTH - RIGHT)
    y = Axis(values if level is None else [*values, level], HEIGHT - BOTTOM, TOP)
    parts = [
        f'<line class="grid" x1="{x(at):.1f}" x2="{x(at):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        f'<text x="{x(at):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{100 * at:.3g}%</text>'
        for at in x.ticks()
    ] + [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(at):.1f}" y2="{y(at):.1f}"/>'
        f'<text x="{LEFT - 6}" y="{y(at) + 4:.1f}" text-anchor="end">{at:.3g}</text>'
        for at in y.ticks()
    ]
    if level is not None:
        line = f'x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(level):.1f}" y2="{y(level):.1f}"'
        parts.append(f'<line {line} stroke="currentColor" stroke-dasharray="2 4"/>')
    for place, (style, (name, points)) in enumerate(zip("ab", finite.items(), strict=False)):
        corners = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in points)
        dots = "".join(f'<circle class="{style}" cx="{x(at):.1f}" cy="{y(v):.1f}" r="3.5"/>' for at, v in points)
        legend = f'<circle class="{style}" cx="{LEFT + 8 + 130 * place}" cy="12" r="4"/>'
        legend += f'<text x="{LEFT + 18 + 130 * place}" y="16">{escape(name)}</text>'
        parts.append(f'<polyline class="{style}" points="{corners}"/>{dots}{legend}')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>'
    )
    middle = (TOP + HEIGHT - BOTTOM) / 2
    turned = f'transform="rotate(-90 12 {middle})" text-anchor="middle"'
    parts.append(f'<text x="12" y="{middle}" {turned}>{escape(y_label)}</text>')
    label = escape(f"{y_label} against {x_label}")
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'

"""A network from top to bottom, one layer a line: what goes further than to the next line runs on a rail beside it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

ROW, RAIL, TEXT = 24, 11, 7.6  # heights and widths in pixels: of a line, a rail, a character

MOST = 10  # rails; what would need more, as in a DenseNet, runs on the last one, over others
END = "<output>"


@dataclass(frozen=True)
class Stop:
    """One line of the drawing.

    Attributes:
        name: The layer, or what happens where several layers' outputs meet.
        layer: Whether it is a layer.
        groups: Numbers of the groups that its outputs belong to.
    """

    name: str
    layer: bool
    groups: tuple[int, ...]


@dataclass(frozen=True)
class Rail:
    """What goes from one line to another: beside the lines in between, ``lane`` rails away; 0 = straight on."""

    start: int
    end: int
    lane: int
    groups: tuple[int, ...]


@dataclass(frozen=True)
class Drawing:
    """Lines and rails, and where they are."""

    stops: tuple[Stop, ...]
    rails: tuple[Rail, ...]

    @property
    def left(self) -> int:
        """Where the lines begin."""
        return RAIL * (max((rail.lane for rail in self.rails), default=0) + 1)

    @property
    def height(self) -> int:
        """Of the whole drawing."""
        return ROW * len(self.stops)

    def width(self, texts: Iterable[str]) -> int:
        """Of the whole drawing, with these texts at the lines."""
        return self.left + 20 + round(TEXT * max(map(len, texts), default=0))

    def y(self, line: int) -> int:
        """The middle of a line."""
        return ROW * line + ROW // 2

    def path(self, rail: Rail) -> str:
        """The way of a rail, as SVG has it."""
        begin, end, x = self.y(rail.start), self.y(rail.end), self.left
        if not rail.lane:
            return f"M{x} {begin}V{end}"
        beside, turn = x - RAIL * rail.lane, ROW // 2
        sign = 1 if end > begin else -1
        return (
            f"M{x} {begin}Q{beside} {begin} {beside} {begin + sign * turn}V{end - sign * turn}Q{beside} {end} {x} {end}"
        )


def drawing(flow: Sequence[tuple[str, str]], groups: Mapping[str, Sequence[int]]) -> Drawing:
    """The drawing of a network.

    Args:
        flow: Pairs of layers, in order of execution: what the first computes goes into the second. Names in angle
            brackets are not layers.
        groups: Layer -> numbers of the groups that its outputs belong to.
    """
    names = dict.fromkeys(name for pair in flow for name in pair)
    lines = {name: line for line, name in enumerate(sorted(names, key=END.__eq__))}
    carried = {name: tuple(dict.fromkeys(groups.get(name, ()))) for name in lines}
    for source, target in flow:
        if target.startswith("<"):  # several layers' outputs meet
            carried[target] = tuple(dict.fromkeys((*carried[target], *carried[source])))
    busy: list[list[tuple[int, int]]] = []
    rails = []
    pairs = {(lines[source], lines[target]): carried[source] for source, target in flow}
    for (start, end), colours in sorted(pairs.items(), key=lambda item: abs(item[0][1] - item[0][0])):
        lane = 0 if end == start + 1 else _free_lane(busy, min(start, end), max(start, end))
        rails.append(Rail(start, end, lane, colours))
    stops = (Stop(_plain(name), not name.startswith("<"), carried[name]) for name in lines)
    return Drawing(tuple(stops), tuple(rails))


def _free_lane(busy: list[list[tuple[int, int]]], first: int, last: int) -> int:
    """The nearest rail that is free from a line to another, or the last one; 1 is the first."""
    for lane, taken in enumerate(busy, 1):
        if all(last <= begin or end <= first for begin, end in taken):
            taken.append((first, last))
            return lane
    if len(busy) < MOST:
        busy.append([(first, last)])
    return len(busy)


def _plain(name: str) -> str:
    """``<add_3>`` -> add; layers as they are."""
    if not name.startswith("<"):
        return name
    word, _, number = name.strip("<>").rpartition("_")
    return word if word and number.isdecimal() else name.strip("<>")

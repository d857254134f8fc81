"""A drawing of a model's layers, coloured by their channel groups."""

import shutil
import subprocess  # runs graphviz, without a shell  # nosec B404
from collections.abc import Iterable, Mapping, Sequence
from colorsys import hsv_to_rgb
from pathlib import Path

from lnr_prune.errors import LnrPruneError
from lnr_prune.graph.flow import INPUT, OUTPUT

TEXT = (".dot", ".gv")
IMAGES = (".svg", ".png", ".pdf")
GOLDEN = 0.618034  # steps of this size around the circle of hues keep neighbours apart
LIMIT = 120  # seconds that graphviz may take
STRIPES = 3  # an edge shows at most so many groups
STYLE = (
    "  graph [nslimit=1 nslimit1=1 mclimit=0.3]",  # bounds the time of the layout
    '  node [shape=box style="filled,rounded" fontname="Helvetica" fontsize=11 color=gray50]',
    "  edge [arrowsize=0.6 color=gray60]",
)


def to_dot(
    flow: Iterable[tuple[str, str]],
    layers: Mapping[str, Sequence[str]],
    groups: Mapping[str, str],
    frozen: Mapping[str, str],
) -> str:
    """The layers as a graph in the DOT language.

    Args:
        flow: Pairs of layers, in the direction of the data.
        layers: Layer -> names of the groups of its outputs.
        groups: Name of a group -> a text about it.
        frozen: Layer -> why its outputs are in no group.
    """
    hues = {name: (0.58 + index * GOLDEN) % 1 for index, name in enumerate(groups)}
    carried = {layer: dict.fromkeys(names) for layer, names in layers.items()}
    nodes: dict[str, str] = {}
    edges = []
    for source, target in flow:
        for end in (source, target):
            nodes.setdefault(end, _node(end, layers.get(end, ()), groups, hues, frozen.get(end, "in no group")))
        if target.startswith("<"):  # several layers' outputs meet
            carried.setdefault(target, {}).update(carried.get(source, {}))
        colours = [_colour(hues[name], 0.75, 0.7) for name in carried.get(source, ())]
        colour = ":".join(colours) if len(colours) <= STRIPES else "gray40"
        style = f' [color="{colour}" penwidth=1.5]' if colour else ""
        edges.append(f"  {_quoted(source)} -> {_quoted(target)}{style}")
    return "\n".join(["digraph channel_groups {", *STYLE, *nodes.values(), *edges, "}", ""])


def _node(name: str, own: Sequence[str], groups: Mapping[str, str], hues: Mapping[str, float], why_none: str) -> str:
    if name.startswith("<"):
        text = name.strip("<>") if name in (INPUT, OUTPUT) else name.strip("<>").rpartition("_")[0]
        return f"  {_quoted(name)} [label={_quoted(text)} shape=plaintext style=solid fontcolor=gray40]"
    if not own:
        return f"  {_quoted(name)} [tooltip={_quoted(why_none)} fillcolor=gray90 fontcolor=gray30]"
    others = ", ".join(group for group in own if group != name)
    label = f"{name}\n({others})" if others else name
    tooltip = "\n".join(f"{group}: {groups[group]}" for group in own)
    fill = ":".join(_colour(hues[group], 0.35, 0.97) for group in own)
    return f'  {_quoted(name)} [label={_quoted(label)} tooltip={_quoted(tooltip)} fillcolor="{fill}"]'


def draw(text: str, path: str | Path) -> Path:
    """Writes a graph in the DOT language as text (.dot, .gv), or as an image (.svg, .png, .pdf) that graphviz makes.

    Raises:
        ValueError: If the file has another suffix.
        LnrPruneError: If graphviz is not installed, fails, or takes too long.
    """
    path = Path(path)
    if path.suffix in TEXT:
        path.write_text(text, encoding="utf-8")
        return path
    if path.suffix not in IMAGES:
        raise ValueError(f"cannot draw to {path.name!r}; give a file that ends in {', '.join(TEXT + IMAGES)}")
    program = shutil.which("dot")
    if program is None:
        raise LnrPruneError(
            f"drawing to {path.name!r} needs the program dot of graphviz (https://graphviz.org/download), which is not "
            "on the PATH; install it, or draw to a .dot file, which needs nothing"
        )
    command = [program, f"-T{path.suffix[1:]}", "-o", str(path)]
    try:
        subprocess.run(command, input=text, text=True, capture_output=True, check=True, timeout=LIMIT)  # nosec B603
    except subprocess.CalledProcessError as error:
        raise LnrPruneError(f"graphviz could not draw {path.name!r}: {error.stderr.strip()}") from error
    except subprocess.TimeoutExpired as error:
        raise LnrPruneError(
            f"graphviz did not draw {path.name!r} in {LIMIT} s: the graph is too large; draw to a .dot file"
        ) from error
    return path


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def _colour(hue: float, saturation: float, value: float) -> str:
    red, green, blue = (round(255 * part) for part in hsv_to_rgb(hue, saturation, value))
    return f"#{red:02x}{green:02x}{blue:02x}"

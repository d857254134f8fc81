"""Draws docs/lenet5.svg, the README's picture, from the table that is beside it: python docs/picture.py."""

import re
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
NETWORK = r"^\| LeNet-5, MNIST \| ([\d.]+) % of the parameters \| "
ROW = re.compile(NETWORK + r"[\d.]+ \| \**([\d.]+)\** \| ([\d.]+) \|$", re.MULTILINE)


def draw(text: str, path: Path) -> None:
    """Our accuracy and the best peer's against the parameters left, all in percent."""
    rows = ROW.findall(text)
    sizes, ours, peer = (list(map(float, column)) for column in zip(*rows, strict=True))
    dense = float(re.search(NETWORK + r"([\d.]+)", text, re.MULTILINE).group(2))
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.axhline(dense, color="grey", linestyle=":", label="the whole network")
    axes.plot(sizes, ours, color="C0", marker="o", linewidth=2, label="lnr-prune")
    axes.plot(sizes, peer, color="C1", marker="s", label="best of the peers' criteria")
    axes.set(xscale="log", xlabel="parameters left (%)", ylabel="test accuracy (%)", ylim=(0, 103))
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axes.set_xticks([], minor=True)
    axes.set_title("LeNet-5 on MNIST, nothing retrained", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    matplotlib.rcParams["svg.hashsalt"] = "lnr-prune"  # the same picture, the same bytes
    description = "; ".join(map(" ".join, rows))  # a test compares it with the table
    figure.savefig(path, metadata={"Date": None, "Description": description}, facecolor="white")


if __name__ == "__main__":
    draw((ROOT / "README.md").read_text(encoding="utf-8"), ROOT / "docs" / "lenet5.svg")

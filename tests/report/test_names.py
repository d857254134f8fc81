"""Tables of deep networks: short, and with every name as it must be typed."""

import io
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lnr_prune.report.names import by_reason, joined
from lnr_prune.report.report import Report
from lnr_prune.report.rows import GroupReport


def unfolded(text: str) -> list[str]:
    """All the names that a text of `joined` stands for."""
    if not (found := re.search(r"\{([^}]*)\}", text)):
        return [text]
    numbers: list[int] = []
    for run in found[1].split(","):
        first, _, last = run.partition("..")
        numbers += range(int(first), int(last or first) + 1)
    return [name for n in numbers for name in unfolded(text[: found.start()] + str(n) + text[found.end() :])]


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["conv1"], "conv1"),
        (["0", "2"], "0, 2"),
        (["a.0.w", "a.1.w", "a.2.w", "a.5.w", "b"], "a.{0..2,5}.w, b"),
        (["a.0.b.0.w", "a.0.b.1.w", "a.1.b.0.w", "a.1.b.1.w"], "a.{0,1}.b.{0,1}.w"),
        (["a.0.b.0.w", "a.1.b.1.w"], "a.0.b.0.w, a.1.b.1.w"),  # a.{0,1}.b.{0,1}.w would be four
        (["a.0.q", "a.0.k", "a.1.q", "a.1.k"], "a.{0,1}.q, a.{0,1}.k"),
    ],
)
def test_names_that_differ_in_a_blocks_number_are_one(names: list[str], text: str) -> None:
    assert joined(names) == text


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 4), st.sampled_from(["w", "3"])), max_size=12))
def test_what_is_folded_is_exactly_what_was_there(parts: list[tuple[str, int, str]]) -> None:
    names = [f"{block}.{number}.{last}" for block, number, last in parts]
    text = joined(names)
    pieces = re.findall(r"(?:\{[^}]*\}|[^,{ ])+", text)
    assert sorted(name for piece in pieces for name in unfolded(piece)) == sorted(set(names))


def _deep(blocks: int) -> Report:
    """As of a language model."""
    groups = [
        GroupReport(f"model.layers.{i}.mlp.up_proj", (f"model.layers.{i}.mlp.up_proj",),
                    (f"model.layers.{i}.mlp.down_proj",), 1536, 500 + i, 1e-5 * (i + 1), predicted=3.2e-6)
        for i in range(blocks)
    ]  # fmt: skip
    frozen = {f"model.layers.{i}.mlp.down_proj": "read by the output" for i in range(blocks)}
    return Report(tuple(groups), (), 0.0, frozen, 1, 1, 1, 1)


def printed(report: Report, width: int) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(report)
    return out.getvalue()


def test_repeated_blocks_are_one_row_with_the_range_of_widths() -> None:
    text = printed(_deep(30), 300)
    assert len(text.splitlines()) < 10
    assert "500 .. 529" in text
    assert "0.001\N{NO-BREAK SPACE}% .. 0.03\N{NO-BREAK SPACE}%" in text
    assert "< 0.001\N{NO-BREAK SPACE}%" in text  # of what is predicted: not 0.00 %
    assert text.count("frozen") == 1
    few = printed(_deep(2), 300)
    assert few.count("500") == few.count("501") == 1  # two are not folded
    assert by_reason(_deep(3).frozen) == {"read by the output": ["model.layers.{0..2}.mlp.down_proj"]}


@pytest.mark.parametrize("width", [72, 80, 120])
def test_no_name_is_cut(width: int) -> None:
    name = "encoder.layers.a_name_that_is_very_long_indeed.attention.output.dense"
    group = replace(_deep(1).groups[0], producers=(name,), consumers=(name[::-1],), note="n" * 90)
    text = printed(replace(_deep(1), groups=(group,), frozen={}), width)
    assert "…" not in text
    columns = zip(*(line.split("│")[1:-1] for line in text.splitlines() if line.startswith("│")), strict=True)
    texts = ["".join(cell.strip() for cell in column) for column in columns]
    assert (texts[0], texts[1], texts[-1]) == (name, name[::-1], "n" * 90)

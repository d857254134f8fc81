"""Reports as HTML: self-contained, escaped, whole; and, where Chromium is there, looked at."""

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lnr_prune as lnr
from lnr_prune.report import chart, html, rails
from lnr_prune.report.rails import drawing
from lnr_prune.report.report import Report
from lnr_prune.report.rows import GroupReport, LayerReport, ModuleCost
from lnr_prune.report.stages import MOST, stages
from tests.helpers.browser import in_browser, measured, needs_chromium
from tests.helpers.models import FixedView

SECTIONS = ["The whole network", "Channels", "The network", "Refitted layers", "Left whole"]


def _pruned(amount: lnr.Keep | lnr.Budget, **options: Any) -> lnr.Pruned:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.ReLU(), torch.nn.Linear(12, 3))
    return lnr.prune(model, [torch.randn(64, 6)], amount, **options)


def _large(name: str = "", note: str = "", reason: str = "output of the model") -> Report:
    """As of a ResNet-50."""
    groups: list[GroupReport] = []
    layers: list[LayerReport] = []
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), 1):
        for block in range(blocks):
            for conv in (1, 2):
                layer = f"layer{stage}.{block}.conv{conv}{name}"
                size, index = width, len(groups)
                kept, error = size - 3 * index % size, (index % 7) / 30
                groups.append(
                    GroupReport(layer, (layer,), (layer,), size, kept, error, 0.1, 1e-9, error / 9, error * 1.4, note)
                )
                layers.append(LayerReport(layer, error, 1e-4, 50176, 9 * width))
        stream = tuple(f"layer{stage}.{block}.conv3{name}" for block in range(blocks))
        groups.append(GroupReport(stream[0], stream, stream, 4 * width, 3 * width, 0.02, None, None, None, 0.03))
    frozen = {f"aux.{i}.attention.output{name}": reason for i in range(12)}
    counts = (25_557_032, 12_345_678, 4_089_184_256, 2_044_592_128, 102_549_160, 51_000_000, 0.1623, 0.0951)
    modules = tuple(ModuleCost(layer.name, 9 * layer.columns, 5 * layer.columns, 81, 49) for layer in layers)
    names = [layer.name for layer in layers]
    flow = (*pairwise(names), *zip(names[:-5], names[5:], strict=True))
    return Report(tuple(groups), tuple(layers), 0.0123, frozen, *counts, modules=modules, flow=flow).with_metric(
        f"accuracy{name}", 0.9, 0.88
    )


class _Tags(HTMLParser):
    """Tags with their attributes' names; text; whether what is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, ...]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, *(name for name, _ in attrs)))
        if tag not in ("meta", "wbr", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, *(name for name, _ in attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_says_everything() -> None:
    pruned = _pruned(lnr.Budget(params=0.4))
    page = pruned.report.to_html(title="A & B")
    text = " ".join(_Tags(page).text)
    assert "A & B" in text
    for section in (*SECTIONS, "Parameters", "MACs per sample", "Size", "Latency", "Error of the outputs"):
        assert section in text
    for group in pruned.report.groups:
        assert f"{group.kept:,} of {group.size:,}" in text
        label, width = f"{group.kept} of {group.size} channels kept", f"{group.kept / group.size:.2%}"
        assert f'aria-label="{label}"><rect class="a" width="{width}"' in page
    assert html.percent(pruned.report.error) in text
    assert pruned.report.predicted is not None
    assert f"{html.percent(pruned.report.predicted)} predicted for new data" in text
    assert "output of the model" in text
    assert html.percent(pruned.report.params_after / pruned.report.params_before) in text


def test_it_says_when_nothing_was_refitted_or_frozen() -> None:
    report = _pruned(lnr.Keep(0.5), refit=None).report
    assert "as the selector left them" in report.to_html()
    assert "Nothing: the outputs of every layer" in replace(report, frozen={}).to_html()


def test_it_is_written_and_asks_nothing_of_the_network(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    swept = lnr.sweep(*_problem(), [lnr.Keep(6), lnr.Keep(3)])
    text = swept.points[0].report.to_html(path, also=[swept])
    assert path.read_text(encoding="utf-8") == text
    assert not re.search(r"https?:|\bsrc=|\bhref=|url\(|@import|<script .|\bon\w+=", text)
    assert "default-src 'none'" in text
    (script,) = re.findall("<script>(.*?)</script>", text, re.DOTALL)  # the one that the page's own policy lets run
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in text
    assert "<h2>Sweep</h2>" in text


def _problem() -> tuple[torch.nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.ReLU(), torch.nn.Linear(12, 3))
    return model, [torch.randn(64, 6)]


HOSTILE = st.text(min_size=1, max_size=30) | st.sampled_from(
    ["</style><script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "' onmouseover='x", "<!--", "]]>", "&lt;"]
)


@settings(max_examples=25)
@given(HOSTILE, HOSTILE, HOSTILE)
def test_names_notes_and_reasons_are_text_and_nothing_else(name: str, note: str, reason: str) -> None:
    plain, hostile = (
        _Tags(_large("n", "n", "n").to_html(title="n")),
        _Tags(_large(name, note, reason).to_html(title=name)),
    )
    for parsed in (plain, hostile):  # lines may break at a name's dots
        parsed.tags = [tag for tag in parsed.tags if tag != ("wbr",)]
    assert hostile.tags == plain.tags
    shown = "".join(hostile.text).replace("\r", "\n")
    assert name.replace("\r", "\n") in shown
    assert reason.replace("\r", "\n") in shown


def test_reports_of_strange_numbers_make_a_page() -> None:
    nan, inf = float("nan"), float("inf")
    group = GroupReport("a", ("a",), ("b",), 0, 0, nan, before_refit=-1.0, predicted=inf)
    report = Report((group,), (LayerReport("a", nan, inf, 0, 0),), inf, {}, 0, 0, 0, 5, 0, -3, nan, nan)
    text = report.to_html()
    assert all(0 <= float(width) <= 100 for width in re.findall(r'<rect class="\w" width="([^"%]*)%', text))


def test_notebooks_get_a_fragment_of_each() -> None:
    pruned = _pruned(lnr.Keep(0.5))
    found = lnr.inspect(FixedView(), (torch.randn(2, 1, 8, 8), torch.zeros(2)))
    swept = lnr.sweep(*_problem(), [lnr.Keep(6)])
    fragments = {
        "channels kept": pruned.report._repr_html_(),
        "fixed in the model's forward": found._repr_html_(),
        "Keep(6)": swept._repr_html_(),
    }
    for says, fragment in fragments.items():
        parsed = _Tags(fragment)
        assert says in "".join(parsed.text)
        assert not {"html", "body", "script"} & {tag for tag, *_ in parsed.tags}
    style = (html.FOLDER / "page.css").read_text(encoding="utf-8")
    assert all(line.startswith((".lnr", " ", "")[: 2 if line else 3]) for line in style.splitlines())


@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=8))
def test_an_axis_holds_its_values_and_its_ticks_are_round(values: list[float]) -> None:
    axis = chart.Axis(values, 10.0, 110.0)
    assert all(10 <= axis(value) <= 110 for value in values)
    assert all(axis(a) <= axis(b) for a, b in zip(sorted(values), sorted(values)[1:], strict=False))
    ticks = axis.ticks()
    assert len(ticks) <= 8
    assert all(10 - 1e-6 <= axis(tick) <= 110 + 1e-6 for tick in ticks)


def test_a_chart_leaves_out_what_is_not_finite() -> None:
    drawn = chart.chart({"a": [(0.5, float("nan")), (0.2, 1.0), (0.4, 2.0)]}, "x", "y", float("inf"))
    assert drawn is not None
    assert len(drawn.curves["a"]) == 2
    assert drawn.level is None
    assert chart.chart({"a": [(0.5, float("inf"))]}, "x", "y") is None


def test_a_sweep_is_a_page_with_the_report_of_every_point(tmp_path: Path) -> None:
    swept = lnr.sweep(*_problem(), [lnr.Keep(6), lnr.Keep(3)])
    page = swept.to_html(tmp_path / "s.html", title="My sweep", command="lnr-prune <x>")
    assert (tmp_path / "s.html").read_text(encoding="utf-8") == page
    text = " ".join(_Tags(page).text)
    for says in ("My sweep", "Keep(6)", "Keep(3)", "lnr-prune <x>", f"torch {torch.__version__}"):
        assert says in text
    assert page.count("<h2>Channels</h2>") == 2


def test_stages_add_up_to_the_network_and_are_few() -> None:
    report = _large()
    parts = stages(report.modules)
    assert 1 < len(parts) <= MOST
    assert sum(part.total("params_before") for part in parts) == sum(m.params_before for m in report.modules)
    blocks = [ModuleCost(f"model.layers.{i}.mlp", 9, 5, 9, None) for i in range(40)]
    deep = [ModuleCost("model.embed", 5, 5, 0, None), *blocks, ModuleCost("head", 1, 1, 1, None)]
    names = [part.name for part in stages(deep)]
    assert names == ["model.embed", "model.layers", "head"]
    assert [part.name for part in stages([ModuleCost("", 1, 1, 1, 1)])] == ["the model itself"]
    assert stages([]) == []


def test_what_runs_beside_a_layer_has_a_rail_of_its_own() -> None:
    flow = [("<input>", "a"), ("a", "b"), ("b", "<add_0>"), ("a", "<add_0>"), ("<add_0>", "<output>")]
    found = drawing(flow, {"a": [0], "b": [0]})
    assert [(stop.name, stop.layer, stop.groups) for stop in found.stops] == [
        ("input", False, ()), ("a", True, (0,)), ("b", True, (0,)), ("add", False, (0,)), ("output", False, (0,)),
    ]  # fmt: skip
    lanes = {(rail.start, rail.end): rail.lane for rail in found.rails}
    assert lanes == {(0, 1): 0, (1, 2): 0, (2, 3): 0, (3, 4): 0, (1, 3): 1}
    everything = [(str(i), str(j)) for j in range(30) for i in range(j)]
    assert max(rail.lane for rail in drawing(everything, {}).rails) == rails.MOST
    beside = [rail for rail in drawing([(str(i), str(i + 3)) for i in range(9)], {}).rails if rail.lane]
    for one in beside:
        for other in beside:
            if one is not other and one.lane == other.lane:
                assert one.end <= other.start or other.end <= one.start


SORTED = """
  const channels = all('section').find(section => section.querySelector('h2').innerText === 'Channels');
  const column = () => [...channels.querySelectorAll('tbody tr')];
  const table = column()[0].closest('table'), shown = () => column().filter(row => box(row).height).length;
  const kept = () => column().map(row => parseFloat(row.cells[1].dataset.by));
  const title = [...table.tHead.querySelectorAll('button')].find(b => b.innerText === 'channels kept');
  const before = kept();
  title.click();
  const down = kept();
  title.click();
  const up = kept(), all_rows = shown();
  page.querySelector('.hides').click();
  return {before, down, up, all_rows, touched: shown(), marked: title.closest('th').getAttribute('aria-sort')};
"""


@needs_chromium
def test_a_click_sorts_a_table_and_another_hides_what_stayed_whole() -> None:
    report = _large()
    seen = in_browser(report.to_html(), 1280, SORTED)
    assert seen["down"] == sorted(seen["before"], reverse=True) != seen["before"]
    assert (seen["up"], seen["marked"]) == (sorted(seen["before"]), "ascending")
    touched = sum(group.kept < group.size for group in report.groups)
    assert (seen["all_rows"], seen["touched"]) == (len(report.groups), touched)
    assert 0 < touched < len(report.groups)


@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser_nothing_overflows_or_overlaps(width: int) -> None:
    swept = lnr.sweep(*_problem(), [lnr.Keep(9), lnr.Keep(6), lnr.Keep(3)], retrain=lambda model: model)
    long = "encoder.layers.11.attention.self.a_name_that_is_very_long_indeed." * 3
    note = "no lam keeps exactly 13: 2 groups enter together at lam=0.01: ties resolved by norm"
    for report in (
        _pruned(lnr.Keep(0.5)).report,
        _large(),
        _large(long, note, f"fixed in the model's forward ({long})"),
    ):
        seen = measured(report.to_html(also=[swept]), width)
        assert seen["width"] <= width
        assert (seen["overlaps"], seen["outside"], seen["headings"]) == (0, 0, [*SECTIONS, "Sweep"])
        assert seen["boxes"] > 20
        assert seen["smallest"] >= 12
        assert len(seen["bars"]) >= 5 + len(report.groups)
        assert max(seen["bars"]) > 80

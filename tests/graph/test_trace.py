"""Sizes and numbers that depend on data: what the graph allows is pruned exactly, the rest names the line of code."""

import logging
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lnr_prune as lnr
from lnr_prune.errors import GraphError

HALF = lnr.Keep(0.5)


class Scored(nn.Module):
    """A layer, a score of every sample or token, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.score = nn.Linear(10, 16), nn.Linear(16, 5), nn.Linear(10, 1)

    def positive(self, x: Tensor) -> Tensor:
        return self.score(x).squeeze(-1) > 0


class Masked(Scored):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x).relu()[self.positive(x)])
        return out


class Regulated(Scored):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x).relu().repeat_interleave(self.positive(x).long() + 1, 0))
        return out


class Found(Scored):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x).relu().index_select(0, self.positive(x).nonzero().squeeze(1)))
        return out


class Best(Scored):
    """The ten best, as non-maximum suppression picks them."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x).relu()[self.score(x).squeeze(-1).argsort(descending=True)[:10]])
        return out


class Scaled(Scored):
    """A number that depends on the data scales the outputs."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x).relu()) * self.positive(x).long().sum().item()
        return out


@pytest.mark.parametrize("into", ["copy", "graph"])
@pytest.mark.parametrize(
    ("kind", "shape"), [(Masked, (64, 10)), (Masked, (32, 6, 10)), *((k, (64, 10)) for k in (Regulated, Found, Best))]
)
def test_rows_may_be_picked_by_the_data(kind: type[Scored], shape: tuple[int, ...], into: str) -> None:
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(shape)
    found = lnr.inspect(model, x)
    assert [(group.name, group.size) for group in found.groups] == [("a", 16)]
    assert set(found.frozen) == {"b", "score"}
    pruned = lnr.prune(model, [x], HALF, into=into)
    for samples in (shape[0], 7 if into == "copy" and kind is not Best else shape[0]):
        new = torch.randn(samples, *shape[1:])
        expected = torch.func.functional_call(model, dict(pruned.masked), (new,))
        assert expected.numel()
        torch.testing.assert_close(pruned.model(new), expected, rtol=1e-4, atol=1e-5)


def test_rows_that_the_data_picks_are_counted() -> None:
    torch.manual_seed(0)
    model, x = Masked().eval(), torch.randn(64, 32, 10)
    (group,) = lnr.inspect(model, x).groups
    report = lnr.prune(model, [x], lnr.Budget(macs=0.6, effort=lnr.Effort(samples=32))).report
    saved = report.macs_before - report.macs_after
    assert saved == pytest.approx((16 - report.groups[0].kept) * group.macs, abs=16)
    assert 0.5 < report.macs_after / report.macs_before <= 0.6


class LastMarked(Scored):
    """BART's classifier: what was computed for the last of the tokens that are marked."""

    def forward(self, x: Tensor) -> Tensor:
        h, marked = self.a(x).relu(), x[..., 0] > 1e3
        out: Tensor = self.b(h[marked, :].view(h.size(0), -1, h.size(-1))[:, -1])
        return out


class Rows(Scored):
    """Scores of all tokens in a row, of which some are picked by their number."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x).relu()).flatten(0, 1)[(x[..., 0] > 1e3).flatten().nonzero()[:, 0]]
        return out


@pytest.mark.parametrize("kind", [LastMarked, Rows])
def test_tokens_may_be_picked_by_a_mark(kind: type[Scored]) -> None:
    torch.manual_seed(0)
    model, x, new = kind().eval(), torch.randn(32, 6, 10), torch.randn(5, 7, 10)
    x[:, -1, 0] = new[:, 2, 0] = new[:, -1, 0] = 2e3
    pruned = lnr.prune(model, [x], HALF)
    assert [(group.producers, group.kept) for group in pruned.report.groups] == [(("a",), 8)]
    expected = torch.func.functional_call(model, dict(pruned.masked), (new,))
    assert len(expected) == (5 if kind is LastMarked else 10)
    torch.testing.assert_close(pruned.model(new), expected, rtol=1e-4, atol=1e-2)


def test_a_number_that_depends_on_the_data_may_scale() -> None:
    torch.manual_seed(0)
    model, x = Scaled().eval(), torch.randn(64, 10)
    pruned, new = lnr.prune(model, [x], HALF), torch.randn(33, 10)
    expected = torch.func.functional_call(model, dict(pruned.masked), (new,))
    torch.testing.assert_close(pruned.model(new), expected, rtol=1e-4, atol=1e-4)


class MaskedChannels(Scored):
    """The mask is one over channels: which remain depends on all."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        out: Tensor = self.b(h) * h[h > 0.5].sum()
        return out


class FirstChannels(Scored):
    """So many channels as the data says: in the example all of them."""

    def forward(self, x: Tensor) -> Tensor:
        count = (x[0, 0] > -100).long().item() * 16
        out: Tensor = self.b(torch.where((torch.arange(16) < count).view(1, 16), self.a(x).relu(), 0))
        return out


class FirstRows(Scored):
    """The number of samples is cut, and the number of channels is not."""

    def forward(self, x: Tensor) -> Tensor:
        count = self.positive(x).long().sum().item()
        torch._check(count >= 0)
        torch._check(count <= len(x))
        out: Tensor = self.b(self.a(x).relu()[:count])
        return out


class CutChannels(Scored):
    def forward(self, x: Tensor) -> Tensor:
        count = (x[0, 0] > -100).long().sum().item() * 16
        torch._check(count >= 0)
        torch._check(count <= 16)
        h = self.a(x).relu()
        out: Tensor = self.b(h) + h[:, :count].sum()
        return out


class RepeatedChannels(Scored):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        count = self.positive(x).long().sum().item()
        torch._check(count >= 0)
        h = self.a(x).relu()
        return self.b(h), h.repeat(1, count)


class Chosen(Scored):
    """One layer's channels decide which of another's are picked."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Linear(10, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        out: Tensor = self.b(h.relu()) + self.c(x)[h > 0].sum()
        return out


def test_channels_that_decide_what_is_picked_say_so() -> None:
    found = lnr.inspect(Chosen().eval(), torch.randn(64, 10))
    assert found.groups == ()
    assert found.frozen["a"].startswith("decides what is picked in index (test_trace.py:")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (MaskedChannels, "fixed positions in index"),
        (FirstChannels, "meets a value that belongs to no known channel in where"),
        (CutChannels, "fixed positions in slice"),
        (RepeatedChannels, "their number depends on the data in repeat"),
    ],
)
def test_channels_whose_number_depends_on_the_data_stay(kind: type[Scored], reason: str) -> None:
    found = lnr.inspect(kind().eval(), torch.randn(64, 10))
    assert found.groups == ()
    assert reason in found.frozen["a"]


def test_samples_whose_number_depends_on_the_data_do_not_matter() -> None:
    assert [group.name for group in lnr.inspect(FirstRows().eval(), torch.randn(64, 10)).groups] == ["a"]


class Detect(nn.Module):
    """Strides that are kept in buffers and attributes, and read as numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 4, 1)
        self.stride: Tensor
        self.rows: Tensor
        self.register_buffer("stride", torch.tensor([8.0, 16.0]))
        self.register_buffer("rows", torch.tensor(2))
        self.shift = torch.tensor([3.0])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.norm(self.a(x)).relu())
        y = y * torch.full((1, 1), float(self.stride[0])) + self.shift.item()
        if self.stride.max() > 10:
            y = y + sum(float(each) for each in self.stride) + self.stride.tolist()[1]
        return y.unflatten(1, (int(self.rows), -1))


@pytest.mark.parametrize("into", ["copy", "graph"])
def test_a_constant_buffer_may_be_read_as_a_number(into: str) -> None:
    torch.manual_seed(0)
    model, x = Detect().eval(), torch.randn(16, 3, 9, 9)
    attributes = {name: id(value) for name, value in vars(model).items()}
    pruned = lnr.prune(model, [x], HALF, into=into)
    new = torch.randn(5, 3, 9, 9)
    expected = torch.func.functional_call(model, dict(pruned.masked), (new,))
    torch.testing.assert_close(pruned.model(new), expected, rtol=1e-4, atol=1e-4)
    assert pruned.report.groups[0].kept == 8
    assert {name: id(value) for name, value in vars(model).items()} == attributes


def _sets(rows: Tensor) -> None:
    rows[...] = rows + 0


def _adds(rows: Tensor) -> None:
    rows += 0


WRITES: list[Callable[[Tensor], object]] = [
    lambda rows: rows.add_(1).sub_(1), lambda rows: torch.add(rows, 0, out=rows), _sets, _adds,
    lambda rows: rows.view(1).mul_(1),
]  # fmt: skip


class Counter(Detect):
    """The number changes in the forward, so it is no constant."""

    def __init__(self, write: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        self.write(self.rows)
        y: Tensor = self.b(self.a(x).relu())
        if self.rows > 1:
            return y
        return -y


@pytest.mark.parametrize("write", WRITES)
def test_a_buffer_that_is_written_to_is_no_constant(write: Callable[[Tensor], object]) -> None:
    with pytest.raises(GraphError, match=r"could not trace Counter in its forward at test_trace.py:\d+, `if self.rows"):
        lnr.inspect(Counter(write).eval(), torch.randn(2, 3, 9, 9))


class Heads(nn.Module):
    """A size that is read from a buffer of floats, which no random value may replace."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.sizes = nn.Linear(6, 8), nn.Linear(8, 4), torch.tensor([2.0])
        self.register_buffer("rows", torch.tensor([3.0]))

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(len(x), int(self.rows), int(self.sizes))  # type: ignore[arg-type]
        out: Tensor = self.b(self.a(x.flatten(1)).relu())
        return out


def test_a_size_may_be_read_from_a_buffer() -> None:
    assert [group.name for group in lnr.inspect(Heads().eval(), torch.randn(4, 6)).groups] == ["a"]


class Decides(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


def test_a_decision_on_data_names_the_layer_and_the_line() -> None:
    model = nn.Sequential(nn.Linear(3, 8), Decides(), nn.Linear(8, 2))
    message = (
        r"trace Sequential in layer '1' at test_trace.py:\d+, `return x \* 2 if x.sum\(\) > 0 else x`: .*as Python"
    )
    with pytest.raises(GraphError, match=message):
        lnr.inspect(model, torch.randn(4, 3))


SCRIPT = """
import torch, lnr_prune as lnr
class Net(torch.nn.Module):
    def __init__(self): super().__init__(); self.a = torch.nn.Linear(3, 4)
    def forward(self, x):
        h = self.a(x)
        return h * float(h.sum()) if h.sum() > 0 else h[:, : int(h.sum())]
for verb in (lambda: lnr.inspect(Net(), torch.randn(2, 3)), lambda: lnr.prune(Net(), torch.randn(2, 3), lnr.Keep(0.5))):
    try: verb()
    except lnr.GraphError as error: print("refused")
"""


def test_torchs_own_logs_never_reach_the_terminal(tmp_path: Path) -> None:
    ran = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert ran.stdout.split() == ["refused", "refused"]
    assert ran.stderr == ""


def test_loggers_and_filters_are_as_before(capfd: pytest.CaptureFixture[str]) -> None:
    def now() -> object:
        loggers = [logging.getLogger(name) for name in sorted(logging.root.manager.loggerDict) if "torch" in name]
        return [(each.disabled, each.level, each.propagate, list(each.handlers)) for each in loggers], warnings.filters

    for model in (nn.Sequential(nn.Linear(3, 8), Decides(), nn.Linear(8, 2)), F.silu):
        lnr.inspect(nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2)), torch.randn(4, 3))  # loads what torch loads late
        before = now()
        with pytest.raises((GraphError, TypeError)):
            lnr.inspect(model, torch.randn(4, 3))  # type: ignore[arg-type]
        assert now() == before
    assert capfd.readouterr().err == ""

"""Paths that the first batch does not show: other arguments, other sizes, other methods."""

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import lnr_prune as lnr


class Depth(nn.Module):
    """A second input, if there is one, goes through a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.g, self.o = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(1, 24, 1), nn.Conv2d(24, 2, 1)

    def forward(self, x: Tensor, depth: Tensor | None = None) -> Tensor:
        h = self.a(x)
        if depth is not None:
            h = h + self.g(depth)
        return self.o(h.relu())


class Size(nn.Module):
    """Large images go through one more layer, by a flag even through two."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.g, self.f, self.o = (
            nn.Conv2d(3, 24, 3),
            nn.Conv2d(24, 16, 1),
            nn.Conv2d(16, 24, 1),
            nn.Conv2d(24, 2, 1),
        )

    def forward(self, x: Tensor, deep: bool = False) -> Tensor:
        h = self.a(x).relu()
        if x.shape[-1] > 8 or deep:
            h = self.f(self.g(h).relu()).relu()
        return self.o(h)


class Methods(nn.Module):
    """Methods with layers of their own; one of them cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Sequential(nn.Linear(10, 32), nn.ReLU()), nn.Linear(32, 5)
        self.proj, self.head = nn.Linear(32, 8), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.body(x))
        return out

    def embed(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(self.body(x))
        return out

    def generate(self, x: Tensor, steps: int = 3) -> Tensor:
        for _ in range(steps):
            x = torch.cat([x[:, 5:], self(x)], 1)
            if float(x.sum()) > 1e9:
                break
        return x

    def fixed(self, x: Tensor) -> Tensor:
        return self.body(x).view(-1, 4, 8).sum(1) if float(x.sum()) < 1e9 else x


def images(*sizes: int, **others: Any) -> list[dict[str, Any]]:
    return [{"x": torch.randn(8, 3, size, size), **others} for size in sizes]


@pytest.mark.parametrize(
    ("model", "data", "reached"),
    [
        (Depth(), [*images(12), *images(12, depth=torch.randn(8, 1, 12, 12))], {"a", "g"}),
        (Depth(), [*images(12, depth=torch.randn(8, 1, 12, 12)), *images(12)], {"a", "g"}),
        (Size(), images(6, 12, 6, 12, 8), {"a", "f", "g"}),
        (Size(), [*images(6), *images(6, deep=True)], {"a", "f", "g"}),
    ],
)
def test_what_reads_a_channel_on_any_path_of_the_data_reads_it(
    model: nn.Module, data: Sequence[dict[str, Any]], reached: set[str]
) -> None:
    model.eval()
    pruned = lnr.prune(model, data, lnr.Keep(0.5))
    assert {name for group in pruned.report.groups for name in group.producers} == reached
    assert {layer.name for layer in pruned.report.layers} >= {"o"}
    for batch in data:
        torch.testing.assert_close(
            pruned.model(**batch), functional_call(model, dict(pruned.masked), (), batch), atol=1e-4, rtol=1e-4
        )


def test_a_layer_of_another_path_is_refitted_to_the_batches_that_come_to_it() -> None:
    torch.manual_seed(0)
    model, data, new = Size().eval(), images(6, 12, 6, 12), torch.randn(16, 3, 11, 11)

    def error(**settings: Any) -> float:
        pruned = lnr.prune(model, data, lnr.Keep(0.5), selector="norm", **settings)
        assert settings["refit"] is None or {"g", "f"} <= {layer.name for layer in pruned.report.layers}
        return float((pruned.model(new) - model(new)).square().mean().detach())

    assert error(refit=lnr.Refit()) < 0.7 * error(refit=None)


def test_methods_that_are_named_stay_valid_and_unknown_ones_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model, data = Methods().eval(), [torch.randn(64, 10)]
    with caplog.at_level(logging.WARNING, "lnr_prune"):
        pruned = lnr.prune(model, data, lnr.Keep(0.5))
    (said,) = [record.getMessage() for record in caplog.records if "no call that was traced" in record.getMessage()]
    assert "'proj', 'head'" in said
    assert "not used" in pruned.report.frozen["proj"]
    with pytest.raises(RuntimeError):
        Methods.embed(pruned.model, torch.randn(2, 10))  # type: ignore[arg-type]

    also = {"embed": [torch.randn(2, 10)], "generate": [torch.randn(2, 10)]}
    caplog.clear()
    with caplog.at_level(logging.WARNING, "lnr_prune"):
        pruned = lnr.prune(model, data, lnr.Keep(0.5), also=also)
    assert any("generate() with inputs of shape (2, 10) could not be traced" in r.getMessage() for r in caplog.records)
    assert [group.kept for group in pruned.report.groups] == [16]
    whole = Methods().eval()
    whole.load_state_dict({**model.state_dict(), **pruned.masked})
    for method in ("forward", "embed", "generate"):
        x = torch.randn(4, 10)
        torch.testing.assert_close(getattr(pruned.model, method)(x), getattr(whole, method)(x), atol=1e-4, rtol=1e-4)


def test_channels_whose_number_a_named_method_fixes_stay() -> None:
    found = lnr.inspect(Methods().eval(), torch.randn(2, 10), also={"fixed": [torch.randn(2, 10)]})
    assert found.groups == ()
    assert "fixed in the model's forward" in found.frozen["body.0"]
    with pytest.raises(lnr.GraphError, match=r"no channel that can be pruned.*body\.0: its sizes"):
        lnr.prune(Methods().eval(), [torch.randn(2, 10)], lnr.Keep(0.5), also={"fixed": [torch.randn(2, 10)]})


@pytest.mark.parametrize(
    ("also", "error", "words"),
    [
        ({"embd": [1]}, ValueError, "'embd', which is no method of Methods"),
        ({"embed": torch.zeros(2, 10)}, TypeError, r"a list of batches for embed\(\), got Tensor"),
        ({"embed": [torch.zeros(2, 9)]}, lnr.CalibrationError, r"inputs of shape \(2, 9\)"),
    ],
)
def test_what_else_is_given_is_refused(also: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        lnr.prune(Methods().eval(), [torch.randn(8, 10)], lnr.Keep(0.5), also=also)


def test_a_graph_has_one_path(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="cannot be combined with into='graph'"):
        lnr.prune(
            Methods().eval(), [torch.randn(8, 10)], lnr.Keep(0.5), into="graph", also={"embed": [torch.ones(2, 10)]}
        )
    with caplog.at_level(logging.WARNING, "lnr_prune"):
        pruned = lnr.prune(
            Depth().eval(), [*images(12), *images(12, depth=torch.randn(8, 1, 12, 12))], lnr.Keep(0.5), into="graph"
        )
    assert any("the path of the first batch only" in record.getMessage() for record in caplog.records)
    assert pruned.model(**images(12)[0]).shape == (8, 2, 12, 12)

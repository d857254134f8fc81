"""A run as a file, for the command line and for Python; and the pruned model as a program."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import lnr_prune as lnr
from lnr_prune.cli.export import export
from lnr_prune.cli.main import app
from lnr_prune.cli.models import build
from lnr_prune.errors import VerificationError
from lnr_prune.settings import Amount

NETS = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))
"""
RUN = ("prune", "nets.py:net", "--data", "x.npy", "--samples", "64")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "nets.py").write_text(NETS, encoding="utf-8")
    np.save("x.npy", np.random.default_rng(0).normal(size=(96, 6)))
    return tmp_path


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "TERM": "dumb"})


def sizes(*arguments: str) -> list[int]:
    done = run("prune", *arguments, "--dry-run", "--json")
    assert done.exit_code == 0, done.output
    return [group["kept"] for group in json.loads(done.stdout)["report"]["groups"]]


def test_a_run_is_written_and_read_and_what_is_typed_counts_more() -> None:
    how = ("--keep", "0=4", "--keep", "2=0.5", "--selector", "backward", "--swaps", "2", "--out", "m.safetensors")
    done = run(*RUN, *how, "--recipe", "run.yaml")
    assert done.exit_code == 0, done.output
    assert "wrote run.yaml" in done.stdout
    written = Path("run.yaml").read_text(encoding="utf-8")
    assert "samples: 64" in written
    Path("m.safetensors").unlink()

    again = run("prune", "--recipe", "run.yaml")
    assert again.exit_code == 0, again.output
    assert Path("m.safetensors").exists()
    assert Path("run.yaml").read_text(encoding="utf-8") == written
    assert sizes("--recipe", "run.yaml") == [4, 6]
    assert sizes("--recipe", "run.yaml", "--keep", "3") == [3, 3]

    recipe = lnr.Recipe.load("run.yaml")
    assert recipe == lnr.Recipe(lnr.Keep({"0": 4, "2": 0.5}), selector=lnr.Backward(swaps=2))
    pruned = recipe.prune(build("nets.py:net"), [torch.randn(64, 6)])
    assert [group.kept for group in pruned.report.groups] == [4, 6]


def test_nothing_is_written_by_a_dry_run() -> None:
    assert run(*RUN, "--keep", "0.5", "--dry-run", "--recipe", "run.yaml").exit_code == 0
    assert not Path("run.yaml").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("mac: 0.5", "'mac' is no option of this command"),
        ("- 1", "expected options"),
        ("a: [", "is not YAML"),
        ("run: 3", "run holds 3"),
        ("macs: 7", "must"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(text: str, says: str) -> None:
    Path("run.yaml").write_text(text, encoding="utf-8")
    done = run(*RUN, "--recipe", "run.yaml", "--dry-run")
    assert done.exit_code == 2
    assert says in done.output


@pytest.mark.parametrize(
    "recipe",
    [
        lnr.Recipe(lnr.Keep(0.25), logits=True, into="graph"),
        lnr.Recipe(lnr.Penalty(ratio={"0": 1e-3}), bias=False, refit=None),
        lnr.Recipe(
            lnr.Budget(macs=0.5, size=0.7, grid=lnr.Grid(8, 2, ("0",)), effort=lnr.Effort(samples=64, search=3)),
            selector=lnr.Random(seed=3),
            refit=lnr.Refit(ridge=1e-9, window=2, iterations=3),
        ),
        lnr.Recipe(lnr.Budget(error=0.01, uniform=True), selector="norm"),
    ],
)
def test_a_recipe_survives_its_file(recipe: lnr.Recipe) -> None:
    recipe.save("r.yaml")
    back = lnr.Recipe.load("r.yaml")
    assert (back.amount, back.refit, back.bias) == (recipe.amount, recipe.refit, recipe.bias)
    assert (back.logits, back.into, back.options) == (recipe.logits, recipe.into, recipe.options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "expected one amount"),
        ({"keep": 0.5, "macs": 0.5}, "got Keep and Budget"),
        ({"keep": 0.5, "swops": 2}, "unknown option 'swops'; .*swaps"),
        ({"keep": 0.5, "swaps": 2}, "unknown option 'swaps'"),
        ({"keep": 0.5, "selector": "bakward"}, "backward"),
    ],
)
def test_options_that_are_no_recipe_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        lnr.Recipe.of(options)


def test_numbers_that_yaml_takes_for_text_are_numbers() -> None:
    Path("r.yaml").write_text("lam-ratio: 1e-3", encoding="utf-8")
    assert lnr.Recipe.load("r.yaml").amount == lnr.Penalty(ratio=1e-3)


def test_objects_of_ones_own_are_not_written() -> None:
    class Mine:
        def choose(self, candidates: Any, count: int) -> Any:
            raise NotImplementedError

    amount: Amount = lnr.Keep(0.5)
    with pytest.raises(ValueError, match="not one of the library's"):
        lnr.Recipe(amount, selector=Mine()).save("r.yaml")
    with pytest.raises(ValueError, match="give it in Python"):
        lnr.Recipe(amount, selector=lnr.Lasso(lnr.Fista())).save("r.yaml")


def test_a_program_computes_the_same_for_any_batch() -> None:
    done = run(*RUN, "--keep", "0.5", "--out", "m.safetensors", "--export", "m.pt2")
    assert done.exit_code == 0, done.output
    assert "wrote m.pt2" in done.stdout
    x = torch.randn(7, 6)
    program = torch.export.load("m.pt2").module()
    small = lnr.load("m.safetensors", build("nets.py:net"))
    torch.testing.assert_close(program(x), small(x))


def test_a_program_that_computes_something_else_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lnr_prune.cli.export._pt2", lambda program, part, call: [torch.zeros(2, 3)])
    with pytest.raises(VerificationError, match="differ"):
        export(Path("m.pt2"), build("nets.py:net"), ((torch.randn(2, 6),), {}))
    assert not Path("m.pt2").exists()


def test_what_cannot_be_exported_is_refused_at_once() -> None:
    done = run(*RUN, "--keep", "0.5", "--out", "m.safetensors", "--export", "m.tflite")
    assert done.exit_code == 2
    assert "ends in .pt2" in done.output
    if importlib.util.find_spec("onnx") is None:
        done = run(*RUN, "--keep", "0.5", "--out", "m.safetensors", "--export", "m.onnx")
        assert done.exit_code == 1
        assert "pip install onnx" in done.output


@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="needs onnx and onnxscript")
@pytest.mark.filterwarnings("ignore")  # of onnxscript
def test_onnx_computes_the_same() -> None:
    done = run(*RUN, "--keep", "0.5", "--out", "m.safetensors", "--export", "m.onnx")
    assert done.exit_code == 0, done.output
    assert Path("m.onnx").stat().st_size > 100


def test_a_tolerance_is_kept_in_a_recipe(tmp_path: Path) -> None:
    for amount in (lnr.Tolerance(), lnr.Tolerance(drop=0.02, of="params", grid=lnr.Grid(round_to=8))):
        lnr.Recipe(amount).save(tmp_path / "run.yaml")
        assert lnr.Recipe.load(tmp_path / "run.yaml").amount == amount
    with pytest.raises(ValueError, match="a recipe cannot hold"):
        lnr.Recipe(lnr.Tolerance(lambda model: 1.0)).save(tmp_path / "run.yaml")

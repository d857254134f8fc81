"""The command line: help for everything, the session from given weights, exit code 2 for mistakes."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import typer
from safetensors.torch import save_file
from typer.testing import CliRunner

from lnr_prune import __version__
from lnr_prune.cli.main import EXAMPLES, app
from lnr_prune.recipes.lenet5 import initialised

WIDE = {"COLUMNS": "300", "TERM": "dumb"}


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output.strip()) == (0, f"lnr-prune {__version__}")


@pytest.mark.parametrize("name", ["inspect", "prune", "report", "bench", "lenet5"])
def test_every_command_explains_itself(name: str) -> None:
    command: Any = typer.main.get_command(app)
    of = command.get_command(command.make_context("lnr-prune", [name]), name)
    assert [parameter.name for parameter in of.params if not parameter.help] == []
    result = CliRunner().invoke(app, [name, "--help"], env=WIDE)
    assert result.exit_code == 0
    for option in (flag for parameter in of.params for flag in parameter.opts if flag.startswith("--")):
        assert option in result.output
    examples = {function.__name__: lines for function, lines in EXAMPLES.items()}
    assert name in examples or name == "lenet5"
    for line in examples.get(name, ()):
        words = line.split()
        if words[0] == "lnr-prune":  # what an example names is there
            named = command.get_command(None, words[1])
            flags = {flag for parameter in named.params for flag in parameter.opts}
            assert {word for word in words if word.startswith("--")} <= flags
            assert line.strip() in result.output


def test_help_explains_every_option() -> None:
    command = typer.main.get_command(app)
    lenet5 = command.get_command(command.make_context("lnr-prune", ["lenet5"]), "lenet5")  # type: ignore[attr-defined]
    assert len(lenet5.params) == 14
    assert [p.name for p in lenet5.params if not p.help] == []
    result = CliRunner().invoke(app, ["lenet5", "--help"], env=WIDE)
    assert result.exit_code == 0
    assert "--no-retrain" in result.output
    assert "LNR_PRUNE_DATA" in result.output


def test_lenet5_from_given_weights(tmp_path: Path) -> None:
    """Untrained weights are a hard case: nothing to learn, still no crash."""
    weights, out = tmp_path / "weights.safetensors", tmp_path / "deep" / "results"
    save_file(initialised(0).state_dict(), weights)
    options = ["--quick", "--sweep", "2", "--no-retrain", "--weights", str(weights), "--out", str(out)]
    result = CliRunner().invoke(app, ["lenet5", *options], env=WIDE)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert not any(line.startswith("Epoch") for line in lines)
    assert lines[-6:] == [
        f"wrote {out / name}"
        for name in (
            "report.html",
            "pareto.png",
            "convergence.png",
            "results.json",
            "dense.safetensors",
            "pruned.safetensors",
        )
    ]
    assert {path.name for path in out.iterdir()} == {Path(line).name for line in lines[-6:]}
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["dense"]["train_accuracies"] == []
    assert results["sweeps"]["fc2"][0]["accuracy_retrained"] is None
    assert all(c["sparse_accuracy"] == c["collapsed_accuracy"] for c in results["compressions"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "cats"], "unknown data set: got 'cats', expected one of digits, mnist, fashion"),
        (["--data", "mnist"], "no folder for the data set 'mnist'"),
        (["--data", "mnist", "--data-root", "nowhere"], "the data folder must exist: got 'nowhere'"),
        (["--weights", "nowhere"], "could not load 'nowhere'"),
        (["--out", "file/results"], "cannot write to 'file/results'"),
        (["--epochs", "0"], "epochs must be at least 1, got 0"),
        (["--lam", "-1"], "lam must be positive and finite, got -1"),
        (["--device", "abacus"], "cannot use the device 'abacus'"),
        (["--colour", "red"], "No such option"),
    ],
)
def test_mistakes_exit_with_2_and_say_what_to_do(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LNR_PRUNE_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("", encoding="utf-8")
    result = CliRunner().invoke(app, ["lenet5", *options], env=WIDE)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize(
    ("options", "level"), [(["-v"], "INFO"), (["-q"], "ERROR"), (["--log-level", "debug"], "DEBUG")]
)
def test_what_is_said_on_the_way_can_be_chosen(options: list[str], level: str) -> None:
    logger = logging.getLogger("lnr_prune")
    before = logger.level
    try:
        assert CliRunner().invoke(app, [*options, "demo", "cn"], env=WIDE).exit_code == 2
        assert logging.getLevelName(logger.level) == level
    finally:
        logger.setLevel(before)


def test_levels_that_contradict_each_other_are_refused() -> None:
    for options in (["-v", "-q"], ["--log-level", "loud"]):
        assert CliRunner().invoke(app, [*options, "demo", "mlp"], env=WIDE).exit_code == 2

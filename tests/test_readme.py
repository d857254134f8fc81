"""The README is true: its code runs, its commands exist."""

import logging
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import lnr_prune as lnr
from lnr_prune.cli.main import app
from lnr_prune.recipes import demo

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs_and_is_worth_reading(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """On real data, without a warning, and with the numbers that the README shows."""
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    found: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), found)
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []
    printed = " ".join(capsys.readouterr().out.split())
    before, after = map(float, re.findall(r"accuracy ([\d.]+) -> ([\d.]+)", printed)[0])
    assert before > 0.97
    assert after > before - 0.02
    report = found["pruned"].report
    assert report.macs_after <= 0.25 * report.macs_before
    assert f"MACs per sample {report.macs_before:,} ->" in README
    assert Path("report.html").exists()
    assert torch.equal(
        lnr.load("small.safetensors", demo.cnn())(found["data"].test_images[:2]),
        found["pruned"].model(found["data"].test_images[:2]),
    )


COMMANDS = re.findall(r"^\$ (.*?)(?: +#.*)?$", README, re.MULTILINE) + re.findall(r"`(make \w+)`", README)


def test_the_commands_are_there() -> None:
    assert {"make demo", "make test"} <= set(COMMANDS)


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("make")])
def test_make_knows_its_targets(command: str) -> None:
    # make test runs this very test: a dry run shows that all it needs is there
    subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("command", re.findall(r"`lnr-prune ([^`]*)`", README))
def test_the_command_line_knows_its_commands(command: str) -> None:
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("path", re.findall(r"\]\((?!https:)([^)]+)\)", README))
def test_links_lead_somewhere(path: str) -> None:
    assert (ROOT / path).exists()


def test_the_picture_is_of_the_table() -> None:
    rows = runpy.run_path(str(ROOT / "docs" / "picture.py"))["ROW"].findall(README)
    assert len(rows) == 4
    picture = (ROOT / "docs" / "lenet5.svg").read_text(encoding="utf-8")
    assert len(picture) < 100_000
    assert "; ".join(map(" ".join, rows)) in picture, "draw it again: python docs/picture.py"


@pytest.mark.parametrize("script", sorted(set(re.findall(r"python (benchmarks/\S+\.py)", README))))
def test_the_benchmarks_start(script: str) -> None:
    subprocess.run([sys.executable, ROOT / script, "--help"], cwd=ROOT, check=True, capture_output=True)

"""The README is true: its code runs, its commands exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lnr_prune.cli.main import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert "parameters" in capsys.readouterr().out
    assert len(torch.load("small.pt", weights_only=True)["4.weight"]) < 32


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


@pytest.mark.parametrize("path", re.findall(r"\]\(([^)]+)\)", README))
def test_links_lead_somewhere(path: str) -> None:
    assert (ROOT / path).exists()


def test_the_picture_is_of_the_table() -> None:
    rows = re.findall(r"^\| ([\d.]+) % \| \**([\d.]+)\** \| ([\d.]+) \|$", README, re.MULTILINE)
    picture = (ROOT / "docs" / "lenet5.svg").read_text(encoding="utf-8")
    assert len(picture) < 100_000
    assert "; ".join(map(" ".join, rows)) in picture, "draw it again: python docs/picture.py"


@pytest.mark.parametrize("script", sorted(set(re.findall(r"python (benchmarks/\S+\.py)", README))))
def test_the_benchmarks_start(script: str) -> None:
    subprocess.run([sys.executable, ROOT / script, "--help"], cwd=ROOT, check=True, capture_output=True)

"""The demonstrations: small networks that learn the digits within seconds, and keep what they have learnt."""

import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from lnr_prune.cli.main import app
from lnr_prune.recipes import demo
from lnr_prune.recipes.data import load
from lnr_prune.recipes.lenet5 import accuracy


def test_half_of_the_mlp_knows_the_digits_as_well() -> None:
    report = demo.run("mlp", 0.5, epochs=3)
    before, after = report.metrics["test accuracy"]
    assert before > 0.9
    assert after > before - 0.01
    assert report.macs_after <= 0.5 * report.macs_before


@pytest.mark.parametrize("name", demo.NETWORKS)
def test_every_network_learns(name: str) -> None:
    data = load("digits")
    model = demo.trained(name, data, epochs=1)
    assert not model.training
    assert accuracy(model, data) > 0.5
    state = torch.random.get_rng_state()
    demo.trained(name, data, epochs=0)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_an_unknown_one_is_answered_with_the_nearest() -> None:
    done = CliRunner().invoke(app, ["demo", "cn"], env={"COLUMNS": "200"})
    assert done.exit_code == 2
    assert "no demo 'cn'" in done.output
    assert "cnn" in done.output


def test_the_shell_completes_commands_and_options() -> None:
    command = [sys.executable, "-c", "from lnr_prune.cli.main import app; app(prog_name='lnr-prune')"]

    def completed(typed: str) -> str:
        words = {
            "COMP_WORDS": typed,
            "COMP_CWORD": str(len(typed.split(" ")) - 1),
            "_LNR_PRUNE_COMPLETE": "complete_bash",
        }
        environment = {**os.environ, **words, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout

    assert "prune" in completed("lnr-prune pr").split()
    assert "--recipe" in completed("lnr-prune prune --rec").split()

"""The sub-commands: from files to a smaller file, exit codes, and what an interruption leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import lnr_prune as lnr
from lnr_prune.cli.console import in_options
from lnr_prune.cli.main import app
from lnr_prune.cli.models import build
from lnr_prune.cli.options import amount, selector_of, shape_of
from lnr_prune.collapse.files import report_of

NETS = """
import pathlib, time
import torch
from torch import nn

CALLS = []

class Net(nn.Module):
    def __init__(self, width=8, stop=0):
        super().__init__()
        print("a message from the factory")
        torch.manual_seed(0)
        self.stop = stop
        self.first, self.second = nn.Conv2d(3, width, 3), nn.Conv2d(width, 12, 3)
        self.last = nn.Linear(12, 5)

    def forward(self, x):
        CALLS.append(None)
        if len(CALLS) == self.stop:  # until the test says so
            pathlib.Path("stopped").touch()
            while not pathlib.Path("go").exists():
                time.sleep(0.01)
        return self.last(self.second(self.first(x).relu()).relu().mean((2, 3)))
"""
MODEL, DATA = "nets.py:Net", ("--data", "x.npy")
WIDE = {"COLUMNS": "200", "TERM": "dumb"}
HOUR = 3600.0  # only a process that hangs takes so long


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a model, trained weights and inputs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "nets.py").write_text(NETS, encoding="utf-8")
    np.save("x.npy", np.random.default_rng(0).normal(size=(96, 3, 8, 8)))
    generator = torch.Generator().manual_seed(7)
    model = build(MODEL)
    save_file(
        {k: torch.randn(v.shape, generator=generator) / 5 for k, v in model.state_dict().items()}, "w.safetensors"
    )
    return tmp_path


def run(*arguments: str) -> Any:
    """In this process."""
    return CliRunner().invoke(app, arguments, env=WIDE)


def shell(*arguments: str, **options: Any) -> "subprocess.Popen[str]":
    """In a process of its own."""
    command = [sys.executable, "-c", "from lnr_prune.cli.main import main; main()", *arguments]
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


def test_from_files_to_a_smaller_file() -> None:
    options = (*DATA, "--weights", "w.safetensors", "--keep", "first=3", "--keep", "second=0.5", "--samples", "64")
    done = run(
        "prune",
        MODEL,
        *options,
        "--out",
        "m.safetensors",
        "--report-html",
        "r.html",
        "--selector",
        "backward",
        "--swaps",
        "2",
    )
    assert done.exit_code == 0, done.output
    assert "wrote m.safetensors" in done.stdout
    assert "wrote r.html" in done.stdout
    assert "parameters" in done.stdout
    small: Any = lnr.load("m.safetensors", build(MODEL))
    assert (small.first.out_channels, small.second.out_channels) == (3, 6)

    from lnr_prune.cli.data import Source, batches

    data = batches(Source(Path("x.npy"), samples=64))
    model = build(MODEL, weights=Path("w.safetensors"))
    alone = lnr.prune(model, data, lnr.Keep({"first": 3, "second": 0.5}), selector=lnr.Backward(swaps=2))
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(small(x), alone.model(x), rtol=0, atol=0)
    assert report_of("m.safetensors") == alone.report
    assert "<h2>Channels</h2>" in Path("r.html").read_text(encoding="utf-8")

    shown = run("report", "m.safetensors", "--html", "again.html")
    assert shown.exit_code == 0, shown.output
    assert "second" in shown.stdout
    assert Path("again.html").exists()
    plain = json.loads(run("report", "m.safetensors", "--json").stdout)
    assert plain["params_after"] == alone.report.params_after

    timed = run(
        "bench", MODEL, "m.safetensors", "--weights", "w.safetensors", "--shape", "3,8,8", "--batch-size", "1",
        "--batch-size", "4", "--threads", "1", "--rounds", "3", "--json",
    )  # fmt: skip
    assert timed.exit_code == 0, timed.output
    found = json.loads(timed.stdout)
    assert found["parameters"] == [alone.report.params_before, alone.report.params_after]
    assert found["macs"] == [alone.report.macs_before, alone.report.macs_after]
    assert [(r["batch_size"], r["threads"]) for r in found["seconds"]] == [(1, 1), (4, 1)]
    assert all(r["original"] > 0 and r["pruned"] > 0 for r in found["seconds"])


def test_bench_prints_a_table_and_reads_data() -> None:
    assert run("prune", MODEL, *DATA, "--keep", "0.5", "--out", "m.safetensors").exit_code == 0
    before = torch.get_num_threads()
    done = run("bench", MODEL, "m.safetensors", *DATA, "--batch-size", "2", "--threads", "2", "--rounds", "1")
    assert done.exit_code == 0, done.output
    assert "median time, 2 samples, 2 threads" in done.stdout
    assert torch.get_num_threads() == before


def test_a_graph_is_saved_and_timed_too() -> None:
    done = run("prune", MODEL, *DATA, "--keep", "0.5", "--into", "graph", "--out", "m.safetensors")
    assert done.exit_code == 0, done.output
    timed = run("bench", MODEL, "m.safetensors", "--shape", "3,8,8", "--batch-size", "2", "--rounds", "1")
    assert timed.exit_code == 0, timed.output


def test_json_is_all_that_is_on_the_standard_output() -> None:
    done = run(
        "prune",
        MODEL,
        *DATA,
        "--macs",
        "0.6",
        "--minimum",
        "2",
        "--leave",
        "second",
        "--out",
        "m.safetensors",
        "--json",
    )
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["out"] == "m.safetensors"
    assert result["report"]["macs_after"] <= 0.6 * result["report"]["macs_before"]
    assert {row["name"]: row["kept"] for row in result["report"]["groups"]}["second"] == 12
    assert "a message from the factory" in done.stderr
    assert "statistics ..." in done.stderr.splitlines()  # a plain line, as there is no terminal


def test_a_dry_run_writes_nothing(folder: Path) -> None:
    before = {path.name for path in folder.iterdir()}
    done = run("prune", MODEL, *DATA, "--keep", "0.5", "--dry-run", "--report-html", "r.html")
    assert done.exit_code == 0, done.output
    assert "parameters" in done.stdout
    assert {path.name for path in folder.iterdir()} - before <= {"__pycache__"}


def test_the_seed_draws_the_samples() -> None:
    def kept(seed: str) -> Any:
        done = run("prune", MODEL, *DATA, "--keep", "0.5", "--samples", "40", "--seed", seed, "--dry-run", "--json")
        return json.loads(done.stdout)["report"]["error"]

    assert kept("1") == kept("1") != kept("2")


def test_a_window_of_two_leaves_less_of_an_error() -> None:
    def error(*options: str) -> float:
        done = run("prune", MODEL, *DATA, "--keep", "0.5", *options, "--dry-run", "--json")
        return float(json.loads(done.stdout)["report"]["error"])

    assert error("--window", "2", "--iterations", "5") < error()


def test_the_same_command_writes_the_same_bytes() -> None:
    for name in ("a.safetensors", "b.safetensors"):
        assert run("prune", MODEL, *DATA, "--keep", "0.5", "--selector", "random", "--out", name).exit_code == 0
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()


def test_inspect(folder: Path) -> None:
    done = run("inspect", MODEL, "--model-arg", "width=6", "--shape", "3,8,8", "--draw", "groups.dot", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [(group["name"], group["size"]) for group in found["groups"]] == [("first", 6), ("second", 12)]
    assert found["frozen"] == {"last": "output of the model"}
    assert "digraph" in (folder / "groups.dot").read_text(encoding="utf-8")
    assert "output of the model" in run("inspect", MODEL, *DATA).stdout


MISTAKES = [
    ([*DATA, "--keep", "0.5"], 2, "give --out"),
    ([*DATA, "--dry-run"], 2, "Give one of --keep"),
    ([*DATA, "--dry-run", "--keep", "0.5", "--macs", "0.5"], 2, "got keep and budget"),
    ([*DATA, "--dry-run", "--macs", "0.5", "--tolerance", "0.1"], 2, "got budget and tolerance"),
    ([*DATA, "--dry-run", "--tolerance", "-1"], 2, "--tolerance must be >= 0"),
    ([*DATA, "--dry-run", "--keep", "half"], 2, "--keep takes a number"),
    ([*DATA, "--dry-run", "--keep", "0.5", "--keep", "0.2"], 2, "LAYER=NUMBER"),
    (
        [*DATA, "--dry-run", "--keep", "fist=3"],
        2,
        "--keep names 'fist', which is not a prunable producer; did you mean first?",
    ),
    ([*DATA, "--dry-run", "--keep", "0.5", "--round-to", "8"], 2, "--round-to belongs to a budget"),
    ([*DATA, "--dry-run", "--macs", "1.5"], 2, "--macs must be a fraction"),
    ([*DATA, "--dry-run", "--macs", "0.01"], 2, "out of reach"),
    ([*DATA, "--dry-run", "--keep", "0.5", "--selector", "luck"], 2, "--selector: unknown selector 'luck'"),
    ([*DATA, "--dry-run", "--keep", "0.5", "--swaps", "8"], 2, "--swaps belongs to --selector backward"),
    ([*DATA, "--dry-run", "--keep", "0.5", "--window", "3"], 2, "--window must be 1 (each layer by itself) or 2"),
    ([*DATA, "--dry-run", "--keep", "0.5", "--into", "model"], 2, "the command never changes the model that it reads"),
    ([*DATA, "--dry-run", "--keep", "0.5", "--iterations", "5"], 2, "--iterations belongs to --window 2"),
    ([*DATA, "--dry-run", "--keep", "0.5", "--into", "onnx"], 2, "--into must be one of copy, model, graph"),
    ([*DATA, "--dry-run", "--keep", "0.5", "--mean", "red"], 2, "--mean takes numbers"),
    ([*DATA, "--keep", "0.5", "--out", "nowhere/m.safetensors"], 2, "a folder that exists"),
    ([*DATA, "--keep", "0.5", "--weights", "w.safetensors", "--out", "w.safetensors"], 2, "would overwrite"),
    ([*DATA, "--keep", "0.5", "--out", "m.html", "--report-html", "./m.html"], 2, "name the same file"),
    ([*DATA, "--keep", "0.5", "--dry-run", "--device", "abacus"], 1, "cannot use the device 'abacus'"),
    (["--data", "nowhere.npy", "--dry-run", "--keep", "0.5"], 2, "does not exist"),
    (["--data", "nets.py", "--dry-run", "--keep", "0.5"], 2, "cannot tell what nets.py holds"),
    (["--data", "bad.npy", "--dry-run", "--keep", "0.5"], 1, "cannot read bad.npy"),
    (["--data", "flat.npy", "--dry-run", "--keep", "0.5"], 1, "does not accept inputs of shape"),
    ([*DATA, "--dry-run", "--keep", "0.5", "--weights", "bad.npy"], 1, "cannot load bad.npy into Net"),
    ([*DATA, "--dry-run", "--keep", "0.5", "--model-arg", "depth=3"], 1, "failed with TypeError"),
    ([*DATA, "--dry-run", "--keep", "0.5", "--model-arg", "width=wide"], 2, "must be JSON"),
]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    MISTAKES,
    ids=lambda value: " ".join(map(str, value))[-60:] if isinstance(value, list) else None,
)
def test_mistakes_say_what_to_do(options: list[str], code: int, message: str, folder: Path) -> None:
    (folder / "bad.npy").write_bytes(b"\x93NUMPY no")
    np.save("flat.npy", np.zeros((4, 7), dtype=np.float32))
    before = {path.name for path in folder.iterdir()}
    done = run("prune", MODEL, *options)
    assert done.exit_code == code, done.output
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert done.stdout == ""
    assert {path.name for path in folder.iterdir()} - before <= {"__pycache__"}


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("budget size must be a number", "--size must be a number"),
        ("round_to must be at least 1", "--round-to must be at least 1"),
        ("Free memory, or give run=Run(low_memory=True), which needs 1 GB", "give --low-memory, which needs 1 GB"),
        ("or leave that group whole: Keep({name: ...}) names", "--keep LAYER=NUMBER names"),
        ("it cannot be combined with into='graph'; limit", "combined with --into graph; limit"),
        ("Give batches, or lnr_prune.Batches(data, inputs)", "Give batches"),
        ("the penalty keeps a layer whole", "the penalty keeps a layer whole"),
    ],
)
def test_errors_speak_of_options(message: str, said: str) -> None:
    assert in_options(message).endswith(said)


@pytest.mark.parametrize("command", [["report", "x.npy"], ["bench", MODEL, "x.npy", "--shape", "3,8,8"]])
def test_files_that_hold_no_pruned_model_exit_with_1(command: list[str]) -> None:
    done = run(*command)
    assert done.exit_code == 1
    assert "error: x.npy" in done.stderr


def test_a_file_of_another_model_exits_with_1() -> None:
    assert run("prune", MODEL, *DATA, "--keep", "0.5", "--out", "m.safetensors").exit_code == 0
    done = run("bench", MODEL, "m.safetensors", "--model-arg", "width=9", "--shape", "3,8,8")
    assert done.exit_code == 1
    assert "error: m.safetensors" in done.stderr


def test_random_inputs_need_a_shape() -> None:
    assert "give --shape" in run("inspect", MODEL).stderr
    assert "vocab_size" in run("inspect", MODEL, "--tokens", "5").stderr
    with pytest.raises(ValueError, match="positive"):
        shape_of("3,0")


def test_amounts_are_those_of_the_api() -> None:
    none: dict[str, Any] = {"keep": None, "lam": None, "lam_ratio": None}

    def kept(text: str) -> Any:
        asked = amount({**none, "keep": [text]}, {}, {}, {})
        assert isinstance(asked, lnr.Keep)
        return asked.channels

    assert kept("8") == 8
    assert isinstance(kept("1"), int)  # one channel, not all
    assert isinstance(kept("1.0"), float)
    assert amount({**none, "lam": ["a.b=1e-3", "c=2"]}, {}, {}, {}) == lnr.Penalty({"a.b": 1e-3, "c": 2})
    assert amount({**none, "lam_ratio": ["0.1"]}, {"macs": None}, {}, {}) == lnr.Penalty(ratio=0.1)
    limits = {"params": 0.5, "macs": None, "size": 0.4}
    grid, effort = {"round_to": 8, "minimum": None, "leave": ("a",)}, {"refits": 4, "search": None}
    wanted = lnr.Budget(params=0.5, size=0.4, grid=lnr.Grid(round_to=8, leave=("a",)), effort=lnr.Effort(refits=4))
    assert amount(none, limits, grid, effort) == wanted
    assert amount(none, {}, {"round_to": 8}, {}, 0.02) == lnr.Tolerance(drop=0.02, grid=lnr.Grid(round_to=8))


def test_selectors_are_those_of_the_api() -> None:
    assert selector_of("backward", 8, 0) == lnr.Backward(swaps=8)
    assert selector_of("random", None, 3) == lnr.Random(seed=3)
    assert selector_of("norm", None, 3) == "norm"


def test_a_real_process_prints_plain_lines_and_exits_with_0() -> None:
    process = shell("prune", MODEL, *DATA, "--keep", "0.5", "--out", "m.safetensors", "--json")
    out, err = process.communicate(timeout=HOUR)
    assert process.returncode == 0, err
    assert json.loads(out)["out"] == "m.safetensors"
    assert [line for line in err.splitlines() if line.endswith(" ...")] == [
        "statistics ...",
        "selecting ...",
        "refitting ...",
    ]


@pytest.mark.parametrize("writer", ["lnr_prune.collapse.files.save_file", "pathlib.Path.write_text"])
def test_an_interrupted_writing_leaves_what_was_there(
    writer: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(*arguments: Any, **options: Any) -> None:
        target = next(each for each in arguments if isinstance(each, str | Path) and str(each).endswith(".part"))
        Path(target).write_bytes(b"half")
        raise KeyboardInterrupt

    Path("m.safetensors").write_bytes(b"old")
    Path("r.html").write_bytes(b"old")
    before = {path.name for path in folder.iterdir()}
    monkeypatch.setattr(writer, half)
    done = run("prune", MODEL, *DATA, "--keep", "0.5", "--out", "m.safetensors", "--report-html", "r.html")
    assert done.exit_code == 130
    assert Path("r.html").read_bytes() == b"old"
    assert (Path("m.safetensors").read_bytes() == b"old") == ("save_file" in writer)
    assert {path.name for path in folder.iterdir()} - before <= {"__pycache__"}


@pytest.mark.parametrize(("stage", "call"), [("statistics ...", 20), ("refitting ...", 100)])
def test_an_interruption_exits_with_130_and_leaves_nothing(stage: str, call: int, folder: Path) -> None:
    before = {path.name for path in folder.iterdir()}
    options = ("--model-arg", f"stop={call}", "--batch-size", "4", "--keep", "0.5")
    targets = ("--out", "m.safetensors", "--report-html", "r.html")
    process = shell("prune", MODEL, *DATA, *options, *targets)
    while not Path("stopped").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    Path("go").touch()
    _, err = process.communicate(timeout=HOUR)
    assert process.returncode == 130
    assert err.strip().splitlines()[-2:] == [stage, "interrupted: nothing was left half-written"]
    assert {path.name for path in folder.iterdir()} - before <= {"__pycache__", "stopped", "go"}

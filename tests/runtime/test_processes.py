"""Several processes: they give what one does, and fail together."""

import json
import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lnr_prune.runtime.processes import ALONE
from tests.helpers import ranks

LIMIT = 3600  # seconds: it ends processes that hang

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no torch.distributed")


def started(count: int, work: Callable[..., None], folder: Path, *arguments: Any) -> list[int | None]:
    """Exit codes of so many processes; none outlives the test."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.helpers.ranks", "torch._dynamo"])
    processes = [server.Process(target=work, args=(rank, count, folder, *arguments)) for rank in range(count)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(LIMIT)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()


def told(folder: Path, count: int) -> list[dict[str, Any]]:
    assert started(count, ranks.all_cases, folder) == [0] * count
    return [torch.load(folder / str(rank), weights_only=False) for rank in range(count)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return told(tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return told(tmp_path_factory.mktemp("four"), 4)


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return ranks.pruned_cases(ALONE)


@pytest.mark.parametrize("many", ["two", "four"])
def test_all_ranks_prune_as_one_process_does(request: pytest.FixtureRequest, many: str, one: dict[str, Any]) -> None:
    first, *others = (of_rank["pruned"] for of_rank in request.getfixturevalue(many))
    for name, (indices, masked, error) in first.items():
        assert indices == one[name][0], name
        assert masked.keys() == one[name][1].keys()
        assert error == pytest.approx(one[name][2], rel=1e-6)
        for key, weight in one[name][1].items():
            torch.testing.assert_close(masked[key], weight, rtol=1e-6, atol=1e-6, msg=f"{name}: {key}")
        for other in others:  # to the bit
            assert (other[name][0], other[name][2]) == (indices, error)
            assert all(torch.equal(other[name][1][key], weight) for key, weight in masked.items())


def test_a_rank_alone(two: list[dict[str, Any]], one: dict[str, Any]) -> None:
    for of_rank in two:
        assert of_rank["alone"][::2] == one["lasso"][::2]


def test_a_layer_that_only_one_rank_reaches(two: list[dict[str, Any]]) -> None:
    for name, alone in ranks.branched(ALONE).items():
        for of_rank in two:
            torch.testing.assert_close(of_rank["branched"][name].xx, alone.xx)
            assert of_rank["branched"][name].count == alone.count


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        (
            "not a number",
            "RankError",
            "1 of 2 ranks failed. rank 1: CalibrationError: the inputs of layer '2' are not",
        ),
        ("not a number anywhere", "CalibrationError", "the inputs of layer '2' are not finite in batch 1"),
        ("an exception in the data", "RankError", "rank 1: OSError: a damaged file"),
        ("an exception in the first pass", "RankError", "rank 1: OSError: a damaged file"),
        ("an exception in the refit", "RankError", "rank 1: OSError: a damaged file"),
        ("an empty shard", "RankError", "rank 1: CalibrationError: the calibration data holds no batch"),
        ("another shape", "CalibrationError", "Sequential does not accept inputs of shape (5, 6)"),
        ("other weights", "ValueError", "rank 1 has other weights than rank 0"),
        ("other arguments", "ValueError", "rank 1 has other arguments than rank 0"),
        ("an unknown argument", "ValueError", "into must be one of copy, model, graph, got 'thin air'"),
        ("an unknown layer", "ValueError", "keep names 'nowhere', which is not a prunable producer"),
        (
            "wrapped",
            "GraphError",
            "model is wrapped in DistributedDataParallel: prune the plain module inside, model.m",
        ),
        ("sharded", "GraphError", "the parameter '0.weight' is sharded over processes"),
        ("wrapped inside", "GraphError", "model.0 is wrapped in DistributedDataParallel"),
    ],
)
def test_all_ranks_raise_the_same(two: list[dict[str, Any]], name: str, kind: str, words: str) -> None:
    outcomes = {of_rank["failed"][name] for of_rank in two}
    assert len(outcomes) == 1
    ((raised, message),) = outcomes
    assert raised == kind
    assert words in message


@pytest.mark.parametrize(("how", "passes", "count"), [("is killed", 1, 2), ("is killed", 2, 3), ("sleeps", 2, 2)])
def test_a_rank_that_is_lost_ends_the_others(tmp_path: Path, how: str, passes: int, count: int) -> None:
    codes = started(count, ranks.lost, tmp_path, how, passes)
    assert codes == [0, -9 if how == "is killed" else 0, 0][:count]
    for rank in (0, 2)[: count - 1]:
        raised, message = torch.load(tmp_path / str(rank))
        assert raised == "RankError"
        assert f"rank {rank} has lost the others: one of the {count} has ended, or did not answer" in message


NET = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(192, 5))
"""


def test_the_command_under_torchrun(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(NET, encoding="utf-8")
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(72, 3, 8, 8)).astype(np.float32))
    options = ["lnr_prune", "prune", "nets.py:net", "--data", "x.npy", "--batch-size", "16", "--keep", "0.5", "--json"]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    said = []
    for out, launcher in (("one", []), ("two", torchrun)):
        command = [sys.executable, "-m", *launcher, *options, "--out", f"{out}.safetensors"]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT, check=False)
        assert run.returncode == 0, run.stderr
        said.append(json.loads(run.stdout))  # once
    kept = [[(group["name"], group["kept"]) for group in each["report"]["groups"]] for each in said]
    assert kept[0] == kept[1] == [("0", 4), ("2", 6)]
    one, two = (load_file(tmp_path / f"{out}.safetensors") for out in ("one", "two"))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-6, atol=1e-6)

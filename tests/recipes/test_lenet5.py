"""The LeNet-5 session: its figures agree with one another, its files can be used, its errors help."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lnr_prune.errors import LnrPruneError
from lnr_prune.recipes import data as datasets
from lnr_prune.recipes import session, toy
from lnr_prune.recipes.lenet5 import LeNet5, accuracy, initialised, load_weights, mass_distribution
from lnr_prune.recipes.settings import Settings
from lnr_prune.runtime import optional

PNG = b"\x89PNG\r\n\x1a\n"


def quick(out: Path) -> Settings:
    return Settings(quick=True, sweep=2, out=out)


def without_times(results: Any) -> Any:
    if isinstance(results, dict):
        return {key: without_times(value) for key, value in results.items() if key not in ("seconds", "out")}
    return [without_times(value) for value in results] if isinstance(results, list) else results


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lenet5")
    session.run(quick(folder))
    return folder


@pytest.fixture(scope="module")
def results(out: Path) -> Any:
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def test_trains_the_model_of_the_reference(results: Any) -> None:
    dense = results["dense"]
    assert dense["parameters"] == 431_080
    assert len(dense["train_accuracies"]) == 2
    assert dense["train_accuracies"][-1] > 0.85
    assert dense["test_accuracy"] > 0.85
    assert dense["mass_distribution"] == pytest.approx(
        {"conv1": 520 / 431_080, "conv2": 25_050 / 431_080, "fc1": 400_500 / 431_080, "fc2": 5_010 / 431_080}
    )


def test_collapse_changes_no_accuracy_and_debias_raises_it(results: Any) -> None:
    assert [c["name"] for c in results["compressions"]] == ["fc2 no bias", "fc2 with bias", "whole network"]
    for compression in results["compressions"]:
        assert compression["sparse_accuracy"] == compression["collapsed_accuracy"]
        assert compression["accuracy"] > compression["sparse_accuracy"]


def test_fc2_loses_columns_and_fc1_the_same_rows(results: Any) -> None:
    for compression, columns in zip(results["compressions"][:2], (500, 501), strict=True):
        assert compression["penalty"] == {"lam": {"fc1": pytest.approx(0.01 * columns)}, "ratio": None}
        kept = compression["widths"]["fc1"]
        assert compression["columns_kept"] == {"fc2": kept / 500}
        assert compression["compression_rate"] == (520 + 25_050 + 801 * kept + 10 * kept + 10) / 431_080


def test_the_pruned_weights_are_the_reported_model(out: Path, results: Any) -> None:
    whole = results["compressions"][-1]
    model = load_weights(out / "pruned.safetensors")
    assert {name: len(model.get_parameter(f"{name}.weight")) for name in whole["widths"]} == whole["widths"]
    assert sum(p.numel() for p in model.parameters()) / 431_080 == whole["compression_rate"]
    assert accuracy(model, datasets.load("digits")) == whole["accuracy"]
    assert set(whole["columns_kept"]) == {"conv2", "fc1", "fc2"}


def test_the_dense_weights_are_the_reported_model(out: Path, results: Any) -> None:
    model = load_weights(out / "dense.safetensors")
    assert accuracy(model, datasets.load("digits")) == results["dense"]["test_accuracy"]


def test_both_sweeps_reach_the_all_zero_end(results: Any) -> None:
    assert set(results["sweeps"]) == {"fc2", "whole network"}
    for points in results["sweeps"].values():
        assert [point["all_zero"] for point in points] == [False] * (len(points) - 1) + [True]
        assert points[-1]["widths"]["fc1"] == 1
        rates = [point["compression_rate"] for point in points]
        assert rates == sorted(rates, reverse=True)
        assert all(0 <= point[key] <= 1 for point in points for key in ("accuracy", "accuracy_retrained"))
    assert results["sweeps"]["whole network"][-1]["widths"] == {"conv1": 1, "conv2": 1, "fc1": 1}


def test_plots_are_images(out: Path) -> None:
    for name in ("pareto.png", "convergence.png"):
        assert (out / name).read_bytes().startswith(PNG)


def test_all_solvers_reach_the_same_optimum(results: Any) -> None:
    runs = results["solvers"]
    assert [run["solver"] for run in runs["FISTA"]] == [f"FISTA, q = {q}" for q in (1, 5, 50, 250)]
    best = min(run["objective"] for group in runs.values() for run in group)
    for group in runs.values():
        assert [run["objective"] for run in group] == pytest.approx([best] * len(group), rel=1e-4)
    assert {run["solver"]: run["gap"] for run in runs["solvers"]}["Newton on eta"] < 1e-12


def test_the_seed_repeats_every_figure(results: Any, tmp_path: Path) -> None:
    again = json.loads(json.dumps(session.run(quick(tmp_path)), default=str))
    assert without_times(again) == without_times(results)


def test_toy_problem_is_the_reference_one() -> None:
    problem = toy.problem(toy.Size(d=10, h=6, r=4, n=25_000))
    (block,) = problem.blocks
    assert (block.R.shape, block.B.shape) == ((10, 10), (6, 10))
    assert int(torch.linalg.matrix_rank(block.R)) == 4
    least_squares = block.B @ torch.linalg.pinv(block.R, hermitian=True)
    assert problem.error([least_squares]) == pytest.approx(0, abs=1e-12)


def test_initialisation_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    first, second = initialised(3), initialised(3)
    assert torch.equal(first.fc1.weight, second.fc1.weight)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert sum(mass_distribution(first).values()) == pytest.approx(1)


def test_digits_are_split_and_normalised() -> None:
    digits = datasets.load("digits")
    assert digits.train_images.shape == (1437, 1, 28, 28)
    assert digits.test_images.shape == (360, 1, 28, 28)
    assert float(digits.train_images.mean()) == pytest.approx(0, abs=1e-4)
    assert float(digits.train_images.std()) == pytest.approx(1, abs=1e-4)
    assert torch.bincount(digits.test_labels, minlength=10).min() > 20


def test_an_epoch_shows_every_image_once_in_the_order_of_the_seed() -> None:
    images = torch.arange(10)
    epochs = [torch.cat([x for x, _ in datasets.batches(images, images, 4, seed)]) for seed in (0, 0, 1)]
    assert torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], epochs[2])
    assert torch.equal(epochs[0].sort().values, images)


def write_idx(path: Path, array: torch.Tensor) -> None:
    shape = array.shape
    path.write_bytes(struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape) + bytes(array.flatten().tolist()))


@pytest.fixture
def small_mnist(tmp_path: Path) -> Path:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 6), ("t10k", 4)):
        write_idx(raw / f"{part}-images-idx3-ubyte", torch.full((count, 28, 28), 255))
        write_idx(raw / f"{part}-labels-idx1-ubyte", torch.arange(count))
    return tmp_path


@pytest.mark.parametrize("writable", [True, False])
def test_reads_the_files_of_mnist(small_mnist: Path, writable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: writable)
    mnist = datasets.load("mnist", small_mnist)
    assert mnist.train_images.shape == (6, 1, 28, 28)
    assert float(mnist.train_images.max()) == pytest.approx((1 - 0.1307) / 0.3081)
    assert mnist.test_labels.tolist() == [0, 1, 2, 3]


@pytest.mark.skipif("LNR_PRUNE_DATA" not in os.environ, reason="needs MNIST: set LNR_PRUNE_DATA")
def test_trained_weights_have_their_accuracy_on_mnist() -> None:
    mnist = datasets.load("mnist")
    weights = Path(os.environ["LNR_PRUNE_DATA"], "weights", "lenet5_mnist.safetensors")
    assert accuracy(load_weights(weights), mnist) == pytest.approx(0.9933, abs=5e-4)


def test_missing_data_say_where_they_belong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LNR_PRUNE_DATA", raising=False)
    with pytest.raises(LnrPruneError, match="--data-root or the environment variable LNR_PRUNE_DATA"):
        datasets.load("mnist")
    with pytest.raises(LnrPruneError, match=r"must exist: got .*nowhere"):
        datasets.load("fashion", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="unknown data set: got 'cats', expected one of digits, mnist, fashion"):
        datasets.load("cats")


@pytest.mark.parametrize("writable", [True, False])
def test_files_that_cannot_be_had_are_named(tmp_path: Path, writable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: writable)
    monkeypatch.setattr(optional.import_torchvision().datasets.MNIST, "mirrors", [])
    with pytest.raises(LnrPruneError, match=r"expected .*raw to hold its four \.gz files"):
        datasets.load("mnist", tmp_path)


def test_a_missing_package_names_the_extra() -> None:
    with pytest.raises(LnrPruneError, match=r"needs no_such_package.*pip install 'lnr-prune\[recipes\]'"):
        optional.require("no_such_package.module")


def test_foreign_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    with pytest.raises(LnrPruneError, match=r"could not load .*weights"):
        load_weights(path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(LnrPruneError, match="expected a safetensors file"):
        load_weights(path)
    save_file({"conv1.weight": torch.ones(20, 1, 5, 5)}, path)
    with pytest.raises(LnrPruneError, match="conv2"):
        load_weights(path)


def test_a_narrow_model_takes_its_own_weights(tmp_path: Path) -> None:
    save_file(LeNet5(conv1=2, conv2=3, fc1=4).state_dict(), tmp_path / "narrow.safetensors")
    model = load_weights(tmp_path / "narrow.safetensors")
    assert model(torch.zeros(1, 1, 28, 28)).shape == (1, 10)
    assert load_file(tmp_path / "narrow.safetensors")["fc1.weight"].shape == (4, 48)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"data": "cats"}, "unknown data set: got 'cats'"),
        ({"sweep": 1}, "sweep must be at least 2, got 1"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"lam": 0.0}, "lam must be positive and finite, got 0"),
        ({"lam_ratio": float("nan")}, "lam_ratio must be positive and finite, got nan"),
    ],
)
def test_settings_out_of_range_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**setting)

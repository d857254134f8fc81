"""The arithmetic of the accuracy benchmark, and what a comparison of devices would notice."""

import json
import math
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import distributed, nn

import lnr_prune as lnr
from benchmarks import accelerator, language, promises
from benchmarks.accuracy import levels_of, table
from benchmarks.library import peers
from benchmarks.library.accuracy_plots import plot
from benchmarks.library.device_checks import Case, batches, check_group, differences, judged, spread
from benchmarks.library.device_times import side_by_side
from benchmarks.library.methods import methods
from benchmarks.library.networks import Trained
from benchmarks.library.rows import Result, Row, compared
from benchmarks.library.sections import Found, Section, Sheet
from benchmarks.library.sentences import of_equal_length, spearman_terms
from benchmarks.library.shapes import Llama, ResNet
from benchmarks.library.tasks import Task, classifier, finetune
from lnr_prune.calibration.calls import run
from lnr_prune.selection.costs import cost


def small(width: int = 12) -> Task:
    """Two convolutions with batch norm on noise, labelled by an untrained network itself."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3), nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 4),
        ).eval()  # fmt: skip
        images = torch.randn(80, 1, 8, 8)
    with torch.no_grad():
        labels = model(images).argmax(1)
    return classifier(Trained(model, images[:50], labels[:50], images[50:], labels[50:], ("0", "3")))


def row(method: str, score: float, **changes: object) -> Row:
    whole = Row("net", "macs", 0.5, method, False, 0.5, 0.5, 0.5, score, None, score, 0.1, 1.0, 100, 1)
    return replace(whole, **changes)  # type: ignore[arg-type]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=30))
def test_terms_average_to_spearmans_correlation(pairs: list[tuple[int, int]]) -> None:
    x, y = (torch.tensor(side, dtype=torch.float64) for side in zip(*pairs, strict=True))
    if len(x.unique()) > 1 and len(y.unique()) > 1:
        expected = spearmanr(x.numpy(), y.numpy()).statistic
        assert float(spearman_terms(x, y).mean()) == pytest.approx(expected, abs=1e-12)


def test_every_sentence_is_in_one_batch_without_padding() -> None:
    sentences = ["a b", "a", "c d", "a b c", "d"] * 40

    def tokenizer(texts: list[str]) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(word) for word in text.split()] for text in texts]}

    seen: dict[int, str] = {}
    for index, call in of_equal_length(tokenizer, sentences):
        assert bool(call["attention_mask"].all())
        for i, ids in zip(index.tolist(), call["input_ids"].tolist(), strict=True):
            seen[i] = " ".join(map(chr, ids))
    assert [seen[i] for i in range(len(sentences))] == sentences


@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("share", [0.8, 0.5, 0.21])
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_uniform_sizes_use_up_the_budget(kind: str, share: float, weight: float) -> None:
    task = replace(small(), inner={"0": weight, "3": 1.0})
    graph = peers.graph_of(task)
    sizes = peers.uniform(task, graph, kind, share)
    spent, most = peers.limit(task, graph, kind, share)
    assert spent(sizes) <= most
    assert all(spent({**sizes, name: size + 1}) > most for name, size in sizes.items())
    removed = {name: (1 - size / {"0": 12, "3": 24}[name]) / task.inner[name] for name, size in sizes.items()}
    assert abs(removed["0"] - removed["3"]) < 1 / (12 * weight) + 1 / 24  # one channel's rounding of each


@given(st.floats(0.1, 0.95), st.integers(0, 5))
def test_the_highest_scores_of_all_groups_stay(share: float, seed: int) -> None:
    task = small()
    graph = peers.graph_of(task)
    generator = torch.Generator().manual_seed(seed)
    scores = {"0": torch.rand(12, generator=generator), "3": torch.rand(24, generator=generator)}
    spent, most = peers.limit(task, graph, "macs", share)

    def kept(threshold: float) -> dict[str, int]:
        return {name: max(1, int((of_group >= threshold).sum())) for name, of_group in scores.items()}

    fitting = [sizes for each in torch.cat(list(scores.values())).tolist() if spent(sizes := kept(each)) <= most]
    assert peers.highest(task, graph, "macs", share, scores) == max(fitting, key=spent)


def test_scores_are_the_filters_norms_over_their_mean() -> None:
    task = small()
    weight = task.model.get_parameter("3.weight").detach().abs().sum((1, 2, 3))
    score = peers.scores_of("l1", task, peers.graph_of(task), seed=0)["3"]
    assert torch.allclose(score, weight / weight.mean())


@pytest.mark.parametrize("finish", ["raw", "bn", "refit"])
def test_peers_networks_keep_the_channels_of_the_highest_scores(finish: str) -> None:
    task = small()
    graph, batches = peers.graph_of(task), task.calibration(50, 0)
    scores = {"0": torch.arange(12.0), "3": torch.arange(24.0)}
    model = peers.finished(task, graph, {"0": 5, "3": 7}, scores, batches, finish)
    kept, original = (net.get_parameter("0.weight") for net in (model, task.model))
    assert (kept.shape[0], model.get_parameter("3.weight").shape[0]) == (5, 7)
    if finish != "refit":
        assert torch.equal(kept, original[7:])
    if finish == "bn":
        filtered = torch.cat([run(model.get_submodule("0"), ((images,), {})).mean((0, 2, 3))[None]
                              for images, _ in batches])  # fmt: skip
        assert torch.allclose(model.get_buffer("1.running_mean"), filtered.mean(0), atol=1e-6)


def test_every_method_keeps_within_the_budget() -> None:
    task = small()
    whole = cost.macs(task.model, task.example)
    every = methods(task, ("macs", 0.5), search=1)
    assert {name.split(", ")[0] for name in every} == {"budget", "uniform", "peer"}
    for name, prune in every.items():
        model = prune(task.calibration(50, 0), 0)
        assert cost.macs(model, task.example) <= 0.5 * whole, name


def test_the_settings_are_those_that_the_rows_are_named_after(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def noted(model: nn.Module, data: object, amount: lnr.Budget | lnr.Keep, **settings: Any) -> SimpleNamespace:
        asked.append({"amount": amount, **settings})
        return SimpleNamespace(model=model)

    every = methods(small(), ("macs", 0.5), search=4, refits=3, iterations=2)
    monkeypatch.setattr(lnr, "prune", noted)

    def asked_for(kind: str) -> list[tuple[str, dict[str, Any]]]:
        asked.clear()
        names = [name for name in every if name.startswith(kind)]
        for name in names:
            every[name]([], 7)
        return list(zip(names, asked, strict=True))

    budgets = asked_for("budget")
    assert len(budgets) == 5
    for name, settings in budgets:
        effort = settings["amount"].effort
        assert (settings["amount"].macs, effort.refits, effort.search) == (0.5, 3, 4 * name.endswith("4 trials"))
        assert settings["refit"].joint_iterations == 2 * name.endswith("window 2")
    uniform = dict(asked_for("uniform"))
    assert {settings["refit"] for settings in uniform.values()} == {lnr.Refit(iterations=2)}
    assert uniform["uniform, backward, 8 swaps"]["selector"] == lnr.Backward(swaps=8)
    assert uniform["uniform, random"]["selector"] == lnr.Random(seed=7)


def test_images_are_mirrored_by_chance_as_the_seed_says() -> None:
    images, labels = torch.randn(60, 1, 8, 8), torch.zeros(60, dtype=torch.long)
    trained = Trained(small().model, images, labels, images, labels, ("0", "3"), mirrored=True)
    (drawn, _), (again, _), (other, _) = (classifier(trained).calibration(60, seed)[0] for seed in (0, 0, 1))
    known = [(drawn[:, None] == side).flatten(2).all(2) for side in (images, images.flip(-1))]
    assert (known[0] ^ known[1]).sum(0).eq(1).all()  # each image once, one way or the other
    assert 15 < known[1].sum() < 45
    assert torch.equal(drawn, again)
    assert not torch.equal(drawn, other)


def test_a_promise_is_the_reports_and_is_compared_with_images_that_nothing_has_seen(tmp_path: Path) -> None:
    seen, new = torch.randn(50, 1, 8, 8), torch.randn(30, 1, 8, 8)
    labels = torch.zeros(50, dtype=torch.long)
    trained = Trained(small().model, seen, labels, new, labels[:30], ("0", "3"))
    promise = promises.measure("net", trained, ("macs", 0.5), 40, refits=1, seed=0)
    assert (promise.limited, promise.samples) == ("macs 50.0%", 40)
    drawn = classifier(trained).calibration(40, 0)
    pruned = lnr.prune(trained.model, drawn, lnr.Budget(macs=0.5, effort=lnr.Effort(refits=1)), selector="backward")
    with torch.no_grad():
        dense, left = trained.model(new), pruned.model(new)
    assert promise.predicted == pruned.report.predicted
    scale = (dense - dense.mean(0)).square().sum()
    assert promise.shown == pytest.approx(float((dense - left).square().sum() / scale), rel=1e-4)
    assert promises.table([promise]).row_count == 1
    pytest.importorskip("matplotlib")
    promises.plot([promise], tmp_path / "promises.svg")
    assert (tmp_path / "promises.svg").exists()


def test_ahead_is_the_paired_difference_from_the_best_peer() -> None:
    def result(row: Row, *terms: float) -> Result:
        return Result(replace(row, score=sum(terms) / len(terms)), torch.tensor(terms, dtype=torch.float64))

    rows = compared([
        result(row("budget, backward", 0), 1, 1, 1, 0),
        result(row("peer, uniform, l1, raw", 0), 1, 0, 1, 0),
        result(row("peer, uniform, l1, bn", 0), 0, 0, 1, 0),
        result(row("peer, uniform, l1, refit", 0), 1, 1, 1, 1),
        result(row("peer, uniform, fpgm, bn", 0, budget=0.25), 1, 1, 1, 1),
        result(row("budget, backward", 0, finetuned=True), 1, 1, 1, 1),
    ])  # fmt: skip
    assert [row.ahead for row in rows] == [0.25, 0.0, -0.25, 0.5, 0.0, None]
    assert rows[0].ahead_error == pytest.approx(0.5 / math.sqrt(4))


def test_fine_tuning_trains_every_parameter_and_ends_in_evaluation_mode() -> None:
    task = small()
    model = small().model
    finetune(model, task, seed=0)
    for tuned, original in zip(model.parameters(), task.model.parameters(), strict=True):
        assert not torch.equal(tuned, original)
    assert not model.training


def test_budgets_of_the_command_line() -> None:
    assert levels_of("macs=0.5,params=0.1") == (("macs", 0.5), ("params", 0.1))
    for wrong in ("macs", "macs=2", "time=0.5", "latency=0.5", "macs=x"):
        with pytest.raises(typer.BadParameter, match="shares such as"):
            levels_of(wrong)


def test_rows_are_printed_and_drawn(tmp_path: Path) -> None:
    rows = [
        row("dense", 1.0, limited="", budget=1.0),
        *(row("budget, backward", share, budget=share, spread=0.01) for share in (0.5, 0.25)),
        *(row("peer, global, l1, raw", share, budget=share, ahead=0.0, ahead_error=0.0) for share in (0.5, 0.25)),
        row("budget, backward", 0.9, finetuned=True),
    ]
    plot(rows, tmp_path / "net.png")
    assert (tmp_path / "net.png").stat().st_size > 0
    assert table(rows).row_count == len(rows)


HOUR = 3600.0


def failing() -> Found:
    raise ValueError("a | b")


def endless() -> Found:
    """Until the alarm, which comes at once, whatever the limit."""
    signal.raise_signal(signal.SIGALRM)
    while True:
        time.sleep(0.01)


def test_a_section_goes_on_after_a_failure_and_ends_in_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet = Sheet({"device": "here"}, tmp_path / "rows.json")
    well = Found({"figure": 0.5})
    sheet.run(
        Section(
            "first", ("figure",), HOUR, {"fails": failing, "works": lambda: well, "hangs": endless, "late": failing}
        )
    )
    sheet.run(
        Section("second", ("figure",), HOUR, {"works": lambda: well, "differs": lambda: Found({"figure": 2}, "two")})
    )
    over = "3600 s are over"
    assert [(row.section, row.what, row.wrong) for row in sheet.rows] == [
        ("first", "fails", "ValueError: a / b"), ("first", "works", ""),
        ("first", "hangs", f"stopped: {over}"), ("first", "late", f"not run: {over}"),
        ("second", "works", ""), ("second", "differs", "two"),
    ]  # fmt: skip
    written = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert (written["device"], len(written["rows"])) == ("here", 6)
    printed = capsys.readouterr()
    assert "Traceback" in printed.err
    assert printed.out.count("\n| ") == 2 * 2 + 6  # two lines of a head


def test_the_exit_code_tells_of_wrong_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(wrong: str) -> Any:
        return lambda *_: Section("one", (), HOUR, {"row": lambda: Found({}, wrong)}), 9.0

    monkeypatch.setattr(accelerator, "SECTIONS", {"well": made(""), "ill": made("no")})
    accelerator.main(device="cpu", sections="well")
    with pytest.raises(typer.Exit) as ended:
        accelerator.main(device="cpu", sections="ill,well")
    assert ended.value.exit_code == 1
    with pytest.raises(typer.BadParameter, match="unknown section 'other'"):
        accelerator.main(device="cpu", sections="other")


def tiny() -> Case:
    network = spread(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    return Case(network, batches(64, 6), lnr.Keep(0.5), {"selector": "norm"})


def test_differences_of_devices_are_noticed() -> None:
    case = tiny()
    one, other, another = (replace(case, amount=lnr.Keep(keep)).on(torch.device("cpu")) for keep in (0.5, 0.5, 3))
    call = case.data()[0]
    assert not judged(differences(one, other, call), 0.0).wrong
    with torch.no_grad():
        other.model.get_parameter("2.weight")[0, 0] += 0.01 * one.model.get_parameter("2.weight").abs().max()
    cells = differences(one, other, call)
    assert cells["weights differ by"] == pytest.approx(0.01, rel=1e-3)
    assert float(cells["outputs differ by"]) > 0
    assert (judged(cells, 0.011).wrong, judged(cells, 0.009).wrong) == ("", "weights > 9e-03")
    assert judged(differences(one, another, call), 1.0).wrong == "1 channels differ"


@pytest.mark.parametrize("talking", [False, True])
def test_a_rank_that_talks_to_itself_does_so_through_the_backend(
    talking: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def noting(name: str) -> Any:
        original = getattr(distributed, name)

        def noted(*args: object) -> object:
            said.append(name)
            return original(*args)

        return noted

    for name in ("all_gather_object", "all_reduce", "broadcast"):
        monkeypatch.setattr(distributed, name, noting(name))
    assert not check_group(tiny(), torch.device("cpu"), "gloo", talking).wrong
    assert set(said) == ({"all_gather_object", "all_reduce", "broadcast"} if talking else set())


def test_the_large_shapes_are_those_of_their_names() -> None:
    with torch.device("meta"):
        resnet, llama = ResNet().eval(), Llama()
        assert cost.macs(resnet, ((torch.randn(1, 3, 224, 224),), {})) == 4_089_184_256
    assert (cost.parameters(resnet), cost.parameters(llama)) == (25_557_032, 1_104_218_112)


def test_networks_are_timed_by_turns() -> None:
    order: list[int] = []

    def work(which: int) -> None:
        order.append(which)
        time.sleep(0.04 * which)

    (first, second), spread_of_both = side_by_side([lambda: work(1), lambda: work(2)], torch.device("cpu"))
    assert order == [1, 2] * (len(order) // 2)
    assert 0.04 <= first < second
    assert spread_of_both >= 0


def test_scores_of_language_models_are_those_of_the_papers() -> None:
    torch.manual_seed(0)
    mlp = nn.ModuleDict({"gate_proj": nn.Linear(3, 4), "up_proj": nn.Linear(3, 4), "down_proj": nn.Linear(4, 3)})
    x = torch.randn(50, 4) + torch.tensor([0.0, 0.0, 5.0, 0.0])
    inputs = {"mlp.down_proj": language.Inputs(x.double().mean(0), x.double().square().mean(0))}
    model = nn.ModuleDict({"mlp": mlp})
    W = model.get_parameter("mlp.down_proj.weight").detach().double()
    found = {peer: language.scores_of(peer, model, inputs)["mlp.down_proj"] for peer in language.PEERS}
    torch.testing.assert_close(found["Wanda-sp"], (W.abs() * x.double().square().mean(0).sqrt()).sum(0))
    flap = W.square().sum(0) * x.double().var(0, correction=0)
    torch.testing.assert_close(found["FLAP"], (flap - flap.mean()) / flap.std())
    scores = {"a": torch.tensor([3.0, 2.0, 1.0]), "b": torch.tensor([0.5, 0.4, 0.3])}
    assert language.widths("FLAP", scores, 0.5) == {"a": 3, "b": 1}
    assert language.widths("Wanda-sp", scores, 1 / 3) == {"a": 2, "b": 2}


def test_ratios_of_perplexities_are_paired() -> None:
    rows = [
        language.Row(name, 0.2, 1.0, losses, 1.0, 1.0) for name, losses in (("dense", (1.0, 3.0)), ("x", (1.1, 3.1)))
    ]
    assert language.table(rows).splitlines()[-1] == "| x | 20% | 100.0% | 8.17 | 1.105 ± 0.000 | 1 | 1.00 |"

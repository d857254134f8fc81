"""The reference session on LeNet-5, in one run: train, prune fc2, prune the whole network, sweep, compare solvers.

The reference divides its second moments by the number d of columns of the pruned layer (including the bias column).
The library does not, so the reference's ``lam`` is ``lam * d`` here.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import save_file
from torch import Tensor
from torch.func import functional_call

from lnr_prune.errors import LnrPruneError
from lnr_prune.prune import prune
from lnr_prune.pruned import Pruned
from lnr_prune.recipes import data as datasets
from lnr_prune.recipes import plots, toy
from lnr_prune.recipes.data import Data
from lnr_prune.recipes.lenet5 import LeNet5, accuracy, adam, initialised, load_weights, mass_distribution, train_epoch
from lnr_prune.recipes.results import Compression, Point, solver_table, summary, sweep_table
from lnr_prune.recipes.settings import Settings
from lnr_prune.report.frontier import Sweep, SweepPoint
from lnr_prune.runtime.run import Run
from lnr_prune.selection.amount import Penalty

CALIBRATION_BATCH = 250
QUIETLY = Run(progress=False)
LAM_EXPONENTS = (-4.0, -1.0)  # the reference's sweep of fc2
LAM_RATIO_EXPONENTS = (-3.0, 0.0)  # at 10**0 = 1, lambda_max is reached and nothing is kept

Advance = Callable[[str], None]


def run(settings: Settings, console: Console | None = None) -> dict[str, Any]:
    """Runs the whole session, prints it, and writes plots, weights and ``results.json`` into ``settings.out``.

    Returns:
        What ``results.json`` holds.

    Raises:
        LnrPruneError: If data, weights or an optional package are missing, or nothing can be written.
    """
    console, numbers, begin = console or Console(), settings.numbers, time.perf_counter()
    data = datasets.load(settings.data, settings.data_root).to(settings.device)
    out = _folder(settings.out)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        steps = (0 if settings.weights else numbers["epochs"]) + 3 + (2 * numbers["sweep"] + 1) + 3
        task = progress.add_task("data", total=steps)

        def advance(doing: str) -> None:
            progress.update(task, advance=1, description=doing)

        model, train_accuracies = _trained(settings, data, console, advance)
        dense_accuracy = accuracy(model, data)
        console.print(f"Test accuracy: {dense_accuracy:.4f}")
        mass = mass_distribution(model)
        console.print("Mass distribution: " + ", ".join(f"{name} {share:.2%}" for name, share in mass.items()))

        calibration = data.train_images[: numbers["calibration"]].split(CALIBRATION_BATCH)
        compressions, smallest = _compressions(settings, model, data, calibration, console, advance)
        sweeps, frontiers = _sweeps(settings, model, data, calibration, dense_accuracy, console, advance)
        solvers = _solvers(settings, out, console, advance)

    plots.pareto(
        {title: [asdict(point) for point in points] for title, points in sweeps.items()},
        dense_accuracy,
        out / "pareto.png",
    )
    save_file(model.state_dict(), out / "dense.safetensors")
    save_file(smallest.model.state_dict(), out / "pruned.safetensors")
    results = {
        "settings": {**asdict(settings), **numbers},
        "dense": {
            "parameters": smallest.report.params_before,
            "train_accuracies": train_accuracies,
            "test_accuracy": dense_accuracy,
            "mass_distribution": mass,
        },
        "compressions": [asdict(compression) for compression in compressions],
        "sweeps": {title: [asdict(point) for point in points] for title, points in sweeps.items()},
        "solvers": solvers,
        "seconds": time.perf_counter() - begin,
    }
    (out / "results.json").write_text(json.dumps(results, indent=1, default=str) + "\n", encoding="utf-8")
    smallest.report.with_metric("test accuracy", dense_accuracy, compressions[-1].accuracy).to_html(
        out / "report.html", title="LeNet-5, the whole network pruned", also=frontiers, command=settings.command
    )
    console.print(summary(_channels(model), dense_accuracy, compressions))
    for name in (
        "report.html",
        "pareto.png",
        "convergence.png",
        "results.json",
        "dense.safetensors",
        "pruned.safetensors",
    ):
        console.print(f"wrote {out / name}", soft_wrap=True, highlight=False)
    return results


def _folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LnrPruneError(f"cannot write to {str(path)!r} ({error}): name another folder with --out.") from error
    return path


def _trained(settings: Settings, data: Data, console: Console, advance: Advance) -> tuple[LeNet5, list[float]]:
    if settings.weights:
        return load_weights(settings.weights).to(settings.device), []
    model = initialised(settings.seed).to(settings.device)
    optimizer, accuracies = adam(model), []
    for epoch in range(settings.numbers["epochs"]):
        seed = settings.seed + epoch
        accuracies.append(train_epoch(model, optimizer, data, settings.numbers["batch_size"], seed))
        console.print(f"Epoch {epoch + 1:2d} - train accuracy: {accuracies[-1]:.4f}")
        advance("training")
    return model, accuracies


def _compressions(
    settings: Settings,
    model: LeNet5,
    data: Data,
    calibration: Sequence[Tensor],
    console: Console,
    advance: Advance,
) -> tuple[list[Compression], Pruned]:
    """Prunes fc2 without and with its bias, then the whole network; returns all three, and the last pruned model."""
    columns, lam = model.fc2.in_features, settings.lam
    cases: list[tuple[str, bool, Penalty]] = [
        ("fc2 no bias", False, Penalty({"fc1": lam * columns})),
        ("fc2 with bias", True, Penalty({"fc1": lam * (columns + 1)})),
        ("whole network", True, Penalty(ratio=settings.lam_ratio)),
    ]
    console.print(
        f"The reference's lam {lam:g} is lam {lam * columns:g} here for {columns} columns, {lam:g} more with the bias"
    )
    compressions = []
    for name, bias, penalty in cases:
        sparse = prune(model, calibration, penalty, bias=bias, refit=None, run=QUIETLY)
        pruned = prune(model, calibration, penalty, bias=bias, run=QUIETLY)
        report = pruned.report

        def masked(x: Tensor, tensors: Mapping[str, Tensor] = sparse.masked) -> Tensor:
            logits: Tensor = functional_call(model, dict(tensors), (x,))
            return logits

        done = Compression(
            name,
            penalty,
            {
                c: group.kept / group.size
                for group in sparse.report.groups
                if group.lam is not None
                for c in group.consumers
            },
            accuracy(masked, data),
            accuracy(sparse.model, data),
            accuracy(pruned.model, data),
            _widths(pruned),
            report.params_after / report.params_before,
            report.macs_after / report.macs_before,
        )
        compressions.append(done)
        kept = ", ".join(f"{consumer} {fraction:.4f}" for consumer, fraction in done.columns_kept.items())
        console.print(f"[bold]{name}[/bold]: proportion of columns kept: {kept}")
        console.print(f"  test accuracy, sparse: {done.sparse_accuracy:.4f}, collapsed: {done.collapsed_accuracy:.4f}")
        console.print(f"  test accuracy, debiased: {done.accuracy:.4f}")
        console.print(f"  full model compression rate: {done.compression_rate:.2%}")
        advance(name)
    console.print(report)
    return compressions, pruned


def _sweeps(
    settings: Settings,
    model: LeNet5,
    data: Data,
    calibration: Sequence[Tensor],
    dense_accuracy: float,
    console: Console,
    advance: Advance,
) -> tuple[dict[str, list[Point]], list[Sweep]]:
    columns, count = model.fc2.in_features + 1, settings.numbers["sweep"]
    reach_zero = 0.0, Penalty(ratio={"fc1": 1.0})  # in the reference's range, some models keep channels to the end
    penalties: dict[str, list[tuple[float, Penalty]]] = {
        "fc2": [(lam, Penalty({"fc1": lam * columns})) for lam in _spaced(*LAM_EXPONENTS, count)] + [reach_zero],
        "whole network": [(ratio, Penalty(ratio=ratio)) for ratio in _spaced(*LAM_RATIO_EXPONENTS, count)],
    }
    sweeps: dict[str, list[Point]] = {}
    frontiers = []
    for title, cases in penalties.items():
        sweeps[title], swept = [], list[SweepPoint]()
        for number, penalty in cases:
            if sweeps[title] and sweeps[title][-1].all_zero:
                break
            pruned = prune(model, calibration, penalty, run=QUIETLY)
            before, retrained = accuracy(pruned.model, data), None
            if settings.retrain:
                train_epoch(pruned.model, adam(pruned.model), data, settings.numbers["batch_size"], settings.seed)
                retrained = accuracy(pruned.model, data)
            done = [group for group in pruned.report.groups if group.lam is not None]
            lam = (done[0].lam or 0.0) / columns if title == "fc2" else number
            rate = pruned.report.params_after / pruned.report.params_before
            all_zero = any("keeps nothing" in group.note for group in done)
            sweeps[title].append(Point(lam, _widths(pruned), rate, before, retrained, all_zero))
            swept.append(SweepPoint(f"{lam:.2e}", pruned.model, pruned.report, before, retrained))
            advance(f"sweep of {title}")
        console.print(sweep_table(title, sweeps[title]))
        frontiers.append(Sweep(tuple(swept), "test accuracy", True, "params", dense_accuracy, f"Sweep: {title}"))
    return sweeps, frontiers


def _solvers(settings: Settings, out: Path, console: Console, advance: Advance) -> dict[str, list[dict[str, Any]]]:
    """Convergence and timing on the toy problem; writes convergence.png."""
    small, large, limit = (toy.TINY, toy.TINY, 300) if settings.quick else (toy.SMALL, toy.LARGE, 1200)
    problem = toy.problem(small, settings.seed)
    runs = {"solvers": toy.compare_solvers(problem, limit)}
    advance("solvers")
    runs["FISTA"] = toy.compare_momenta(problem, limit)
    advance("momentum of FISTA")
    curves = {title: {run.solver: run.solution.history for run in group} for title, group in runs.items()}
    plots.convergence(curves, out / "convergence.png")
    runs["time to a gap of 1e-6"] = toy.time_solvers(toy.problem(large, settings.seed))
    advance("timing of solvers")
    for title, group in runs.items():
        size = large if title.startswith("time") else small
        console.print(solver_table(f"{title} (d, h, r, n = {size.d}, {size.h}, {size.r}, {size.n})", group))
    return {
        title: [
            {
                "solver": run.solver,
                "iterations": run.solution.iterations,
                "objective": run.solution.history[-1],
                "gap": run.solution.gap,
                "seconds": run.seconds,
            }
            for run in group
        ]
        for title, group in runs.items()
    }


def _spaced(first: float, last: float, count: int) -> list[float]:
    return [float(10 ** (first + (last - first) * i / (count - 1))) for i in range(count)]


def _widths(pruned: Pruned) -> dict[str, int]:
    return {group.name: group.kept for group in pruned.report.groups}


def _channels(model: LeNet5) -> dict[str, int]:
    return {"conv1": model.conv1.out_channels, "conv2": model.conv2.out_channels, "fc1": model.fc1.out_features}

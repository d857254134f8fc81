"""Solvers of the group lasso side by side: seconds to one and the same recomputed relative duality gap.

One thread; every run from zero, the best of half a second. Every run has a process of its own
that is stopped after --patience times Newton's seconds (but not before --least, nor after --limit seconds). The other
packages get the square-root factor of R that they need free of charge; they know plain columns only. A package that
stops on a tolerance of its own is given ever smaller ones, and the first run that reaches the gap counts:

    pip install 'lnr-prune[bench]'
    python benchmarks/solvers.py --data-root FOLDER --json rows.json
    python benchmarks/solvers.py --only A,C --quick
    python benchmarks/solvers.py --what selection --data-root FOLDER     # the lasso's error curve against backward's
"""

import json
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import lnr_prune as lnr
from benchmarks.library.problems import FAMILIES, real_problems
from lnr_prune import GroupLasso
from lnr_prune.recipes import data as datasets

GAP = 1e-6
FRACTIONS = (0.5, 0.1, 0.01, 0.001)
TOLERANCES = (1e-3, 1e-5, 1e-7, 1e-9, 1e-11)  # of the packages, which mean different things by them
OURS = ("newton", "alternate_minimization", "fista", "proximal_gradient")
PEERS = ("celer", "skglm", "sklearn", "cvxpy")
COLUMNS = {"proximal_gradient": 500, "cvxpy": 100}  # up to which it is worth a try
REPEATED = 0.5  # seconds for which a short run is repeated
SIZES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True)
class Row:
    """One solver on one problem at one lam."""

    problem: str
    fraction: float  # of lambda_max
    solver: str
    seconds: float
    gap: float  # recomputed; infinite where the limit came first
    kept: int = 0
    choleskys: float = 0.0  # seconds, in Cholesky factorisations of R


def own(problem: GroupLasso, lam: float, solver: str) -> tuple[float, Tensor]:
    """Seconds and M of one of the library's solvers."""
    begin = time.perf_counter()
    solution = lnr.solve(problem, lam, solver=solver, tol=GAP)
    return time.perf_counter() - begin, solution.coefficients[0]


def peer(name: str, X: Tensor, Y: Tensor, lam: float, tol: float) -> tuple[float, Tensor]:
    """Seconds and M of another package on ``1/2 ||Y - X M^T||^2 + lam sum_g ||M_g||``."""
    X, Y = X * len(X) ** 0.5, Y * len(X) ** 0.5  # all three minimise 1 / (2 n) ||Y - X M^T||^2 + alpha ...
    x, y = np.asfortranarray(X.numpy()), np.asfortranarray(Y.numpy())
    begin = time.perf_counter()
    if name == "celer":
        from celer.homotopy import mtl_path

        M = mtl_path(x, y, alphas=[lam], max_iter=1000, tol=tol)[1][..., 0]
    elif name == "skglm":
        from skglm.estimators import MultiTaskLasso

        M = MultiTaskLasso(lam, tol=tol, max_iter=1000, fit_intercept=False).fit(x, y).coef_
    elif name == "cvxpy":
        import cvxpy as cp

        V = cp.Variable((y.shape[1], x.shape[1]))
        loss = cp.sum_squares(y - x @ V.T) / (2 * len(x))
        settings = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), tol)
        cp.Problem(cp.Minimize(loss + lam * cp.sum(cp.norm(V, 2, axis=0)))).solve(solver=cp.CLARABEL, **settings)
        M = V.value
    else:
        from sklearn.linear_model import MultiTaskLasso as Sklearn

        M = Sklearn(lam, tol=tol, max_iter=10**7, fit_intercept=False).fit(x, y).coef_
    return time.perf_counter() - begin, torch.from_numpy(M.copy())


@lru_cache(maxsize=1)
def factor(problem: GroupLasso) -> tuple[Tensor, Tensor]:
    """X and Y with ``X^T X = R`` and ``Y^T X = B``."""
    (block,) = problem.blocks
    values, U = torch.linalg.eigh(block.R)
    root = values.clamp_min(1e-12 * float(values[-1])).sqrt()
    return root[:, None] * U.T, (block.B @ U / root).T


def quickest(work: Callable[[], tuple[float, Tensor]]) -> tuple[float, Tensor]:
    """The work's result, and its least seconds while it is repeated for half a second."""
    runs = [work()]
    while sum(seconds for seconds, _ in runs) < REPEATED:
        runs.append(work())
    return min(runs, key=itemgetter(0))


def limited(work: Callable[[], tuple[float, Tensor]], limit: float) -> tuple[float, Tensor] | None:
    """What the work returns; None if it takes too long, or fails."""
    context: Any = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        seconds, M = quickest(work)
        sender.send((seconds, M.numpy()))

    process = context.Process(target=child)
    process.start()
    sender.close()
    try:
        result = receiver.recv() if receiver.poll(limit) else None
    except EOFError:
        result = None
    process.kill()
    process.join()
    return None if result is None else (result[0], torch.from_numpy(result[1]))


def measure(
    name: str, problem: GroupLasso, fraction: float, solvers: list[str], bound: Callable[[float], float]
) -> list[Row]:
    """One row a solver; the bias is eliminated for all of them."""
    problem = problem.eliminated.problem
    (block,) = problem.blocks
    lam, cholesky = fraction * problem.lambda_max(), cholesky_seconds(block.R)
    lnr.solve(problem, lam)  # warm
    newton = limited(partial(own, problem, lam, "newton"), 1e3)
    if newton is None:
        raise RuntimeError(f"{name}: Newton's method fails at {fraction} lambda_max")
    limit = bound(newton[0])
    plain = len(block.R) == problem.n_groups
    rows = []
    X, Y = factor(problem) if plain and set(solvers) & set(PEERS) else (block.R, block.B)
    for solver in solvers:
        if (solver in PEERS and not plain) or len(block.R) > COLUMNS.get(solver, len(block.R)):
            continue
        best = (float("inf"), float("inf"), 0)
        for tol in (0.0,) if solver in OURS else TOLERANCES:
            if solver == "newton":
                done: tuple[float, Tensor] | None = newton
            elif solver in OURS:
                done = limited(partial(own, problem, lam, solver), limit)
            else:
                done = limited(partial(peer, solver, X, Y, lam, tol), limit)
            if done is None:
                break
            M = done[1].to(block.R)
            gap = problem.duality_gap((M,), lam)
            best = (done[0], gap, int((problem.norms((M,)) > 0).sum()))
            if gap <= 1.01 * GAP:
                break
        seconds, gap, kept = best
        rows.append(Row(name, fraction, solver, seconds if gap <= 1.01 * GAP else limit, gap, kept, seconds / cholesky))
    return rows


def cholesky_seconds(R: Tensor) -> float:
    """One Cholesky factorisation of R, ridged where R is singular: the best of three."""
    A, times = R + 1e-6 * R.diagonal().mean() * torch.eye(len(R), dtype=R.dtype), []
    for _ in range(3):
        begin = time.perf_counter()
        torch.linalg.cholesky(A)
        times.append(time.perf_counter() - begin)
    return min(times)


@dataclass(frozen=True)
class Curve:
    """Relative errors of the refit at one size, and the seconds of each selection."""

    problem: str
    kept: int
    groups: int
    group_lasso: float
    backward: float
    swapped: float


def curves(name: str, problem: GroupLasso) -> list[Curve]:
    """The debiased group lasso against backward elimination and exchanges, at equal sizes."""
    elimination = lnr.backward(problem)
    rows = []
    for size in SIZES:
        count = max(1, round(size * problem.n_groups))
        supports = [lnr.lam_for_count(problem, count).solution.support, elimination.support(count)]
        supports.append(lnr.exchange(problem, supports[1]))
        errors = (problem.error(lnr.debias(problem, support)) for support in supports)
        rows.append(Curve(name, int(supports[0].sum()), problem.n_groups, *errors))
    return rows


def print_speed(rows: list[Row], solvers: list[str]) -> Table:
    """A line a problem and lam."""
    table = Table(box=box.MARKDOWN)
    for title in ("problem", "lam / max", "kept", *solvers, "ratio", "in chol."):
        table.add_column(title, justify="left" if title == "problem" else "right")
    for key in dict.fromkeys((row.problem, row.fraction) for row in rows):
        line = {row.solver: row for row in rows if (row.problem, row.fraction) == key}
        ours = line["newton"]
        others = [row for name, row in line.items() if name != "newton"]
        ratio = min((row.seconds for row in others), default=0.0) / ours.seconds
        bound = ">" if others and all(row.gap > 1.01 * GAP for row in others) else ""
        cells = (
            f"{'>' if row.gap > 1.01 * GAP else ''}{row.seconds:.3g}" if row else "-" for row in map(line.get, solvers)
        )
        table.add_row(key[0], f"{key[1]:g}", str(ours.kept), *cells, f"{bound}{ratio:.1f}", f"{ours.choleskys:.1f}")
    return table


def main(
    what: Annotated[str, typer.Option(help="speed, or selection: the errors of the supports.")] = "speed",
    only: Annotated[str, typer.Option(help="Problems, comma-separated. Default: all.")] = "",
    solvers: Annotated[str, typer.Option(help="Solvers, comma-separated.")] = ",".join((*OURS, *PEERS)),
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write the rows to.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="lam = 0.1 lambda_max only, at most 5 seconds a run.")] = False,
    data_root: Annotated[
        Path | None, typer.Option(envvar=datasets.DATA_ENVIRONMENT, help="Folder of MNIST/, CIFAR10/, weights/ ...")
    ] = None,
    limit: Annotated[float, typer.Option(help="Seconds a run may take.")] = 60.0,
    patience: Annotated[float, typer.Option(help="The same, in seconds that Newton takes.")] = 20.0,
    least: Annotated[float, typer.Option(help="Seconds that every run may take.")] = 2.0,
) -> None:
    """Prints one line a problem and lam."""
    torch.set_num_threads(1)
    problems = {**FAMILIES, **(real_problems(data_root) if data_root else {})}
    chosen = [name.strip() for name in only.split(",") if name] or list(problems)
    if unknown := [name for name in chosen if name not in problems]:
        raise typer.BadParameter(f"unknown problem {unknown[0]!r}, expected some of {', '.join(problems)}")
    console, names = Console(width=200), solvers.split(",")
    for name in set(names) & set(PEERS):
        peer(name, torch.eye(5, dtype=torch.float64), torch.ones(5, 2, dtype=torch.float64), 0.1, 1e-3)  # compiles
    rows: list[Any] = []
    for name in track(chosen, "problems", console=Console(stderr=True), transient=True):
        torch.manual_seed(0)
        problem = problems[name]()
        fractions = (0.1,) if quick else FRACTIONS
        if name in ("A", "B"):
            fractions = (0.1 / problem.lambda_max(), *fractions)  # the practical session's own lam
        if what == "selection":
            rows += curves(name, problem)
        for fraction in fractions if what == "speed" else ():
            rows += measure(
                name,
                problem,
                fraction,
                names,
                lambda newton: min(5.0 if quick else limit, max(least, patience * newton)),
            )
        if json_file:  # as far as it has come
            json_file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    if what == "selection":
        table = Table(*Curve.__dataclass_fields__, box=box.MARKDOWN)
        for row in rows:
            table.add_row(
                row.problem, str(row.kept), str(row.groups), *(f"{e:.5f}" for e in list(asdict(row).values())[3:])
            )
    else:
        table = print_speed(rows, names)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)

"""The reference's toy problem: random data of low rank, and how fast each solver reaches its optimum."""

import time
from dataclasses import dataclass

import torch

from lnr_prune.lasso.alternate_minimization import AlternateMinimization
from lnr_prune.lasso.fista import Fista
from lnr_prune.lasso.newton import Newton
from lnr_prune.lasso.problem import Block, GroupLasso
from lnr_prune.lasso.proximal_gradient import ProximalGradient
from lnr_prune.lasso.solution import Solution
from lnr_prune.lasso.solve import Solver, solve

LAM = 0.1
MOMENTA = (1.0, 5.0, 50.0, 250.0)
CHUNK = 10_000


@dataclass(frozen=True)
class Size:
    """d inputs of rank r, h outputs, n samples."""

    d: int
    h: int
    r: int
    n: int


SMALL = Size(d=100, h=200, r=80, n=10_000)  # for convergence
LARGE = Size(d=500, h=200, r=450, n=60_000)  # for timing
TINY = Size(d=20, h=30, r=16, n=1_000)  # for quick runs


@dataclass(frozen=True)
class Run:
    """One solver's way to the optimum, and how long it took."""

    solver: str
    solution: Solution
    seconds: float


def problem(size: Size, seed: int = 0) -> GroupLasso:
    """``x = A z``, ``y = W x`` for Gaussian A, z and W; second moments divided by d, as in the reference."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    A, W = draw(size.d, size.r), draw(size.h, size.d)
    zz = torch.zeros(size.r, size.r, dtype=torch.float64)
    for begin in range(0, size.n, CHUNK):
        z = draw(size.r, min(CHUNK, size.n - begin))
        zz += z @ z.T
    R = A @ zz @ A.T / (size.n * size.d)
    B = W @ R
    return GroupLasso((Block(R, B, float((B * W).sum())),))


def compare_solvers(toy: GroupLasso, max_iterations: int) -> list[Run]:
    """Every solver from zero, to the rounding floor or ``max_iterations``."""
    solvers: dict[str, Solver] = {
        "proximal gradient": ProximalGradient(max_iterations=max_iterations),
        "FISTA, q = 10": Fista(max_iterations=max_iterations),
        "alternate minimization, then FISTA": AlternateMinimization(max_iterations=max_iterations),
        "Newton on eta": Newton(),
    }
    return [_timed(name, toy, solver, tol=1e-14) for name, solver in solvers.items()]


def compare_momenta(toy: GroupLasso, max_iterations: int) -> list[Run]:
    """FISTA with every q of the reference, from the reference's start: 0.01 everywhere."""
    start = tuple(M + 0.01 for M in toy.zeros())
    return [
        _timed(f"FISTA, q = {q:g}", toy, Fista(momentum=q, max_iterations=max_iterations), tol=1e-14, start=start)
        for q in MOMENTA
    ]


def time_solvers(toy: GroupLasso, tol: float = 1e-6) -> list[Run]:
    """The solvers that the reference times, and the default one, to the same duality gap."""
    solvers: dict[str, Solver] = {
        "FISTA, q = 10": Fista(),
        "alternate minimization, then FISTA": AlternateMinimization(),
        "Newton on eta": Newton(),
    }
    return [_timed(name, toy, solver, tol=tol) for name, solver in solvers.items()]


def _timed(
    name: str, toy: GroupLasso, solver: Solver, tol: float, start: tuple[torch.Tensor, ...] | None = None
) -> Run:
    begin = time.perf_counter()
    solution = solve(toy, LAM, solver=solver, tol=tol, start=start)
    return Run(name, solution, time.perf_counter() - begin)

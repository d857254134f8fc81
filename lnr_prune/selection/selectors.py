"""Selectors: which channels of a group are kept, and the coefficients before the refit."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from lnr_prune.lasso.backward import backward
from lnr_prune.lasso.exchange import exchange
from lnr_prune.lasso.path import lam_for_count
from lnr_prune.lasso.problem import GroupLasso, debias
from lnr_prune.lasso.prox import Matrices
from lnr_prune.lasso.solve import Solver, find_solver, solve
from lnr_prune.runtime.checks import check_count, check_seed, nearest


@dataclass(frozen=True, eq=False)
class Selection:
    """What a selector decides.

    Attributes:
        support: True for every channel that is kept, (n_groups,) bool.
        coefficients: M on the support, zero elsewhere, as the selector left it.
        lam: The lam it was found at; None if there is none.
        gap: Relative duality gap of the solve; None if nothing was solved.
        note: What a user should know, "" if nothing.
    """

    support: Tensor
    coefficients: Matrices
    lam: float | None = None
    gap: float | None = None
    note: str = ""


@dataclass(frozen=True, eq=False)
class Candidates:
    """What a selector may look at.

    Attributes:
        problem: The group-lasso problem of the channels over all their consumers.
        original: The consumers' own matrices, for selectors that only mask.
        magnitude: L1 norm of every channel's filter over its producers, (n_groups,).
        draws: Uniform in [0, 1), (n_groups,), for selectors that draw.
    """

    problem: GroupLasso
    original: Matrices
    magnitude: Tensor
    draws: Tensor


class Selector(Protocol):
    """Settings of a selector, and its choice."""

    def choose(self, candidates: Candidates, count: int) -> Selection:
        """``count`` of the candidates' channels."""
        ...


@dataclass(frozen=True)
class Lasso:
    """The channels that the lasso keeps at the penalty where it keeps ``count``; ties are resolved by norm.

    Attributes:
        solver: Name or settings of the solver, see `lnr_prune.solve`.

    Raises:
        ValueError: If no solver has this name.
    """

    solver: str | Solver = "newton"

    def __post_init__(self) -> None:
        object.__setattr__(self, "solver", find_solver(self.solver))

    def choose(self, candidates: Candidates, count: int) -> Selection:
        """At the lam that keeps ``count``, found by bisection."""
        problem = candidates.problem
        search = lam_for_count(problem, count, solver=self.solver)
        solution = search.solution
        chosen = Selection(solution.support, solution.coefficients, solution.lam, solution.gap)
        if solution.n_kept == count:
            return chosen
        support = _largest(problem.norms(solution.coefficients), count)
        note = f"{search.note}: ties resolved by norm"
        return replace(
            chosen, support=support, coefficients=_masked(problem, solution.coefficients, support), note=note
        )


@dataclass(frozen=True)
class Backward:
    """The channels that backward elimination keeps, refitted; better than the lasso at strong pruning.

    Attributes:
        swaps: How many dropped channels are tried in place of a kept one, as long as that helps; 0 = none. 8 is a good
            number.

    Raises:
        ValueError, TypeError: If swaps is not a number, or below 0.
    """

    swaps: int = 0

    def __post_init__(self) -> None:
        check_count("swaps", self.swaps, 0)

    def choose(self, candidates: Candidates, count: int) -> Selection:
        """The channels that elimination leaves, improved by exchanges."""
        problem = candidates.problem
        support = backward(problem).support(count)
        if self.swaps:
            support = exchange(problem, support, tries=self.swaps)
        return Selection(support, debias(problem, support))


@dataclass(frozen=True)
class Norm:
    """The channels whose filters have the largest L1 norm (a baseline)."""

    def choose(self, candidates: Candidates, count: int) -> Selection:
        """The ``count`` largest."""
        return _mask_original(candidates, _largest(candidates.magnitude, count))


@dataclass(frozen=True)
class Random:
    """Channels drawn at random (a baseline).

    Attributes:
        seed: The same seed draws the same channels.

    Raises:
        ValueError, TypeError: If the seed is not an int, or outside [-2^63, 2^64).
    """

    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)

    def choose(self, candidates: Candidates, count: int) -> Selection:
        """``count`` channels, drawn at random."""
        return _mask_original(candidates, _largest(candidates.draws.to(candidates.problem.weights.device), count))


SELECTORS: Mapping[str, Selector] = {
    "group_lasso": Lasso(),
    "backward": Backward(),
    "norm": Norm(),
    "random": Random(),
}


def find_selector(selector: str | Selector) -> Selector:
    """The selector of this name, with its defaults; settings of a selector are returned as they are.

    Raises:
        ValueError: If there is none of this name.
        TypeError: If it is not a selector.
    """
    if isinstance(selector, str):
        if selector not in SELECTORS:
            raise ValueError(f"unknown selector {selector!r}; {nearest(selector, SELECTORS)}")
        return SELECTORS[selector]
    if not callable(getattr(selector, "choose", None)) or isinstance(selector, type):
        raise TypeError(
            f"selector must be one of {', '.join(SELECTORS)}, or settings such as Backward(swaps=8), got {selector!r}"
        )
    return selector


def at_lam(candidates: Candidates, lam: float, solver: str | Solver) -> Selection:
    """The channels that the lasso keeps at lam; if it keeps none, the one that would enter first."""
    problem = candidates.problem
    solution = solve(problem, lam, solver=solver)
    if solution.n_kept:
        return Selection(solution.support, solution.coefficients, lam, solution.gap)
    reduced = problem.eliminated.problem
    support = _largest(reduced.norms([block.B for block in reduced.blocks]) / problem.weights, 1)
    note = f"lam={lam:.4g} >= lambda_max={problem.lambda_max():.4g} keeps nothing: one channel was kept"
    return Selection(support, solution.coefficients, lam, solution.gap, note)


def _largest(scores: Tensor, count: int) -> Tensor:
    support = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    support[torch.argsort(scores, descending=True, stable=True)[:count]] = True
    return support


def _mask_original(candidates: Candidates, support: Tensor) -> Selection:
    return Selection(support, _masked(candidates.problem, candidates.original, support))


def _masked(problem: GroupLasso, coefficients: Matrices, support: Tensor) -> Matrices:
    """Zero off the support; unpenalised columns stay."""
    keep = torch.cat([support, support.new_ones(1)])
    return tuple(M * keep[groups] for M, groups in zip(coefficients, problem.groups, strict=True))

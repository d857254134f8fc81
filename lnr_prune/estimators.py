"""The group lasso as scikit-learn's users know it: `MultiTaskGroupLasso` and `GroupLassoCV`, on the solvers of `lasso`.

This module needs scikit-learn; ``import lnr_prune`` does not load it.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from lnr_prune.lasso.path import regularization_path
from lnr_prune.lasso.problem import Block, GroupLasso
from lnr_prune.lasso.solution import Solution, Status
from lnr_prune.lasso.solve import Solver, solve
from lnr_prune.runtime.optional import needed

needed("sklearn", install="scikit-learn")

from sklearn.base import BaseEstimator, RegressorMixin  # noqa: E402
from sklearn.exceptions import ConvergenceWarning  # noqa: E402
from sklearn.model_selection import check_cv  # noqa: E402
from sklearn.utils.validation import check_is_fitted, validate_data  # noqa: E402

Array = NDArray[np.float64]


class _Linear(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """What both estimators share: predictions, and how the problem is made of samples."""

    def predict(self, X: ArrayLike) -> Array:
        """``X coef_^T + intercept_``: (samples,) or (samples, targets), as y was."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64)
        predicted: Array = X @ self.coef_.T + self.intercept_
        return predicted

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def _samples(self, X: ArrayLike, y: ArrayLike) -> tuple[Array, Array]:
        samples: tuple[Array, Array] = validate_data(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True)
        return samples[0], np.asarray(samples[1], dtype=np.float64)

    def _problem(self, X: Array, Y: Array) -> tuple[GroupLasso, Array, Array]:
        """The problem of the centred samples, and the means that were subtracted."""
        centre = (lambda values: values.mean(0)) if self.fit_intercept else (lambda values: np.zeros(values.shape[1]))
        mean_x, mean_y = centre(X), centre(Y)
        x, y = torch.from_numpy(X - mean_x), torch.from_numpy(Y - mean_y)
        groups = None if self.groups is None else torch.as_tensor(np.asarray(self.groups))
        weights = None if self.weights is None else torch.as_tensor(np.asarray(self.weights), dtype=torch.float64)
        block = Block(x.T @ x / len(x), y.T @ x / len(x), float(y.square().sum()) / len(x), groups)  # type: ignore[arg-type]
        return GroupLasso((block,), weights), mean_x, mean_y  # type: ignore[arg-type]

    def _take(self, solution: Solution, flat: bool, mean_x: Array, mean_y: Array) -> None:
        """Sets what is fitted from a solution; ``flat`` says that y was (samples,)."""
        if solution.status is not Status.CONVERGED:
            warnings.warn(f"{type(self).__name__}: {solution.status.advice}", ConvergenceWarning, stacklevel=3)
        coefficients = solution.coefficients[0].numpy()
        intercept = mean_y - coefficients @ mean_x
        self.coef_ = coefficients[0] if flat else coefficients
        self.intercept_ = float(intercept[0]) if flat else intercept
        self.support_ = solution.support.numpy()
        self.dual_gap_, self.n_iter_ = solution.gap, solution.iterations


class MultiTaskGroupLasso(_Linear):
    """``min_W,b  1/(2n) ||Y - X W^T - b||_F^2 + lam sum_g w_g ||W[:, g]||_F``: an estimator of scikit-learn.

    A group is kept or dropped for all targets together. With one target and one column a group this is the lasso,
    with several targets scikit-learn's MultiTaskLasso. Every solution is certified by its duality gap.

    Attributes:
        coef_: W, (targets, features), or (features,) if y was one column.
        intercept_: b.
        support_: True for every group that is kept.
        dual_gap_: The relative duality gap.
        n_iter_: Iterations of the solver.

    Example:
        >>> import numpy as np
        >>> X = np.random.default_rng(0).normal(size=(50, 4))
        >>> fitted = MultiTaskGroupLasso(lam=0.2, groups=[0, 0, 1, 1]).fit(X, X[:, :2] + 1)
        >>> fitted.support_
        array([ True, False])
    """

    def __init__(
        self,
        lam: float = 0.1,
        *,
        groups: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        fit_intercept: bool = True,
        solver: str | Solver = "newton",
        tol: float = 1e-6,
    ) -> None:
        """Settings, which scikit-learn can read and set.

        Args:
            lam: The penalty, >= 0.
            groups: Group of every column of X, -1 for one without a penalty. None = every column is its own.
            weights: ``w_g > 0`` of every group. None = 1.
            fit_intercept: Whether there is a b.
            solver: As for `solve`.
            tol: As for `solve`.
        """
        self.lam = lam
        self.groups = groups
        self.weights = weights
        self.fit_intercept = fit_intercept
        self.solver = solver
        self.tol = tol

    def fit(self, X: ArrayLike, y: ArrayLike) -> "MultiTaskGroupLasso":
        """Fits W and b to samples, (samples, features) and (samples,) or (samples, targets).

        Raises:
            ValueError: If a setting or a value is out of range, or shapes do not fit.
        """
        X, y = self._samples(X, y)
        problem, *means = self._problem(X, y.reshape(len(y), -1))
        self._take(solve(problem, self.lam, solver=self.solver, tol=self.tol), y.ndim == 1, *means)
        return self


class GroupLassoCV(_Linear):
    """`MultiTaskGroupLasso` at the penalty that predicts best in a cross-validation, along the path of each fold.

    Attributes:
        lam_: The penalty that was chosen.
        lams_: All penalties, the largest first.
        mse_path_: Mean squared error on every fold, (penalties, folds).
        coef_, intercept_, support_, dual_gap_, n_iter_: As for `MultiTaskGroupLasso`, fitted to all samples.

    Example:
        >>> import numpy as np
        >>> X = np.random.default_rng(0).normal(size=(50, 4))
        >>> fitted = GroupLassoCV(groups=[0, 0, 1, 1]).fit(X, X[:, :2] + 1)
        >>> bool(fitted.score(X, X[:, :2] + 1) > 0.99)
        True
    """

    def __init__(
        self,
        *,
        groups: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        lams: Sequence[float] | None = None,
        n_lams: int = 30,
        smallest: float = 1e-3,
        cv: Any = None,
        fit_intercept: bool = True,
        solver: str | Solver = "newton",
        tol: float = 1e-6,
    ) -> None:
        """Settings, which scikit-learn can read and set.

        Args:
            groups: As for `MultiTaskGroupLasso`.
            weights: As for `MultiTaskGroupLasso`.
            lams: The penalties. None = ``n_lams`` of them, down to ``smallest`` times the one that keeps nothing.
            n_lams: As for `regularization_path`.
            smallest: As for `regularization_path`.
            cv: A number of folds, a splitter of scikit-learn, or the splits. None = 5 folds.
            fit_intercept: Whether there is an intercept.
            solver: As for `solve`.
            tol: As for `solve`.
        """
        self.groups = groups
        self.weights = weights
        self.lams = lams
        self.n_lams = n_lams
        self.smallest = smallest
        self.cv = cv
        self.fit_intercept = fit_intercept
        self.solver = solver
        self.tol = tol

    def fit(self, X: ArrayLike, y: ArrayLike) -> "GroupLassoCV":
        """Chooses the penalty, and fits all samples with it.

        Raises:
            ValueError: If a setting or a value is out of range, or shapes do not fit.
        """
        X, y = self._samples(X, y)
        Y, how = y.reshape(len(y), -1), {"solver": self.solver, "tol": self.tol, "progress": False}
        problem, *means = self._problem(X, Y)
        whole = regularization_path(problem, self.lams, n_lams=self.n_lams, smallest=self.smallest, **how)  # type: ignore[arg-type]
        self.lams_ = whole.lams.numpy()
        errors = []
        for train, test in check_cv(self.cv).split(X, y):
            of_fold, mean_x, mean_y = self._problem(X[train], Y[train])
            path = regularization_path(of_fold, self.lams_.tolist(), **how)  # type: ignore[arg-type]
            M = np.stack([solution.coefficients[0].numpy() for solution in path.solutions])
            errors.append(((Y[test] - mean_y - (X[test] - mean_x) @ M.transpose(0, 2, 1)) ** 2).mean((1, 2)))
        self.mse_path_ = np.stack(errors, axis=1)
        best = int(self.mse_path_.mean(1).argmin())  # of equally good ones, the largest
        self.lam_ = float(self.lams_[best])
        self._take(whole.solutions[best], y.ndim == 1, *means)
        return self

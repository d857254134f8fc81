"""The estimators keep scikit-learn's contract, give what its own lasso gives, and are loaded only when asked for."""

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lnr_prune as lnr

sklearn = pytest.importorskip("sklearn", minversion="1.6")
from sklearn.exceptions import ConvergenceWarning  # noqa: E402
from sklearn.linear_model import Lasso, LassoCV, MultiTaskLasso  # noqa: E402
from sklearn.utils.estimator_checks import check_estimator  # noqa: E402


def samples(targets: int = 2) -> tuple[Any, Any]:
    """60 samples of 6 features, of which the first three count; they come in pairs."""
    generator = np.random.default_rng(0)
    X = generator.normal(size=(60, 6)) + np.array([1, 0, 2, 0, 0, 3])
    W = np.zeros((6, targets))
    W[:3] = generator.normal(size=(3, targets))
    return X, X @ W + 5 + 0.3 * generator.normal(size=(60, targets))


@pytest.mark.parametrize("estimator", [lnr.MultiTaskGroupLasso(), lnr.GroupLassoCV(n_lams=4, cv=2)])
def test_the_contract_of_scikit_learn(estimator: Any) -> None:
    found = check_estimator(estimator, on_skip=None, on_fail=None)
    assert [each["check_name"] for each in found if each["status"] not in ("passed", "skipped")] == []
    assert len([each for each in found if each["status"] == "passed"]) > 30


@pytest.mark.parametrize("fit_intercept", [True, False])
def test_it_is_the_lasso_of_scikit_learn(fit_intercept: bool) -> None:
    X, Y = samples()
    exact: dict[str, Any] = {"tol": 1e-12, "fit_intercept": fit_intercept}
    for y, reference in ((Y, MultiTaskLasso), (Y[:, 0], Lasso)):
        ours = lnr.MultiTaskGroupLasso(0.2, **{**exact, "tol": 1e-12}).fit(X, y)
        theirs = reference(0.2, max_iter=100_000, **exact).fit(X, y)
        np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-5)
        np.testing.assert_allclose(ours.intercept_, theirs.intercept_, atol=1e-5)
        assert ours.score(X, y) == pytest.approx(theirs.score(X, y))
        assert ours.predict(X).shape == y.shape


def test_groups_stay_or_leave_together_and_some_cost_nothing() -> None:
    X, Y = samples()
    fitted = lnr.MultiTaskGroupLasso(1.0, groups=[0, 0, 1, 1, 2, -1], weights=[1, 1, 9]).fit(X, Y)
    assert fitted.support_.tolist() == [True, True, False]
    assert [bool(column.any()) for column in fitted.coef_.T] == [True, True, True, True, False, True]
    assert fitted.dual_gap_ <= 1e-6
    with pytest.raises(ValueError, match="groups must have one integer >= -1 for each of the 6 columns"):
        lnr.MultiTaskGroupLasso(groups=[0, 1]).fit(X, Y)
    with pytest.raises(ValueError, match="lam must be finite and >= 0, got -1"):
        lnr.MultiTaskGroupLasso(-1).fit(X, Y)


def test_the_penalty_that_predicts_best() -> None:
    X, Y = samples(1)
    lams = [1.0, 0.3, 0.1, 0.03, 0.01, 0.003]
    ours = lnr.GroupLassoCV(lams=lams[::-1], tol=1e-10).fit(X, Y[:, 0])
    theirs = LassoCV(alphas=lams, tol=1e-10).fit(X, Y[:, 0])
    assert ours.lam_ == theirs.alpha_
    np.testing.assert_allclose(ours.mse_path_, theirs.mse_path_, rtol=1e-4)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-5)
    alone = lnr.MultiTaskGroupLasso(ours.lam_, tol=1e-10).fit(X, Y[:, 0])
    np.testing.assert_allclose(ours.coef_, alone.coef_, atol=1e-5)
    assert ours.lams_.tolist() == lams


def test_a_solution_that_is_not_certified_warns() -> None:
    X, Y = samples()
    with pytest.warns(ConvergenceWarning, match="the iteration limit was reached"):
        lnr.MultiTaskGroupLasso(0.01, solver=lnr.ProximalGradient(max_iterations=1), tol=1e-12).fit(X, Y)


def test_nothing_else_loads_scikit_learn_and_without_it_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    package = Path(lnr.__file__).parent
    loading = re.compile(r"^(import|from) (sklearn|lnr_prune\.estimators)", re.MULTILINE)
    files = {str(file.relative_to(package)): file.read_text(encoding="utf-8") for file in package.rglob("*.py")}
    assert [name for name, text in files.items() if loading.search(text)] == ["estimators.py"]
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.delitem(sys.modules, "lnr_prune.estimators")
    with pytest.raises(lnr.LnrPruneError, match="this needs scikit-learn, which is not installed: run pip install sci"):
        lnr.GroupLassoCV  # noqa: B018
    with pytest.raises(AttributeError, match="module 'lnr_prune' has no attribute 'GroupLassso'"):
        lnr.GroupLassso  # type: ignore[attr-defined]  # noqa: B018

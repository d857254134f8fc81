"""lnr-prune: make a trained PyTorch model smaller and faster by linear neural reconstruction, without retraining.

The verbs are `prune`, `sweep`, `inspect`, `load`, `from_pretrained` and, for the convex problem alone, `solve`. These
are the rooms of the package, in order: each one imports only from those before it::

    lasso        the convex problem and its solvers: tensors only, no model
    runtime      processes, work folders, safe files, progress
    report       results as people look at them
    graph        model -> channel groups
    calibration  run the model on data, watch its layers, sum second moments
    collapse     take channels out, prove it, store it
    refit        least squares through both networks
    selection    how many channels, and which
"""

import importlib
from typing import TYPE_CHECKING, Any

from lnr_prune._version import __version__
from lnr_prune.calibration.adapter import Adapter, register
from lnr_prune.calibration.data import Batches
from lnr_prune.calibration.watch import LayerCall
from lnr_prune.collapse.apply import apply_plan
from lnr_prune.collapse.files import load, load_plan, save_plan
from lnr_prune.collapse.hugging_face.folder import from_pretrained
from lnr_prune.collapse.plan import Plan
from lnr_prune.errors import (
    AdapterError,
    CalibrationError,
    GraphError,
    LnrPruneError,
    PlanError,
    RankError,
    VerificationError,
)
from lnr_prune.graph.groups import Consumer
from lnr_prune.graph.modules.folding import fold
from lnr_prune.inspection import Inspection, inspect
from lnr_prune.lasso.alternate_minimization import AlternateMinimization
from lnr_prune.lasso.backward import Elimination, backward
from lnr_prune.lasso.exchange import exchange
from lnr_prune.lasso.fista import Fista
from lnr_prune.lasso.newton import Newton
from lnr_prune.lasso.path import CountSearch, RegularizationPath, lam_for_count, regularization_path
from lnr_prune.lasso.problem import Block, GroupLasso, debias
from lnr_prune.lasso.prox import prox_group_lasso
from lnr_prune.lasso.proximal_gradient import ProximalGradient
from lnr_prune.lasso.solution import Solution, Status
from lnr_prune.lasso.solve import solve
from lnr_prune.prune import prune
from lnr_prune.pruned import Pruned
from lnr_prune.recipe import Recipe
from lnr_prune.refit.refit import Refit
from lnr_prune.report.frontier import Sweep
from lnr_prune.report.plots import plot_convergence
from lnr_prune.runtime.run import Run
from lnr_prune.selection.amount import Keep, Penalty
from lnr_prune.selection.budget import Budget, Effort, Grid
from lnr_prune.selection.selectors import Backward, Lasso, Norm, Random
from lnr_prune.sweep import sweep
from lnr_prune.tolerance import Tolerance

if TYPE_CHECKING:
    from lnr_prune.estimators import GroupLassoCV, MultiTaskGroupLasso
else:

    def __getattr__(name: str) -> Any:
        """The estimators, which need scikit-learn: it is loaded only for them."""
        if name in ("GroupLassoCV", "MultiTaskGroupLasso"):
            return getattr(importlib.import_module("lnr_prune.estimators"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Adapter",
    "AdapterError",
    "AlternateMinimization",
    "Backward",
    "Batches",
    "Block",
    "Budget",
    "CalibrationError",
    "Consumer",
    "CountSearch",
    "Effort",
    "Elimination",
    "Fista",
    "GraphError",
    "Grid",
    "GroupLasso",
    "GroupLassoCV",
    "Inspection",
    "Keep",
    "Lasso",
    "LayerCall",
    "LnrPruneError",
    "MultiTaskGroupLasso",
    "Newton",
    "Norm",
    "Penalty",
    "Plan",
    "PlanError",
    "ProximalGradient",
    "Pruned",
    "Random",
    "RankError",
    "Recipe",
    "Refit",
    "RegularizationPath",
    "Run",
    "Solution",
    "Status",
    "Sweep",
    "Tolerance",
    "VerificationError",
    "__version__",
    "apply_plan",
    "backward",
    "debias",
    "exchange",
    "fold",
    "from_pretrained",
    "inspect",
    "lam_for_count",
    "load",
    "load_plan",
    "plot_convergence",
    "prox_group_lasso",
    "prune",
    "register",
    "regularization_path",
    "save_plan",
    "solve",
    "sweep",
]

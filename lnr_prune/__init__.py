"""lnr-prune: make a trained PyTorch model smaller and faster by linear neural reconstruction, without retraining."""

from lnr_prune.allocation import Budget
from lnr_prune.backward import Elimination, backward
from lnr_prune.errors import (
    AdapterError,
    CalibrationError,
    GraphError,
    LnrPruneError,
    PlanError,
    RankError,
    VerificationError,
)
from lnr_prune.files import load
from lnr_prune.inspection import Inspection, inspect
from lnr_prune.path import CountSearch, RegularizationPath, lam_for_count, regularization_path
from lnr_prune.plan import Plan
from lnr_prune.problem import Block, GroupLasso, debias
from lnr_prune.prox import prox_group_lasso
from lnr_prune.prune import Pruned, prune
from lnr_prune.registry import Adapter, register
from lnr_prune.solvers import (
    AlternateMinimization,
    Fista,
    Newton,
    ProximalGradient,
    Solution,
    Status,
    solve,
)
from lnr_prune.swaps import exchange
from lnr_prune.sweep import Sweep, sweep

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AdapterError",
    "AlternateMinimization",
    "Block",
    "Budget",
    "CalibrationError",
    "CountSearch",
    "Elimination",
    "Fista",
    "GraphError",
    "GroupLasso",
    "Inspection",
    "LnrPruneError",
    "Newton",
    "Plan",
    "PlanError",
    "ProximalGradient",
    "Pruned",
    "RankError",
    "RegularizationPath",
    "Solution",
    "Status",
    "Sweep",
    "VerificationError",
    "backward",
    "debias",
    "exchange",
    "inspect",
    "lam_for_count",
    "load",
    "prox_group_lasso",
    "prune",
    "register",
    "regularization_path",
    "solve",
    "sweep",
]

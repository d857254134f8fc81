"""The errors that lnr-prune raises; bad arguments raise plain ``ValueError`` and ``TypeError``."""

import torch


class LnrPruneError(Exception):
    """Base class: ``except LnrPruneError`` catches all errors of this library."""


class GraphError(LnrPruneError):
    """The model cannot be traced, copied or shrunk safely."""


class CalibrationError(LnrPruneError):
    """The calibration data cannot be used: empty, of the wrong shape, or not finite."""


class AdapterError(LnrPruneError):
    """No adapter, or more than one, fits a consumer."""


class VerificationError(LnrPruneError):
    """The pruned model does not equal the masked model; nothing was changed."""


class PlanError(LnrPruneError):
    """A plan, or a file that holds one, is damaged or belongs to another model; nothing was changed."""


class RankError(CalibrationError):
    """In a process group, a rank has failed, and all ranks raise this; or the other ranks have been lost."""


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the CPU or an accelerator ran out of memory."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)

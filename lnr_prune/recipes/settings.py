"""The settings of the LeNet-5 session."""

import math
from dataclasses import dataclass
from pathlib import Path

from lnr_prune.recipes import data as datasets


@dataclass(frozen=True)
class Settings:
    """Settings of a session; None stands for a default that depends on the data and on ``quick``.

    Attributes:
        data: "digits", "mnist" or "fashion".
        data_root: Folder of MNIST or Fashion-MNIST.
        weights: Trained weights (safetensors) to load instead of training.
        out: Folder for everything that is written.
        epochs: Passes over the training images.
        batch_size: Images per training step.
        calibration: Training images used for calibration.
        lam: Penalty of fc2, in the reference's units.
        lam_ratio: Penalty of the whole network, as a fraction of every layer's lambda_max.
        sweep: Points of each Pareto sweep.
        retrain: Whether to also retrain the points of the sweeps for one epoch.
        device: Where it runs.
        seed: Seed of initialisation, shuffling and the toy problem.
        quick: A small session, for tests.
        command: The command that it was started by, for the page; "" if there was none.

    Raises:
        ValueError: If a setting is out of range.
    """

    data: str = "digits"
    data_root: Path | None = None
    weights: Path | None = None
    out: Path = Path("lenet5-results")
    epochs: int | None = None
    batch_size: int | None = None
    calibration: int | None = None
    lam: float = 0.01
    lam_ratio: float = 0.1
    sweep: int | None = None
    retrain: bool = True
    device: str = "cpu"
    seed: int = 0
    quick: bool = False
    command: str = ""

    def __post_init__(self) -> None:
        if self.data not in datasets.NAMES:
            raise ValueError(f"unknown data set: got {self.data!r}, expected one of {', '.join(datasets.NAMES)}")
        for name, least in (("epochs", 1), ("batch_size", 1), ("calibration", 2), ("sweep", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for name in ("lam", "lam_ratio"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")

    @property
    def numbers(self) -> dict[str, int]:
        """The settings that may be None, with the values that are used."""
        digits = self.data == "digits"
        default = {"epochs": 20 if digits else 8, "batch_size": 64 if digits else 256, "calibration": 5000, "sweep": 10}
        if self.quick:
            default |= {"epochs": 2, "calibration": 300, "sweep": 3}
        return {name: getattr(self, name) or value for name, value in default.items()}

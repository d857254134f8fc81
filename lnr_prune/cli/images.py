"""Folders of images, made ready as the model was trained."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lnr_prune.errors import CalibrationError
from lnr_prune.runtime.optional import import_torchvision, needed
from lnr_prune.runtime.processes import Ranks

FILES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")


@dataclass(frozen=True)
class Look:
    """How images are made ready: scaled, cropped at the centre, normalised.

    Attributes:
        size: Height and width that the model reads.
        crop: Share of the scaled image that the crop keeps: an image is scaled so that it just covers size / crop.
        mean: Mean of every colour, subtracted from values in [0, 1]; with a single value, images become grey.
        std: Standard deviation of every colour; the difference is divided by it.
        interpolation: How images are scaled, one of `INTERPOLATIONS`.
        squash: Whether images are scaled to size / crop exactly, whatever their proportions.

    Raises:
        ValueError: If a setting is out of range.
    """

    size: tuple[int, int] = (224, 224)
    crop: float = 1.0
    mean: tuple[float, ...] = IMAGENET[0]
    std: tuple[float, ...] = IMAGENET[1]
    interpolation: str = "bicubic"
    squash: bool = False

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise ValueError(
                f"--mean and --std must both have 3 values, or 1 for grey images: got {self.mean}, {self.std}"
            )
        if not 0 < self.crop <= 1:
            raise ValueError(f"--crop must be in (0, 1], got {self.crop}")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"--interpolation must be one of {', '.join(INTERPOLATIONS)}, got {self.interpolation!r}")

    def __str__(self) -> str:
        colours = (" ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        height, width = self.size
        return (
            f"{height} x {width}, crop {self.crop:.3g}, {self.interpolation}, mean {next(colours)}, std {next(colours)}"
        )

    def of(self, image: Any) -> Tensor:
        """One of Pillow's images as a (colours, height, width) tensor."""
        image = image.convert("L" if len(self.mean) == 1 else "RGB")
        height, width = self.size
        covered = [math.floor(side / self.crop + 1e-6) for side in (width, height)]
        scale = max(wanted / length for wanted, length in zip(covered, image.size, strict=True))
        sides = [max(wanted, int(length * scale)) for wanted, length in zip(covered, image.size, strict=True)]
        image = image.resize(
            covered if self.squash else sides, getattr(needed("PIL.Image"), self.interpolation.upper())
        )
        left, top = (round((length - side) / 2) for length, side in zip(image.size, (width, height), strict=True))
        image = image.crop((left, top, left + width, top + height))
        pixels = torch.from_numpy(np.array(image)).view(height, width, -1).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (pixels - mean) / std


def look_of(model: nn.Module, spec: str, weights: str | None = None) -> tuple[Look, str]:
    """How a model's images are made ready, and who says so.

    Args:
        model: The model; those of timm know it themselves.
        spec: The model's name on the command line.
        weights: Name of torchvision's weights, which its images depend on. Default: those that torchvision recommends.
    """
    if hasattr(model, "pretrained_cfg"):
        found = needed("timm.data").resolve_data_config({}, model=model)
        if found["crop_mode"] in ("center", "squash"):
            sides = found["input_size"][1:]
            mean, std = tuple(found["mean"]), tuple(found["std"])
            squash = found["crop_mode"] == "squash"
            return Look(sides, found["crop_pct"], mean, std, found["interpolation"], squash), "timm"
    if spec.startswith("torchvision:"):
        known = import_torchvision().models.get_model_weights(spec.partition(":")[2])
        name = (weights or "DEFAULT").rpartition(".")[2]
        preset: Any = (known[name] if name in known.__members__ else known.DEFAULT).transforms()
        if hasattr(preset, "crop_size"):
            (side,), (resized,) = preset.crop_size, preset.resize_size
            mean, std = tuple(preset.mean), tuple(preset.std)
            return Look((side, side), side / resized, mean, std, preset.interpolation.value), "torchvision"
    return Look(), "default"


class _Images(Dataset[Tensor]):
    """Image files as tensors."""

    def __init__(self, files: Sequence[Path], look: Look, dtype: torch.dtype) -> None:
        self.files, self.look, self.dtype = files, look, dtype
        self.opened = needed("PIL.Image").open

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        try:
            with self.opened(self.files[index]) as image:
                return self.look.of(image).to(self.dtype)
        except OSError as error:
            raise CalibrationError(f"cannot read the image {self.files[index]}: {error}") from error


def files_in(folder: Path) -> list[Path]:
    """All image files in a folder and its folders.

    Raises:
        CalibrationError: If there is none.
    """
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in FILES)
    if not files:
        raise CalibrationError(f"there is no image in {folder}; expected files that end in {', '.join(FILES)}")
    return files


def image_batches(
    files: Sequence[Path], look: Look, dtype: torch.dtype, batch_size: int, ranks: Ranks
) -> DataLoader[Tensor]:
    """Batches of images, which are read from disk in every pass; each of the processes gets a part."""
    starts = ranks.shard(range(0, len(files), batch_size))
    mine = files[starts[0] : starts[-1] + batch_size] if starts else []
    return DataLoader(_Images(mine, look, dtype), batch_size=batch_size, generator=torch.Generator())

"""Calibration data from files (folders of images, arrays, texts), and random inputs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lnr_prune.errors import CalibrationError
from lnr_prune.runtime.optional import needed
from lnr_prune.runtime.processes import ALONE, Ranks

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Source:
    """Which samples of a file or folder are read, and how.

    Attributes:
        path: A folder of images; a .npy, .npz or .safetensors file; or a text file with one sample per line.
        samples: Number of samples that are drawn.
        batch_size: Samples per batch.
        seed: Seed of the draw.
        arrays: Names of the arrays in the file: a single one is the model's input, several are keyword arguments.
            May be empty if the file has just one array.
        size: Side of the square that images are scaled and cropped to.
        mean: Mean of every colour, subtracted from values in [0, 1]; with a single value, images become grey.
        std: Standard deviation of every colour; the difference is divided by it.
        tokenizer: Folder of a Hugging Face tokenizer, for text.
        tokens: Length of the longest text, in tokens.
    """

    path: Path
    samples: int = 512
    batch_size: int = 32
    seed: int = 0
    arrays: tuple[str, ...] = ()
    size: int = 224
    mean: tuple[float, ...] = IMAGENET[0]
    std: tuple[float, ...] = IMAGENET[1]
    tokenizer: Path | None = None
    tokens: int = 128

    def drawn(self, count: int) -> Tensor:
        """Indices of the samples, in random order."""
        return torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))[: self.samples]


def batches(source: Source, dtype: torch.dtype = torch.float32, ranks: Ranks = ALONE) -> Iterable[Any]:
    """The batches of a source: tensors, or dicts of keyword arguments. Images are read from disk in every pass.

    Args:
        source: What to read.
        dtype: Type of the tensors, except for those of whole numbers.
        ranks: The processes that prune together; each gets a part.

    Raises:
        ValueError: If the kind of source is unknown, or if it does not say what to read.
        CalibrationError: If it cannot be read, or is empty.
    """
    if source.path.is_dir():
        return _images(source, dtype, ranks)
    if source.path.suffix in (".npy", ".npz", ".safetensors"):
        return _split(_arrays(source, dtype), source.batch_size, ranks)
    if source.tokenizer is None:
        raise ValueError(
            f"cannot tell what {source.path} holds: give a folder of images, a .npy, .npz or .safetensors file, "
            "or a text file and --tokenizer"
        )
    return _split(_texts(source), source.batch_size, ranks)


def random_batch(model: nn.Module, size: int, shape: Sequence[int] | None, tokens: int | None) -> Any:
    """Random inputs: normal values of a shape without its batch axis, or token ids.

    Raises:
        ValueError: If neither a shape nor a number of tokens is given, or the model has no vocabulary.
    """
    generator = torch.Generator().manual_seed(0)
    if shape is not None:
        values = torch.randn(size, *shape, generator=generator)
        return values.to(dtype_of(model))
    if tokens is None:
        raise ValueError("no inputs for the model: give --shape (without the batch: 3,224,224), --tokens or --data")
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if not isinstance(vocabulary, int):
        raise ValueError(f"{type(model).__name__} has no config.vocab_size to draw tokens from; give --data")
    return {"input_ids": torch.randint(vocabulary, (size, tokens), generator=generator)}


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of the model's first floating-point parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


class _Images(Dataset[Tensor]):
    """Image files as normalised (colours, size, size) tensors."""

    def __init__(self, files: Sequence[Path], source: Source, dtype: torch.dtype) -> None:
        self.files, self.source, self.dtype = files, source, dtype
        self.opened = needed("PIL.Image").open
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (source.mean, source.std))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        side, file = self.source.size, self.files[index]
        try:
            with self.opened(file) as opened:
                image = opened.convert("L" if len(self.mean) == 1 else "RGB")
        except OSError as error:
            raise CalibrationError(f"cannot read the image {file}: {error}") from error
        scale = side / min(image.size)
        width, height = (max(side, round(length * scale)) for length in image.size)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.resize((width, height)).crop((left, top, left + side, top + side))
        pixels = torch.from_numpy(np.array(image)).view(side, side, -1).permute(2, 0, 1) / 255
        return ((pixels - self.mean) / self.std).to(self.dtype)


def _images(source: Source, dtype: torch.dtype, ranks: Ranks) -> Iterable[Tensor]:
    if len(source.mean) != len(source.std) or len(source.mean) not in (1, 3):
        raise ValueError(
            f"--mean and --std must both have 3 values, or 1 for grey images: got {source.mean}, {source.std}"
        )
    files = sorted(file for file in source.path.rglob("*") if file.suffix.lower() in IMAGES)
    if not files:
        raise CalibrationError(f"there is no image in {source.path}; expected files that end in {', '.join(IMAGES)}")
    chosen = [files[index] for index in source.drawn(len(files))]
    starts = ranks.shard(range(0, len(chosen), source.batch_size))
    mine = chosen[starts[0] : starts[-1] + source.batch_size] if starts else []
    return DataLoader(_Images(mine, source, dtype), batch_size=source.batch_size)


def _arrays(source: Source, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
    try:
        if source.path.suffix == ".safetensors":
            with safe_open(source.path, "pt") as file:
                found = {name: file.get_tensor(name) for name in _wanted(source, file.keys())}
        elif source.path.suffix == ".npy":
            found = {"": np.load(source.path, mmap_mode="r")}
        else:
            with source.path.open("rb") as file, np.load(file) as stored:
                found = {name: stored[name] for name in _wanted(source, stored.files)}
    except (OSError, EOFError, ValueError, BadZipFile, SafetensorError) as error:  # numpy raises many kinds of errors
        raise CalibrationError(f"cannot read {source.path}: {error}") from error
    counts = {name: len(array) if array.ndim else 0 for name, array in found.items()}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise CalibrationError(f"the arrays of {source.path} must share a first axis of samples, got {counts}")
    index = source.drawn(next(iter(counts.values())))
    tensors = {}
    for name, array in found.items():
        values = array[index] if isinstance(array, Tensor) else torch.from_numpy(np.array(array[index.numpy()]))
        tensors[name] = values.to(dtype) if values.is_floating_point() else values.long()
    return tensors if len(tensors) > 1 else next(iter(tensors.values()))


def _wanted(source: Source, names: Iterable[str]) -> tuple[str, ...]:
    held = tuple(names)
    wanted = source.arrays or held
    if unknown := [name for name in wanted if name not in held]:
        raise CalibrationError(f"{source.path} has no array {unknown[0]!r}; it holds {', '.join(held)}")
    if not source.arrays and len(held) != 1:
        raise CalibrationError(
            f"{source.path} holds {', '.join(held) or 'nothing'}: name the model's input with --array"
        )
    return wanted


def _texts(source: Source) -> dict[str, Tensor]:
    try:
        lines = [line for line in source.path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"cannot read {source.path}: {error}") from error
    if not lines:
        raise CalibrationError(f"{source.path} holds no text")
    if source.tokenizer is None or not source.tokenizer.is_dir():
        raise ValueError(f"there is no folder {source.tokenizer}; give one that a tokenizer's save_pretrained wrote")
    tokenizer = needed("transformers").AutoTokenizer.from_pretrained(source.tokenizer, local_files_only=True)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    chosen = [lines[index] for index in source.drawn(len(lines))]
    return dict(tokenizer(chosen, padding=True, truncation=True, max_length=source.tokens, return_tensors="pt"))


def _split(tensors: Tensor | dict[str, Tensor], size: int, ranks: Ranks) -> Sequence[Any]:
    if isinstance(tensors, Tensor):
        return ranks.shard(tensors.split(size))
    parts = {name: tensor.split(size) for name, tensor in tensors.items()}
    return ranks.shard([dict(zip(parts, batch, strict=True)) for batch in zip(*parts.values(), strict=True)])

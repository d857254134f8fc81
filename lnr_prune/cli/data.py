"""Calibration data from files (folders of images, arrays, tables, texts), and random inputs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lnr_prune.calibration.forms.values import of_frame
from lnr_prune.cli.images import Look, files_in, image_batches
from lnr_prune.cli.texts import cut, lines_of, packed, padded, tokenizer_in
from lnr_prune.errors import CalibrationError, LnrPruneError
from lnr_prune.runtime.checks import nearest
from lnr_prune.runtime.optional import needed
from lnr_prune.runtime.processes import ALONE, Ranks

TABLES = (".csv", ".tsv", ".parquet")
OTHERS = (".npy", ".npz", ".safetensors", *TABLES)  # files that hold no text
INDEX = "Unnamed: "  # what pandas calls the column of row numbers that it wrote itself


@dataclass(frozen=True)
class Source:
    """Which samples of a file or folder are read, and how.

    Attributes:
        path: A folder of images; a .npy, .npz or .safetensors file; a table (.csv, .tsv, .parquet); or a text file with
            one sample per line.
        samples: Number of samples that are drawn.
        batch_size: Samples per batch.
        seed: Seed of the draw.
        arrays: Names of the arrays in the file: a single one is the model's input, several are keyword arguments.
            May be empty if the file has just one array.
        columns: Columns of a table that are the model's input, in this order. Empty = all.
        drop: Columns of a table that are left out.
        look: How images are made ready.
        tokenizer: Folder of a Hugging Face tokenizer, for text.
        tokens: Length of the longest text, in tokens.
        pack: Whether texts are packed one after the other, instead of filled up to the same length. Then the last ones
            are left out, see `test_texts`.
        test: A file of texts to judge by, instead of the last ones.
    """

    path: Path
    samples: int = 512
    batch_size: int = 32
    seed: int = 0
    arrays: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    look: Look = Look()
    tokenizer: Path | None = None
    tokens: int = 128
    pack: bool = False
    test: Path | None = None

    def shuffled(self, count: int) -> Tensor:
        """Indices of all samples, in random order."""
        return torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))

    def drawn(self, count: int) -> Tensor:
        """Indices of the samples that are taken."""
        return self.shuffled(count)[: self.samples]


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
        files = files_in(source.path)
        chosen = [files[index] for index in source.drawn(len(files))]
        return image_batches(chosen, source.look, dtype, source.batch_size, ranks)
    if source.path.suffix in (".npy", ".npz", ".safetensors"):
        return _split(_arrays(source, dtype), source.batch_size, ranks)
    if source.path.suffix in TABLES:
        return _split(_table(source).to(dtype), source.batch_size, ranks)
    if source.tokenizer is None:
        raise ValueError(
            f"cannot tell what {source.path} holds: give a folder of images, a .npy, .npz or .safetensors file, a "
            f"{', '.join(TABLES)} table, or a text file and --tokenizer"
        )
    return _split(_texts(source, source.tokenizer), source.batch_size, ranks)


def test_texts(source: Source) -> list[dict[str, Tensor]]:
    """Packed texts that nothing is fitted to; none if the source has no such texts."""
    if not source.pack or source.tokenizer is None or source.path.is_dir() or source.path.suffix in OTHERS:
        return []
    lines = cut(lines_of(source.path))[1] if source.test is None else lines_of(source.test)
    if not lines:
        return []
    found = packed(tokenizer_in(source.tokenizer), lines, source.tokens, source.samples)["input_ids"]
    return [{"input_ids": some} for some in found.split(source.batch_size)]


def random_batch(model: nn.Module, size: int, shape: Sequence[int] | None, tokens: int | None, seed: int = 0) -> Any:
    """Random inputs: normal values of a shape without its batch axis, or token ids.

    Raises:
        ValueError: If neither a shape nor a number of tokens is given, or the model has no vocabulary.
    """
    generator = torch.Generator().manual_seed(seed)
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
        raise CalibrationError(f"{source.path} has no array {unknown[0]!r}; {nearest(unknown[0], held)}")
    if not source.arrays and len(held) != 1:
        raise CalibrationError(
            f"{source.path} holds {', '.join(held) or 'nothing'}: name the model's input with --array"
        )
    return wanted


def _table(source: Source) -> Tensor:
    """Rows of numbers from a table."""
    pandas = needed("pandas")
    try:
        if source.path.suffix == ".parquet":
            frame = pandas.read_parquet(source.path)
        else:
            frame = pandas.read_csv(source.path, sep="\t" if source.path.suffix == ".tsv" else ",")
    except ImportError as error:  # pandas reads parquet with another package
        raise LnrPruneError(
            "a .parquet file is read with pyarrow, which is not installed: pip install pyarrow"
        ) from error
    except (OSError, ValueError) as error:
        raise CalibrationError(f"cannot read {source.path}: {error}") from error
    held = [str(name) for name in frame.columns if not str(name).startswith(INDEX)]
    for option, names in (("--column", source.columns), ("--drop", source.drop)):
        if unknown := [name for name in names if name not in held]:
            raise ValueError(f"{option} {unknown[0]}: {source.path} has no such column; {nearest(unknown[0], held)}")
    frame = frame[[name for name in source.columns or held if name not in source.drop]]
    for name in frame.columns:
        if not pandas.api.types.is_numeric_dtype(frame[name]):
            raise CalibrationError(
                f"column {name!r} of {source.path} is of type {frame[name].dtype}, expected numbers: leave it out with "
                f"--drop {name}, or encode it as it was in training"
            )
        if frame[name].isna().any():
            raise CalibrationError(
                f"column {name!r} of {source.path} has {frame[name].isna().sum()} missing values: fill them as in "
                f"training, or leave it out with --drop {name}"
            )
    if not frame.size:
        raise CalibrationError(f"{source.path} has {len(frame)} rows and {len(frame.columns)} columns to read")
    return of_frame(frame.iloc[source.drawn(len(frame)).numpy()], discrete=False)


def _texts(source: Source, tokenizer: Path) -> dict[str, Tensor]:
    lines, of = lines_of(source.path), tokenizer_in(tokenizer)
    lines = cut(lines)[0] if source.pack and source.test is None else lines
    chosen = [lines[index] for index in source.shuffled(len(lines))]
    if source.pack:
        return packed(of, chosen, source.tokens, source.samples)
    return padded(of, chosen[: source.samples], source.tokens)


def _split(tensors: Tensor | dict[str, Tensor], size: int, ranks: Ranks) -> Sequence[Any]:
    if isinstance(tensors, Tensor):
        return ranks.shard(tensors.split(size))
    parts = {name: tensor.split(size) for name, tensor in tensors.items()}
    return ranks.shard([dict(zip(parts, batch, strict=True)) for batch in zip(*parts.values(), strict=True)])

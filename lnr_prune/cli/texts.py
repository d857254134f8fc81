"""Lines of text as tokens: padded to the longest one, or packed one after the other."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lnr_prune.errors import CalibrationError
from lnr_prune.runtime.optional import needed

CAUSAL = ("ForCausalLM", "LMHeadModel")  # how Hugging Face names models that read from left to right


def reads_on(model: nn.Module) -> bool:
    """Whether a model is trained on packed texts: one that predicts the next token."""
    return type(model).__name__.endswith(CAUSAL)


def lines_of(path: Path) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        CalibrationError: If it cannot be read, or has none.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"cannot read {path}: {error}") from error
    if not lines:
        raise CalibrationError(f"{path} holds no text")
    return lines


def tokenizer_in(folder: Path) -> Any:
    """The Hugging Face tokenizer in a folder.

    Raises:
        ValueError: If there is no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give one that a tokenizer's save_pretrained wrote")
    tokenizer = needed("transformers").AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def padded(tokenizer: Any, lines: Sequence[str], longest: int) -> dict[str, Tensor]:
    """One row of tokens a line, filled up to the longest one, with a mask of what is text."""
    return dict(tokenizer(list(lines), padding=True, truncation=True, max_length=longest, return_tensors="pt"))


def packed(tokenizer: Any, lines: Sequence[str], length: int, samples: int) -> dict[str, Tensor]:
    """Rows of ``length`` tokens, cut from the lines one after the other, with the end of text between them.

    No position is filled up: all of them count in the statistics. What is left at the end is dropped, unless it is all.
    """
    end, stream = tokenizer.eos_token_id, list[int]()
    for line in lines:
        tokens = tokenizer(line)["input_ids"]
        stream += tokens if end is None or tokens[-1:] == [end] else [*tokens, end]
        if len(stream) >= samples * length:
            break
    rows = max(1, min(samples, len(stream) // length))
    return {"input_ids": torch.tensor(stream[: rows * length]).view(rows, -1)}

"""Lines of text as tokens, padded to the longest one or packed one after the other, and how well they are predicted."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lnr_prune.calibration.calls import run
from lnr_prune.calibration.outputs import judged
from lnr_prune.errors import CalibrationError
from lnr_prune.runtime.optional import needed

TEST = 10  # one in so many lines, the last ones, is left out to judge
CHUNK = 256  # tokens whose probabilities are computed together
CAUSAL = ("ForCausalLM", "LMHeadModel")  # how Hugging Face names models that read from left to right


def reads_on(model: nn.Module) -> bool:
    """Whether a model is trained on packed texts: one that predicts the next token."""
    return type(model).__name__.endswith(CAUSAL)


def without_cache(model: nn.Module, batches: Iterable[Any]) -> Iterable[Any]:
    """The batches, such that a Hugging Face model that predicts the next token keeps no keys and values of them.

    Only generating needs these, and they take much memory.
    """
    if not reads_on(model) or "use_cache" not in inspect.signature(model.forward).parameters:
        return batches
    return [{**batch, "use_cache": False} if isinstance(batch, Mapping) else batch for batch in batches]


def lines_of(path: Path) -> Sequence[str]:
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


@dataclass(frozen=True)
class Prediction:
    """How well two language models predict the same text.

    Attributes:
        tokens: Number of tokens that are predicted.
        before: Perplexity of the original: the exponential of the mean negative logarithm of a token's probability.
        after: That of the pruned model.
        divergence: ``E KL(p || p')`` of a token, in nats.
    """

    tokens: int
    before: float
    after: float
    divergence: float

    def __str__(self) -> str:
        return (
            f"perplexity {self.before:.4g} -> {self.after:.4g} on {self.tokens:,} tokens that nothing was fitted to; "
            f"divergence {self.divergence:.3g} nats per token"
        )


def predicted(before: nn.Module, after: nn.Module, batches: Iterable[dict[str, Any]]) -> Prediction:
    """Compares two models that predict the next token, on packed texts."""
    device = next(before.parameters()).device
    batches = without_cache(before, batches)
    tokens, sums = 0, torch.zeros(3, dtype=torch.float64)
    for batch in batches:
        here = {**batch, "input_ids": batch["input_ids"].to(device)}
        wanted, tokens = here["input_ids"][:, 1:].reshape(-1), tokens + here["input_ids"][:, 1:].numel()
        logits = [judged(run(net, ((), here)))[:, :-1].flatten(0, 1) for net in (before, after)]
        for ids, *pieces in zip(wanted.split(CHUNK), *(each.split(CHUNK) for each in logits), strict=True):
            p, q = (piece.double().log_softmax(1) for piece in pieces)
            missed = [-each.gather(1, ids[:, None]).sum() for each in (p, q)]
            sums += torch.stack([*missed, (p.exp() * (p - q)).sum()]).cpu()
    old, new, divergence = sums / max(1, tokens)
    return Prediction(tokens, float(old.exp()), float(new.exp()), float(divergence))


def cut(lines: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """The lines to fit to, and the last ones, to judge by; there are none if there are too few lines."""
    judging = len(lines) // TEST
    return lines[: len(lines) - judging], lines[len(lines) - judging :]

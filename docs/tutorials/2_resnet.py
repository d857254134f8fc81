"""
2. Prune a torchvision ResNet to a budget
=========================================

Half the multiply-accumulates of a residual network, without retraining. To keep this page quick to build, the network
is the first half of torchvision's ResNet-18, trained here for a moment on scikit-learn's digits; the three lines that
prune are the same for ``resnet50(weights="DEFAULT")`` and a folder of photographs.

It needs ``pip install 'lnr-prune[recipes]'``.
"""

import torch
from torch import nn
from torch.nn import functional as F

import lnr_prune as lnr
from lnr_prune.recipes import data as datasets
from lnr_prune.runtime.optional import import_torchvision

# %%
# A trained model
# ---------------
# `import_torchvision` is ``import torchvision``, and also works where torchvision's build does not fit torch's.

torchvision = import_torchvision()
torch.manual_seed(0)
model = torchvision.models.resnet18(num_classes=10)
model.layer3 = model.layer4 = nn.Identity()
model.fc = nn.Linear(128, 10)

data = datasets.load("digits")
images, test = (part.expand(-1, 3, -1, -1) for part in (data.train_images, data.test_images))  # grey -> RGB
optimizer = torch.optim.Adam(model.parameters(), 1e-3)
for _ in range(6):
    for batch in torch.randperm(len(images)).split(64):
        loss = F.cross_entropy(model(images[batch]), data.train_labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
model.eval()


@torch.no_grad()
def accuracy(of):
    return float((of(test).argmax(1) == data.test_labels).float().mean())


print(f"accuracy {accuracy(model):.4f}")

# %%
# What can be pruned
# ------------------
# `inspect` needs one batch. A group is a set of channels that are made by its producers and read by its consumers;
# layers that are added to one another lose the same channels. It also says what one of them costs.

lnr.inspect(model, images[:2])

# %%
# Half the MACs
# -------------
# Calibration data is any iterable of batches, here 512 images, and no labels. A ``DataLoader`` that yields
# ``(image, label)`` pairs does as well: labels are ignored.

calibration = images[:512].split(64)
pruned = lnr.prune(model, calibration, lnr.Budget(macs=0.5))
print(f"accuracy {accuracy(model):.4f} -> {accuracy(pruned.model):.4f}")

# %%
# The report says what every group kept, what the refit left of each layer's error, and what was frozen and why.

pruned.report

# %%
figure = pruned.report.plot()

# %%
# ``pruned.report.to_html("report.html")`` writes the same as a page of its own.
#
# The result is an ordinary ResNet
# --------------------------------
# Same class, smaller layers, and no hooks or masks.

print(type(pruned.model))
print(pruned.model.layer1)

# %%
# So it can be fine-tuned in a plain loop, if you have labels and time:

small = pruned.model.train()
optimizer = torch.optim.Adam(small.parameters(), 1e-4)
for batch in torch.randperm(len(images)).split(64):
    loss = F.cross_entropy(small(images[batch]), data.train_labels[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"accuracy after one epoch {accuracy(small.eval()):.4f}")

# %%
# Other budgets
# -------------
# ``Budget(params=0.3)``, ``Budget(size=0.3)`` and ``Budget(latency=0.7)`` limit other costs, and several
# together must all hold; ``Budget(error=0.01)`` prunes as much as one percent of squared error at the outputs
# allows. ``Grid(round_to=8)`` keeps multiples of eight channels, which accelerators like.

pruned = lnr.prune(model, calibration, lnr.Budget(macs=0.6, grid=lnr.Grid(round_to=8)))
print({group.name: group.kept for group in pruned.report.groups})
print(f"accuracy {accuracy(pruned.model):.4f}")

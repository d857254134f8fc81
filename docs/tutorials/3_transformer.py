"""
3. A transformer
================

Attention heads and feed-forward neurons are channel groups like any others. The model is a small pre-norm transformer,
trained here to sort ten digits; Hugging Face's and timm's models are pruned with the same call.
"""

import torch
from torch import nn
from torch.nn import functional as F

import lnr_prune as lnr

# %%
# A model and a task
# ------------------


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Sorter(nn.Module):
    def __init__(self, symbols=10, length=10, width=64, heads=8, depth=2):
        super().__init__()
        self.embed, self.place = nn.Embedding(symbols, width), nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols)

    def forward(self, digits):
        x = self.embed(digits) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def drawn(count, seed):
    return torch.randint(10, (count, 10), generator=torch.Generator().manual_seed(seed))


torch.manual_seed(0)
model = Sorter()
optimizer = torch.optim.Adam(model.parameters(), 2e-3)
for step in range(300):
    digits = drawn(128, step)
    loss = F.cross_entropy(model(digits).flatten(0, 1), digits.sort(1).values.flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
model.eval()

test = drawn(2000, seed=-1)


@torch.no_grad()
def accuracy(of):
    return float((of(test).argmax(-1) == test.sort(1).values).float().mean())


print(f"digits in their place: {accuracy(model):.2%}")

# %%
# What can be pruned
# ------------------
# A head leaves as a whole: its rows of the three input projections, and its columns of the output projection. The
# residual stream stays: its channels hang together, and `inspect` says what joins them.

found = lnr.inspect(model, test[:2])
for group in found.groups:
    print(f"{group.name:36} {group.size:4} of {group.parameters:,} parameters each")
print(dict(list(found.frozen.items())[:1]))

# %%
# Two thirds, a half, a third
# ---------------------------
# Sequences of equal length, because every position is a sample, padding too: see :doc:`/faq`.

calibration = drawn(512, seed=-2).split(64)
budgets = [lnr.Budget(params=share) for share in (0.67, 0.5, 0.33)]
swept = lnr.sweep(model, calibration, budgets, evaluate=accuracy)
print(swept)

# %%
# What was kept, at a third of the parameters:

pruned = swept.points[-1]
print({group.name: f"{group.kept} of {group.size}" for group in pruned.report.groups})
print(pruned.model.blocks[0])

# %%
# Heads by number, or not at all
# ------------------------------
# The names of `inspect` say how much of which group is kept; groups that are not named stay whole.

heads = {group.name: 6 for group in found.groups if "attention" in group.name}
pruned = lnr.prune(model, calibration, lnr.Keep(heads), selector="backward")
print(f"six heads each: {accuracy(pruned.model):.2%}")

# %%
# Hugging Face and timm
# ---------------------
# Batches are dicts of keyword arguments, and a group's attributes (``num_attention_heads``,
# ``config.num_heads``) change along:
#
# .. code-block:: python
#
#     bert = transformers.AutoModel.from_pretrained("my-bert")
#     batches = [tokenizer(texts, return_tensors="pt") for texts in of_equal_length]
#     pruned = lnr.prune(bert, batches, lnr.Budget(params=0.8))

"""
5. Save, load, export, deploy
=============================

A pruned model is a plain module, so everything that PyTorch can do with a model can be done with it. What is
special is loading it again: the code that builds the model builds the large one.
"""

import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn

import lnr_prune as lnr


def network():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(32 * 4, 10),
    ).eval()  # fmt: skip


torch.manual_seed(0)
model, x = network(), torch.randn(256, 1, 12, 12)
pruned = lnr.prune(model, x.split(64), lnr.Keep(0.5))
folder = Path(tempfile.mkdtemp())

# %%
# One file, no pickle
# -------------------
# `Pruned.save` writes safetensors with a record in JSON: what was removed, the report, versions, and a
# fingerprint of the original architecture. `load` checks all of it before it touches the fresh model, and
# executes nothing.

pruned.save(folder / "small.safetensors")
loaded = lnr.load(folder / "small.safetensors", network())
print(torch.equal(loaded(x), pruned.model(x)))
print(
    f"{(folder / 'small.safetensors').stat().st_size:,} bytes, weights of the original: {pruned.report.size_before:,}"
)

# %%
# The wrong model, or a damaged file, is refused, and says why:

try:
    lnr.load(folder / "small.safetensors", nn.Sequential(nn.Linear(4, 4)))
except lnr.PlanError as error:
    print(error)

# %%
# A state dict works too, where the small model is at hand: ``torch.load(weights_only=True)`` reads it.

torch.save(pruned.model.state_dict(), folder / "small.pt")
print(loaded.load_state_dict(torch.load(folder / "small.pt", weights_only=True)))

# %%
# The plan
# --------
# The plan alone is a small JSON file: which channels of which group stay. It can be printed, compared, and
# applied to another checkpoint of the architecture, whose weights are then cut but not refitted.

lnr.save_plan(folder / "plan.json", pruned.plan)
plan = lnr.load_plan(folder / "plan.json")
print(plan)

# %%
backward = lnr.prune(model, x.split(64), lnr.Keep(0.5), selector="backward")
print(plan.diff(backward.plan))

# %%
other = network()
print(lnr.apply_plan(plan, other, example=x[:2])[0])

# %%
# torch.export
# ------------

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's own
    program = torch.export.export(loaded, (x[:2],))
    exported = program.module()(x[:2])
print((exported - loaded(x[:2])).abs().max().item())

# %%
# ONNX
# ----
# Needs ``pip install onnx onnxscript``.

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        onnx = torch.onnx.export(loaded, (x[:2],), dynamo=True, verbose=False)
    onnx.save(folder / "small.onnx")
    print(f"small.onnx: {(folder / 'small.onnx').stat().st_size:,} bytes")
except ImportError as error:
    print(error)

# %%
# torch.compile
# -------------
# Shapes are static and there are no hooks, so the compiler sees the whole forward pass. The backend here only
# traces, which needs no C++ compiler; leave it out to get kernels.

compiled = torch.compile(loaded, backend="aot_eager", fullgraph=True)
with torch.no_grad():
    print((compiled(x) - loaded(x)).abs().max().item())

# %%
# Is it faster?
# -------------
# Measure on the machine that will run it; ``lnr-prune bench MODEL small.safetensors --shape 1,12,12`` does it in
# turns with the original. ``Grid(round_to=8)`` in a budget keeps sizes that kernels are made for.

print(f"{1e3 * pruned.report.latency_before:.2f} ms -> {1e3 * pruned.report.latency_after:.2f} ms (rough)")

"""
1. LeNet-5, step by step
========================

The practical session that this library grew out of, in the library's words: second moments, four solvers for one convex
problem, one layer of LeNet-5 with its bias fixed and free, then the whole network, and the frontier between size and
accuracy. The images are scikit-learn's 1,797 digits, which need no download; ``lnr-prune lenet5`` runs the
session at full length, with ``--data mnist`` on MNIST.
"""

import matplotlib.pyplot as plt
import torch
from torch.func import functional_call

import lnr_prune as lnr
from lnr_prune.recipes import data as datasets
from lnr_prune.recipes import lenet5, toy

# %%
# The problem
# -----------
# A layer ``y = W x`` is to be reconstructed by a matrix M that reads few of its inputs::
#
#     min_M  ½ E‖y − M x‖² + λ Σ_g w_g ‖M[:, g]‖_F
#
# Only the second moments ``R = E[x xᵀ]``, ``B = E[y xᵀ]`` and ``t = E‖y‖²`` matter: their size does not depend on the
# number of samples, and after one pass no data is needed. The toy data has 100 inputs of rank 80, and 200 outputs.

problem = toy.problem(toy.SMALL)
R, B = problem.blocks[0].R, problem.blocks[0].B
print(f"R {tuple(R.shape)}, B {tuple(B.shape)}, lambda_max {problem.lambda_max():.3g}")

# %%
# The smooth part has the gradient ``M R - B``. The penalty has none where a group is zero, but its proximal operator
# is closed-form: every column is shortened by the threshold, and is zero if it was no longer than that.

M = torch.tensor([[3.0, 0.1], [4.0, 0.1]])
print(lnr.prox_group_lasso(M, 1.0))

# %%
# Four solvers
# ------------
# Proximal gradient goes down steadily and slowly. FISTA steps from a look-ahead point, and bounces. Alternate
# minimization solves for M and for the norms in turn. Newton's method works on the norms alone, and is the default.
# All stop on the duality gap, which bounds how far above the minimum they are; so they agree.

figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
for run in toy.compare_solvers(problem, max_iterations=300):
    solution = run.solution
    lnr.plot_convergence(solution, axes)
    print(f"{run.solver:36} P = {solution.history[-1]:.10f}, gap {solution.gap:.1e}, {solution.iterations} iterations")
axes.set_title("300 iterations at most")
axes.legend()

# %%
# FISTA's look-ahead ``k / (k + q + 1)`` depends on q: a larger q bounces less and starts more slowly.

figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
for q, run in zip(toy.MOMENTA, toy.compare_momenta(problem, max_iterations=300), strict=True):
    lnr.plot_convergence(run.solution, axes)
    axes.lines[-1].set_label(f"q = {q:g}")
axes.set_title("")
axes.legend()

# %%
# Time to the same certificate; the session times a larger problem, ``toy.LARGE``:

for run in toy.time_solvers(problem):
    print(f"{run.solver:36} {run.seconds:.3f} s")

# %%
# LeNet-5
# -------
# Caffe's variant, 431,080 parameters, nearly all of them in fc1. Ten epochs take a few seconds.

data = datasets.load("digits")
model = lenet5.initialised(seed=0)
optimizer = lenet5.adam(model)
for epoch in range(10):
    lenet5.train_epoch(model, optimizer, data, batch_size=64, seed=epoch)
print(f"test accuracy {lenet5.accuracy(model, data):.4f}")
print({name: f"{share:.2%}" for name, share in lenet5.mass_distribution(model).items()})
calibration = data.train_images.split(250)

# %%
# One layer: fc2
# --------------
# ``Penalty({"fc1": ...})`` penalises the columns of whoever reads fc1's outputs: fc2. With ``refit=None`` they
# stay as the lasso leaves them, too short. Refitting the kept columns by least squares, the default, takes that
# back. The session divides its moments by the number of columns d and the library does not, so its 0.01 is
# ``0.01 d`` here.

penalty = lnr.Penalty({"fc1": 0.01 * 500})
shrunk = lnr.prune(model, calibration, penalty, refit=None, bias=False)
pruned = lnr.prune(model, calibration, penalty, bias=False)
group = pruned.report.groups[-1]
print(f"fc2 reads {group.kept} of {group.size} columns")


# %%
# The *masked* network has its full size and zeros; the *collapsed* one has lost these rows of fc1 and columns of fc2.
# They are the same function.


def masked(x):
    return functional_call(model, dict(shrunk.masked), (x,))


print(f"masked    {lenet5.accuracy(masked, data):.4f}")
print(f"collapsed {lenet5.accuracy(shrunk.model, data):.4f}")
print(f"refitted  {lenet5.accuracy(pruned.model, data):.4f}")
print(f"parameters {pruned.report.params_after / pruned.report.params_before:.2%}")

# %%
# With the bias free (a constant input 1 that is not penalised) fewer columns do the same work:

pruned = lnr.prune(model, calibration, lnr.Penalty({"fc1": 0.01 * 501}))
print(f"fc2 reads {pruned.report.groups[-1].kept} columns, accuracy {lenet5.accuracy(pruned.model, data):.4f}")

# %%
# The whole network
# -----------------
# fc2 is a hundredth of the network. ``Penalty(ratio=...)`` penalises every layer by a fraction of the penalty that
# removes everything from it: filters of conv1 and conv2 go together with the kernels and columns that read them.

pruned = lnr.prune(model, calibration, lnr.Penalty(ratio=0.1))
print(f"accuracy {lenet5.accuracy(pruned.model, data):.4f}")
pruned.report

# %%
# The frontier
# ------------
# One number says nothing: compression and accuracy are a trade. `sweep` prunes at several penalties; with
# ``retrain`` it also shows how fast one epoch of training brings accuracy back.


def accuracy(of):
    return lenet5.accuracy(of, data)


def one_epoch(of):
    lenet5.train_epoch(of, lenet5.adam(of), data, batch_size=64, seed=0)


ratios = [0.03, 0.1, 0.3, 0.6]
swept = lnr.sweep(model, calibration, [lnr.Penalty(ratio=r) for r in ratios], evaluate=accuracy, retrain=one_epoch)
print(swept)
frontier = swept.plot()

# %%
# A better way to strong compression
# ----------------------------------
# Instead of a penalty one can give a budget. The sizes are then shared out by what the outputs suffer, and backward
# elimination chooses the channels; :doc:`/choosing` says when to use what.

for share in (0.1, 0.03):
    pruned = lnr.prune(model, calibration, lnr.Budget(params=share), selector="backward")
    print(f"{share:.0%} of the parameters: accuracy {accuracy(pruned.model):.4f}")

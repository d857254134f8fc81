"""Whether an accelerator gives the CPU's results: prunes, solves, a process group, compiled networks, files."""

import gc
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch import distributed as dist

import lnr_prune as lnr
from benchmarks.library.networks import cnn, mlp
from benchmarks.library.problems import activations
from benchmarks.library.sections import Found, Section
from benchmarks.library.shapes import llama, resnet
from lnr_prune.runtime.processes import Ranks
from lnr_prune.testing.networks import random_network

TOLERANCE = {"float64": 1e-6, "TF32 off": 1e-3, "TF32 on": 5e-2}
"""How far weights may be from the CPU's, by each tensor's largest."""
QUIET = lnr.Run(progress=False)
RANDOM = (0, 7, 9, 16)  # seeds of networks with gates, attention of several layouts, an LSTM, computed weights ...
SOLVERS = ("newton", "alternate_minimization", "fista")
COLUMNS = ("channels that differ", "weights differ by", "outputs differ by")


@dataclass(frozen=True, eq=False)
class Case:
    """A prune.

    Attributes:
        make: Makes the network, the same one each time, on the CPU.
        data: Makes its calibration batches.
        amount: How much is kept.
        options: Of `lnr_prune.prune`.
        wide: Whether all is float64.
    """

    make: Callable[[], nn.Module]
    data: Callable[[], list[Tensor]]
    amount: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    wide: bool = False

    def on(self, device: torch.device, run: lnr.Run = QUIET) -> lnr.Pruned:
        """The result of this prune on a device."""
        model, data = self.make().to(device), self.data()
        if self.wide:
            model, data = model.double(), [batch.double() if batch.is_floating_point() else batch for batch in data]
        return lnr.prune(model, data, self.amount, run=run, **self.options)

    @cache  # noqa: B019
    def reference(self) -> lnr.Pruned:
        """The CPU's."""
        return self.on(torch.device("cpu"))


def spread(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """The network with rows of very different size: which channels matter is no question of rounding."""

    def made() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = make().eval().requires_grad_(False)
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    scale = (0.7 * torch.randn(len(parameter))).exp() / 1.25
                    parameter.mul_(scale.view(-1, *(1,) * (parameter.dim() - 1)))
        return model

    return made


def batches(count: int, *shape: int, tokens: int = 0) -> Callable[[], list[Tensor]]:
    """Four batches of noise, or of tokens below a number."""

    def made() -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        if tokens:
            return list(torch.randint(0, tokens, (count, *shape), generator=generator).split(count // 4))
        return list(torch.randn(count, *shape, generator=generator).split(count // 4))

    return made


def cases(small: bool) -> dict[str, Case]:
    """One prune of every kind."""
    digits, photos = batches(128 if small else 256, 1, 28, 28), batches(128 if small else 256, 3, 32, 32)
    flat, text = batches(1024 if small else 2048, 1, 28, 28), batches(64, 16, tokens=97)
    small_llama = spread(lambda: llama(2, 128, 256, 16, 97, dtype=torch.float32))
    effort = lnr.Effort(samples=64, refits=2)
    every = {
        "MLP, lasso": Case(spread(mlp), flat, lnr.Keep(0.5)),
        "MLP, penalty": Case(spread(mlp), flat, lnr.Penalty(ratio=0.05)),
        "CNN, elimination": Case(spread(cnn), digits, lnr.Keep(0.5), {"selector": "backward"}),
        "CNN, swaps, window 2": Case(
            spread(cnn), digits, lnr.Keep(0.25), {"selector": lnr.Backward(swaps=4), "refit": lnr.Refit(window=2)}
        ),
        "CNN, budget": Case(spread(cnn), digits, lnr.Budget(macs=0.5, effort=effort), {"selector": "backward"}),
        "CNN, logits": Case(spread(cnn), digits, lnr.Keep(0.5), {"selector": "norm", "logits": True}),
        "CNN, no refit": Case(spread(cnn), digits, lnr.Keep(0.5), {"refit": None}),
        "CNN, as graph": Case(spread(cnn), digits, lnr.Keep(0.5), {"into": "graph", "selector": lnr.Random(3)}),
        "ResNet": Case(spread(lambda: resnet((1, 1), 8)), photos, lnr.Keep(0.5), {"selector": "backward"}),
        "Llama": Case(small_llama, text, lnr.Keep(0.5), {"selector": "backward"}),
        "Llama, float64": Case(small_llama, text, lnr.Keep(0.5), {"selector": "backward"}, wide=True),
        "CNN, float64": Case(spread(cnn), digits, lnr.Keep(0.5), wide=True),
    }
    for seed in RANDOM[:1] if small else RANDOM:
        example = random_network(seed)[1]
        every[f"random network {seed}"] = Case(
            partial(random_model, seed), batches(512, *example.shape[1:]), lnr.Keep(0.5), {"selector": "norm"}
        )
    return every


def random_model(seed: int) -> nn.Module:
    """Of patterns that other networks have, too."""
    return random_network(seed)[0].requires_grad_(False)


def differences(a: lnr.Pruned, b: lnr.Pruned, call: Tensor) -> dict[str, int | float]:
    """Channels that only one keeps; how far weights are apart, by each tensor's largest; and outputs, in float64."""
    kept, other = ({(group, i) for group, of in p.plan.channels.items() for i in of} for p in (a, b))
    differ = len(kept ^ other)
    tensors, others = (
        {name: value.detach().cpu().double() for name, value in p.model.state_dict().items()} for p in (a, b)
    )
    apart = [float("inf")] if differ else [_apart(tensors[name], others[name]) for name in tensors]
    outputs = [p.model.cpu().double()(call.double() if call.is_floating_point() else call) for p in (a, b)]
    return dict(zip(COLUMNS, (differ, max(apart), _apart(*outputs)), strict=True))


def _apart(a: Tensor, b: Tensor) -> float:
    largest = float(a.abs().max()) if a.numel() else 0.0
    return float((a - b).abs().max()) / largest if largest else float(bool((a != b).any()))


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether matrix products and convolutions may be done in TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def judged(cells: Mapping[str, int | float], tolerance: float) -> Found:
    """What is wrong with differences: any channel, or weights beyond a tolerance."""
    differ, weights = cells[COLUMNS[0]], cells[COLUMNS[1]]
    wrong = f"{differ} channels differ" if differ else f"weights > {tolerance:.0e}" if weights > tolerance else ""
    return Found(cells, wrong)


def check_prune(case: Case, device: torch.device, precision: str) -> Found:
    """A prune on the device against the CPU's."""
    reference = case.reference()
    with nullcontext() if precision == "float64" else tf32(precision == "TF32 on"):
        found = case.on(device)
    if found.plan != reference.plan or precision == "TF32 on":  # what the other channels are worth
        errors = f"; error {reference.report.error:.2%} on the CPU, {found.report.error:.2%} here"
    else:
        errors = ""
    result = judged(differences(reference, found, case.data()[0]), TOLERANCE[precision])
    return Found(result.cells, result.wrong and result.wrong + errors)


def problem_on(device: torch.device, small: bool) -> lnr.GroupLasso:
    """A float64 problem of two consumers with several columns a channel; made on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        channels = 24 if small else 96
        parts = [activations(channels, width, 32, torch.relu, samples=2048).blocks[0] for width in (4, 1)]
    return moved(lnr.GroupLasso(tuple(parts)), device)


def moved(problem: lnr.GroupLasso, device: torch.device) -> lnr.GroupLasso:
    """The problem on a device."""
    blocks = (
        lnr.Block(block.R.to(device), block.B.to(device), block.t, block.groups.to(device)) for block in problem.blocks
    )
    return lnr.GroupLasso(tuple(blocks), problem.weights.to(device))


def check_solve(solver: str, device: torch.device, small: bool) -> Found:
    """The lasso to a gap of 1e-8."""
    ours, there = (problem_on(torch.device(of), small) for of in ("cpu", device))
    lam = 0.05 * ours.lambda_max()
    a, b = (lnr.solve(problem, lam, solver=solver, tol=1e-8) for problem in (ours, there))
    cells = _compared(a.support, b.support, a.coefficients, b.coefficients)
    gap = "" if b.gap <= 1e-8 else f"gap {b.gap:.0e}"
    return Found(cells, judged(cells, 1e-3).wrong or gap)


def check_choices(device: torch.device, small: bool) -> Found:
    """Elimination, exchanges, the search for a number of channels, and least squares."""
    results = []
    for of in ("cpu", device):
        problem = problem_on(torch.device(of), small)
        elimination, count = lnr.backward(problem), problem.n_groups // 4
        supports = [elimination.support(count), lnr.exchange(problem, elimination.support(count))]
        supports.append(lnr.lam_for_count(problem, count).solution.support)
        M = lnr.debias(problem, supports[0])
        results.append((torch.stack(supports), (*M, elimination.errors), elimination.order.cpu()))
    (support, numbers, order), (other, others, its_order) = results
    cells = _compared(support, other, numbers, others)
    wrong = judged(cells, 1e-6).wrong
    return Found(cells, wrong or ("" if torch.equal(order, its_order) else "another order of elimination"))


def _compared(
    support: Tensor, other: Tensor, numbers: tuple[Tensor, ...], others: tuple[Tensor, ...]
) -> dict[str, int | float]:
    apart = max(_apart(a.cpu(), b.cpu()) for a, b in zip(numbers, others, strict=True))
    return dict(zip(COLUMNS, (int((support.cpu() != other.cpu()).sum()), apart), strict=False))


class Several(int):
    """A number of processes that does not own up to being one: so that all is said, if only to itself."""

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


def check_group(case: Case, device: torch.device, backend: str, talking: bool) -> Found:
    """A process group of one rank against none; ``talking`` ranks tell one another everything, through the backend."""
    alone = case.on(device)
    with tempfile.TemporaryDirectory() as folder:
        at_home = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}  # whatever network there is
        with mock.patch.dict(os.environ, at_home):
            dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            ranks = Ranks(0, Several(1)) if talking else Ranks.of_process_group()
            with mock.patch.object(Ranks, "of_process_group", return_value=ranks):
                grouped = case.on(device)
        finally:
            dist.destroy_process_group()
            gc.collect()  # its threads end with it
    return judged(differences(alone, grouped, case.data()[0]), 1e-6)


def check_compiled(case: Case, device: torch.device) -> Found:
    """A pruned network, compiled, against itself."""
    torch._dynamo.reset()
    pruned, call = case.on(device), case.data()[0].to(device)
    with torch.inference_mode(), tf32(False):
        compiled = torch.compile(pruned.model)
        apart = _apart(pruned.model(call), compiled(call))
    return Found({COLUMNS[2]: apart}, "" if apart <= 1e-4 else "outputs > 1e-04")


def check_files(case: Case, device: torch.device) -> Found:
    """Saved on the device, loaded on the CPU; with a work folder, and again from it."""
    with tempfile.TemporaryDirectory() as folder:
        path, run = Path(folder) / "pruned.safetensors", lnr.Run(work=Path(folder) / "work", progress=False)
        pruned, again = case.on(device, run), case.on(device, run)
        pruned.save(path)
        model = lnr.load(path, case.make(), example=case.data()[0])
    tensors = pruned.model.state_dict()
    same = all(torch.equal(value.cpu(), tensors[name].cpu()) for name, value in model.state_dict().items())
    found = judged(differences(pruned, again, case.data()[0]), 0.0)
    return Found(found.cells, found.wrong or ("" if same else "loaded weights differ"))


def checks(device: torch.device, small: bool, limit: float) -> Section:
    """All of them."""
    every, items = cases(small), dict[str, Callable[[], Found]]()
    precisions = ["TF32 off"] if device.type == "cpu" else ["TF32 off", "TF32 on"]
    for name, case in every.items():
        for precision in ["float64"] if case.wide else precisions:
            what = name if case.wide or device.type == "cpu" else f"{name}, {precision}"
            items[f"prune: {what}"] = partial(check_prune, case, device, precision)
    for solver in SOLVERS:
        items[f"solve, float64: {solver}"] = partial(check_solve, solver, device, small)
    items["choose, float64: elimination, swaps, lasso's path"] = partial(check_choices, device, small)
    for backend in ("nccl", "cpu:gloo,cuda:nccl") if device.type == "cuda" else ("gloo",):
        for talking in (False, True):
            what = f"one rank of {backend}" + (", talking to itself" if talking else "")
            items[what] = partial(check_group, every["CNN, elimination"], device, backend, talking)
    items["saved and loaded, work folder"] = partial(check_files, every["CNN, elimination"], device)
    for name in ("CNN, elimination",) if small else ("CNN, elimination", "Llama"):
        items[f"compiled: {name.split(',')[0]}"] = partial(check_compiled, every[name], device)
    return Section("checks", COLUMNS, limit, items)

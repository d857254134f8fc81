"""What takes how long on the CPU and on an accelerator: steps of a prune, whole prunes, dense and pruned networks."""

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn

import lnr_prune as lnr
from benchmarks.library.device_checks import moved
from benchmarks.library.networks import CifarResNet
from benchmarks.library.problems import activations
from benchmarks.library.sections import Cell, Found, Section
from benchmarks.library.shapes import llama, resnet
from lnr_prune.calibration.data import Calibration, calibrate
from lnr_prune.calibration.divergence import output_error
from lnr_prune.calibration.reading import Reading, read
from lnr_prune.collapse.masks import Supports
from lnr_prune.graph.groups import Graph, find_groups
from lnr_prune.graph.module import named_tensors
from lnr_prune.refit.network import refit_network
from lnr_prune.selection.curves import error_curves

CPU = torch.device("cpu")
QUIET = lnr.Run(progress=False)
REPEATED = 1.0  # seconds for which short work is repeated
TURNS = 40  # in which networks are timed side by side, at most
GIGABYTE = 1e9
Work = Callable[[], object]


@dataclass(frozen=True)
class Timed:
    """Work on a device.

    Attributes:
        seconds: The least of some runs, on an accelerator without the first.
        first: Seconds of the first.
        waits: How often the first waited for the accelerator; None = not known.
        peak: Gigabytes of the accelerator's memory, at most; None = not known.
    """

    seconds: float
    first: float
    waits: int | None = None
    peak: float | None = None


def timed(work: Work, device: torch.device) -> Timed:
    """Runs the work, on an accelerator once more, and anywhere until `REPEATED` are over."""
    waits, peak = None, None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        with counted_waits() as counts:
            first = seconds_of(work, device)
        waits, peak = sum(counts), torch.cuda.max_memory_allocated(device) / GIGABYTE
    else:
        first = seconds_of(work, device)
    runs = [first if device.type == "cpu" else seconds_of(work, device)]
    while sum(runs) < REPEATED and len(runs) < TURNS:
        runs.append(seconds_of(work, device))
    return Timed(min(runs), first, waits, peak)


def seconds_of(work: Work, device: torch.device) -> float:
    """From an idle device to an idle device."""
    wait_for(device)
    begin = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - begin


def wait_for(device: torch.device) -> None:
    """Until it is idle."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def counted_waits() -> Iterator[list[int]]:
    """How often CUDA makes the processor wait: a list that holds it afterwards."""
    counts: list[int] = []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield counts
        finally:
            torch.cuda.set_sync_debug_mode("default")
            counts.append(sum("synchronizing" in str(each.message) for each in seen))


def columns(device: torch.device) -> list[str]:
    """Of a table of the CPU against a device."""
    if device.type == "cpu":
        return ["CPU, s"]
    return ["CPU, s", f"{device.type}, s", "ratio", "first, s", "waits", "peak, GB"]


def compared(work_on: Callable[[torch.device], Work], device: torch.device) -> Found:
    """Work on a device against the same on the CPU."""
    cells: dict[str, Cell] = {}
    if device.type != "cpu":
        there = timed(work_on(device), device)
        cells = {f"{device.type}, s": there.seconds, "first, s": there.first}
        cells |= {"waits": there.waits, "peak, GB": there.peak}
    cells["CPU, s"] = here = timed(work_on(CPU), CPU).seconds
    if device.type != "cpu":
        cells["ratio"] = here / there.seconds
    return Found(cells)


@dataclass(frozen=True, eq=False)
class Network:
    """A network on a device, with calibration data, and half of each group's channels to keep."""

    model: nn.Module
    data: Calibration
    graph: Graph

    @classmethod
    def on(cls, device: torch.device, model: nn.Module, data: list[Tensor]) -> "Network":
        """The network there, with its groups."""
        model, data = model.to(device), [batch.to(device) for batch in data]
        return cls(model, calibrate(model, data), find_groups(model, (data[0][:2],), {}))

    @property
    def supports(self) -> Supports:
        """Every second channel."""
        device = next(self.model.parameters()).device
        return {group: torch.arange(group.size, device=device) % 2 == 0 for group in self.graph.groups}

    def statistics(self) -> list[Reading]:
        """One pass over the data: second moments of all that the groups are read by."""
        return read(self.model, self.graph.groups, self.data, bias=True)

    def curves(self, readings: list[Reading]) -> object:
        """Every group's error curve."""
        calls = list(self.data)[:1]
        return error_curves(named_tensors(self.model), [readings], output_error(self.model, calls))

    def refit(self, window: int) -> object:
        """Every layer, by least squares."""
        settings = lnr.Refit(window=window)
        return refit_network(self.model, self.graph, self.supports, self.data, settings=settings, repeated={})


def noise(count: int, *shape: int, batch: int) -> list[Tensor]:
    """Batches of images."""
    return list(torch.randn(count, *shape, generator=torch.Generator().manual_seed(0)).split(batch))


def text(count: int, length: int, vocabulary: int, batch: int) -> list[Tensor]:
    """Batches of tokens."""
    tokens = torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(0))
    return list(tokens.split(batch))


def synthetic(channels: int, width: int, h: int) -> lnr.GroupLasso:
    """A layer's problem, on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return activations(channels, width, h, torch.relu, samples=4096)


def times(device: torch.device, small: bool, limit: float) -> Section:
    """The steps of a prune, and a whole prune of ResNet-50."""
    depth, images, d = (8, 64, 256) if small else (20, 512, 2048)
    side, photos = (64, 8) if small else (224, 32)

    @cache
    def cifar(of: torch.device) -> Network:
        return Network.on(of, cifar_resnet(depth), noise(images, 3, 32, 32, batch=images // 4))

    @cache
    def imagenet(of: torch.device) -> Network:
        return Network.on(of, dense_resnet(small), noise(photos, 3, side, side, batch=photos // 2))

    @cache
    def readings(of: torch.device) -> list[Reading]:
        return cifar(of).statistics()

    @cache
    def columns_of(width: int) -> lnr.GroupLasso:
        return synthetic(d // width, width, d // 4)

    @cache
    def there(width: int, of: torch.device) -> lnr.GroupLasso:
        return moved(columns_of(width), of)

    def solving(width: int, of: torch.device) -> Work:
        problem = there(width, of)
        return lambda: lnr.solve(problem, 0.01 * problem.lambda_max())

    def pruning(of: torch.device) -> Work:
        model, data = imagenet(of).model, list(imagenet(of).data.batches)
        return lambda: lnr.prune(model, data, lnr.Keep(0.5), selector="backward", run=QUIET)

    small_net, large_net = f"ResNet-{depth}, {images} images", f"{named(small)}, {photos} images of {side}"
    steps: dict[str, Callable[[torch.device], Work]] = {
        f"statistics: {small_net}": lambda of: cifar(of).statistics,
        f"error curves: {small_net}, {images // 4} to judge": lambda of: partial(cifar(of).curves, readings(of)),
        f"refit: {small_net}": lambda of: partial(cifar(of).refit, 1),
        f"refit, window 2: {small_net}": lambda of: partial(cifar(of).refit, 2),
        f"elimination: {d} channels": lambda of: partial(lnr.backward, there(1, of)),
        f"elimination: {d // 8} channels of 8 columns": lambda of: partial(lnr.backward, there(8, of)),
        f"Newton, 0.01 of lambda_max: {d} channels": partial(solving, 1),
        f"Newton, 0.01 of lambda_max: {d // 8} channels of 8": partial(solving, 8),
        f"statistics: {large_net}": lambda of: imagenet(of).statistics,
    }
    steps[f"prune, Keep(0.5): {large_net}"] = pruning
    items = {what: partial(compared, work_on, device) for what, work_on in steps.items()}
    return Section("table", columns(device), limit, items)


def cifar_resnet(depth: int) -> nn.Module:
    """With random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CifarResNet(depth).eval().requires_grad_(False)


def named(small: bool, name: str = "ResNet-50") -> str:
    """What a network is called."""
    return f"tiny {name.partition('-')[0]}" if small else name


def dense_resnet(small: bool) -> nn.Module:
    """ResNet-50, or a narrow one of as many stages."""
    return resnet((1, 1, 1, 1), 8) if small else resnet()


def latencies(device: torch.device, small: bool, limit: float) -> Section:
    """Of ResNet-50, and on an accelerator of a Llama shape, dense and with half of the channels."""
    side, length = (64, 16) if small else (224, 64)
    sizes = (1, 8) if small else (1, 64)

    def network(of: torch.device) -> tuple[nn.Module, nn.Module]:
        model = dense_resnet(small).to(of)
        return model, halved(model, noise(4, 3, 64, 64, batch=4))

    def language(of: torch.device) -> tuple[nn.Module, nn.Module]:
        model, vocabulary = large_llama(of, small, torch.bfloat16)
        return model, halved(model, text(8, 8, vocabulary, 8))

    def photos(count: int, of: torch.device) -> Tensor:
        return torch.randn(count, 3, side, side, device=of).to(memory_format=torch.channels_last)

    def tokens(count: int, of: torch.device) -> Tensor:
        return torch.randint(0, 90, (count, length), device=of)

    networks, shapes = cache(network), cache(language)
    items: dict[str, Callable[[], Found]] = {}
    for of in dict.fromkeys((device, CPU)):
        for dtype, count in ((dtype, count) for dtype in (torch.float32, torch.bfloat16) for count in sizes):
            what = f"{named(small)}, {of.type}, {str(dtype).removeprefix('torch.')}, batch {count}"
            items[what] = partial(_latency, networks, of, dtype, partial(photos, count))
    if device.type != "cpu" or small:
        for dtype, count in ((dtype, count) for dtype in (torch.bfloat16, torch.float32) for count in sizes):
            name, precision = named(small, "Llama"), str(dtype).removeprefix("torch.")
            what = f"{name}, {device.type}, {precision}, {count} x {length} tokens"
            items[what] = partial(_latency, shapes, device, dtype, partial(tokens, count))
    return Section("latency", ("dense, ms", "pruned, ms", "pruned / dense", "spread, %"), limit, items)


def halved(model: nn.Module, data: list[Tensor]) -> nn.Module:
    """The network with half of the channels of every group: which ones is all the same to the clock."""
    return lnr.prune(model, data, lnr.Keep(0.5), selector="norm", refit=None, run=QUIET).model


def _latency(
    networks: Callable[[torch.device], tuple[nn.Module, nn.Module]],
    of: torch.device,
    dtype: torch.dtype,
    batch: Callable[[torch.device], Tensor],
) -> Found:
    x = batch(of)
    x = x.to(dtype) if x.is_floating_point() else x
    models = [model.to(dtype).to(memory_format=torch.channels_last) for model in networks(of)]  # type: ignore[call-overload]
    (dense, pruned), spread = side_by_side([partial(model, x) for model in models], of)
    numbers = 1e3 * dense, 1e3 * pruned, pruned / dense, 100 * spread
    return Found(dict(zip(("dense, ms", "pruned, ms", "pruned / dense", "spread, %"), numbers, strict=True)))


def side_by_side(works: Sequence[Work], device: torch.device) -> tuple[list[float], float]:
    """Median seconds of each, taken by turns after they are warm, and the largest spread of the middle halves."""
    runs: list[list[float]] = [[] for _ in works]

    def turn() -> float:
        for work, taken in zip(works, runs, strict=True):
            taken.append(seconds_of(work, device))
        return sum(map(sum, runs))

    with torch.inference_mode():
        for _ in range(1 if turn() > REPEATED / 2 else 3):
            turn()
        runs = [[] for _ in works]
        while turn() < 2 * REPEATED or len(runs[0]) < 3:
            if len(runs[0]) == TURNS:
                break
    medians = [statistics.median(taken) for taken in runs]
    quarters = [statistics.quantiles(taken, n=4) for taken in runs]
    return medians, max((last - first) / median for (first, _, last), median in zip(quarters, medians, strict=True))


def large_llama(device: torch.device, small: bool, dtype: torch.dtype, layers: int = 16) -> tuple[nn.Module, int]:
    """The model, or a tiny one, and its vocabulary."""
    if small:
        return llama(2, 128, 256, 16, 97, device=device, dtype=dtype), 97
    return llama(layers, device=device, dtype=dtype), 32_000


def language_prunes(device: torch.device, small: bool, limit: float) -> Section:
    """Whole prunes of a Llama shape: one of its layers on both, and all of it on an accelerator; phase by phase."""
    phases = ("graph", "statistics", "selecting", "refitting")
    items: dict[str, Callable[[], Found]] = {}
    if device.type != "cpu" and not small:
        items[f"Llama, 1.1 billion, {device.type}"] = partial(_language_prune, device, small, 16, phases)
    for of in dict.fromkeys((device, CPU)):
        what = "tiny Llama" if small else "1 of Llama's 16 layers"
        items[f"{what}, {of.type}"] = partial(_language_prune, of, small, 1, phases)
    titles = ("all, s", *(f"{phase}, s" for phase in phases), "error, %", "peak, GB")
    return Section("llama", titles, limit, items)


def _language_prune(of: torch.device, small: bool, layers: int, phases: Sequence[str]) -> Found:
    model, vocabulary = large_llama(of, small, torch.bfloat16, layers)
    data = text(64, 16 if small else 64, vocabulary, 8)
    spent, phase, begin = dict.fromkeys(phases, 0.0), "graph", time.perf_counter()
    since = begin

    def tell(doing: str) -> None:
        nonlocal phase, since
        wait_for(of)
        now = time.perf_counter()
        spent[phase] += now - since
        phase, since = doing.split()[0], now

    if of.type == "cuda":
        torch.cuda.reset_peak_memory_stats(of)
    pruned = lnr.prune(
        model, data, lnr.Keep(0.5), selector="backward", refit=lnr.Refit(ridge=1e-3), into="model",
        run=lnr.Run(progress=tell),
    )  # fmt: skip
    tell("end")
    cells: dict[str, Cell] = {f"{phase}, s": seconds for phase, seconds in spent.items()}
    cells |= {"all, s": since - begin, "error, %": 100 * pruned.report.error}
    if of.type == "cuda":
        cells["peak, GB"] = torch.cuda.max_memory_allocated(of) / GIGABYTE
    return Found(cells)

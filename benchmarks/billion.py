"""A Llama-shaped model of a billion random bfloat16 parameters, pruned in place: seconds and peak memory of each phase.

Its heads and MLPs lose half of their channels. What follows the refit, the verification among it, counts as refitting;
the comparison is one more. Needs transformers, and Linux, which tells the peaks:

    python benchmarks/billion.py --threads 2
"""

import gc
import importlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

import lnr_prune as lnr
from lnr_prune.calibration.calls import Call
from lnr_prune.calibration.outputs import outputs_of
from lnr_prune.graph.groups import find_groups
from lnr_prune.graph.module import named_tensors
from lnr_prune.runtime.optional import import_torchvision
from lnr_prune.selection.costs import cost
from lnr_prune.selection.costs.memory import memory_plan
from lnr_prune.selection.selectors import SELECTORS

VOCABULARY = 32_000
HEAD = 64  # channels of a head


@dataclass
class Meter:
    """Seconds and peak memory of the phases, in the order in which they first came."""

    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)
    phase: str = ""
    since: float = 0.0

    def __call__(self, doing: str) -> None:
        """A phase begins, or goes on."""
        phase = doing.split()[0]
        if phase == self.phase:
            return
        if self.phase:
            self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + time.perf_counter() - self.since
            self.peaks[self.phase] = max(self.peaks.get(self.phase, 0.0), resident("VmHWM"))
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is what there is
        self.phase, self.since = phase, time.perf_counter()


def resident(what: str) -> float:
    """Gigabytes in memory: now, "VmRSS", or at most, "VmHWM"."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024 / 1e9


def llama(hidden: int, inner: int, layers: int, seed: int = 0) -> nn.Module:
    """The model: four heads share their keys and values, and the embedding is not tied to the last layer."""
    import_torchvision()
    transformers: Any = importlib.import_module("transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD,
        num_key_value_heads=hidden // HEAD // 4,
        tie_word_embeddings=False,
        use_cache=False,
    )
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model: nn.Module = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    return model


def difference(model: nn.Module, pruned: lnr.Pruned, call: Call) -> float:
    """Largest difference between the pruned and the masked model's outputs in float64, by the largest output."""
    masked, small = (
        outputs_of(of, weights, call, wide=True, training=False)
        for of, weights in ((model, pruned.masked), (pruned.model, {}))
    )
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(masked, small, strict=True))


def main(
    hidden: Annotated[int, typer.Option(help="Width of the residual stream.")] = 2048,
    inner: Annotated[int, typer.Option(help="Width of the MLPs.")] = 8192,
    layers: Annotated[int, typer.Option(help="Number of layers.")] = 16,
    samples: Annotated[int, typer.Option(help="Sequences of random tokens to calibrate on.")] = 64,
    tokens: Annotated[int, typer.Option(help="Tokens of each.")] = 64,
    keep: Annotated[float, typer.Option(help="Fraction of the heads and of the MLPs' channels that stay.")] = 0.5,
    selector: Annotated[str, typer.Option(help=f"One of {', '.join(SELECTORS)}.")] = "backward",
    ridge: Annotated[float, typer.Option(help="Of the refit; below 0 it is chosen on held-out tokens.")] = 1e-3,
    low_memory: Annotated[bool, typer.Option(help="Statistics of a few layers at a time.")] = True,
    threads: Annotated[int, typer.Option(help="Of torch.")] = 2,
) -> None:
    """Prunes the model and prints what it took."""
    torch.set_num_threads(threads)
    meter, log = Meter(), Console(stderr=True)
    meter("model")
    model = llama(hidden, inner, layers)
    ids = torch.randint(0, VOCABULARY, (samples, tokens), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": batch} for batch in ids.split(8)]
    call = ((), {"input_ids": ids[:2]})
    graph = find_groups(model, *call)
    plan = memory_plan(graph, graph.groups, named_tensors(model), bias=True, low_memory=low_memory)
    log.print(f"plan: {plan}; there are {resident('VmRSS'):.2f} GB of model and libraries", highlight=False)

    def tell(doing: str) -> None:
        if doing != "statistics":
            log.print(f"{time.strftime('%H:%M:%S')} {doing}, {resident('VmRSS'):.2f} GB", highlight=False)
        meter(doing)

    meter("graph")  # and the trial of the shrunk model
    pruned = lnr.prune(
        model, data, lnr.Keep(keep), selector=selector, refit=lnr.Refit(ridge=None if ridge < 0 else ridge),
        into="model", run=lnr.Run(low_memory=low_memory, progress=tell),
    )  # fmt: skip
    gc.collect()
    meter("comparison")
    largest = difference(llama(hidden, inner, layers), pruned, call)
    meter("end")

    console, report = Console(width=120), pruned.report
    table = Table(box=box.MARKDOWN)
    for title in ("phase", "seconds", "peak, GB"):
        table.add_column(title, justify="left" if title == "phase" else "right")
    for phase, seconds in meter.seconds.items():
        table.add_row(phase, f"{seconds:.0f}", f"{meter.peaks[phase]:.2f}")
    table.add_row("all", f"{sum(meter.seconds.values()):.0f}", f"{max(meter.peaks.values()):.2f}")
    console.print(table)
    console.print(
        f"parameters {report.params_before:,} -> {cost.parameters(pruned.model):,}, MACs a sequence "
        f"{report.macs_before:,} -> {report.macs_after:,}; {sum(group.size for group in report.groups):,} -> "
        f"{sum(group.kept for group in report.groups):,} channels in {len(report.groups)} groups\n"
        f"pruned against masked, in float64: {largest:.1e} of the largest output; squared error of the outputs on "
        f"calibration data {report.error:.2%}",
        highlight=False,
    )


if __name__ == "__main__":
    typer.run(main)

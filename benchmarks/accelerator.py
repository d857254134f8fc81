"""An accelerator against the CPU: the same results, and how much faster each step is. Random weights and data.

Sections, each with a time limit of its own: "checks" (small prunes, float64 solves, a process group of one rank, files,
compiled networks, against the CPU's results), "table" (seconds of every step, and of a whole prune of ResNet-50),
"latency" (dense and pruned networks), "llama" (a Llama shape of 1.1 billion parameters). Under eight minutes in all.
Whatever fails has a row that says so, and the script ends with 1. It needs nothing but this package's dependencies, and
not even that it is installed:

    PYTHONPATH=.:adapters python benchmarks/accelerator.py --json rows.json
    python benchmarks/accelerator.py --device cpu --small
"""

import logging
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer

import lnr_adapters  # noqa: F401, TID251
import lnr_prune as lnr
from benchmarks.library.device_checks import checks
from benchmarks.library.device_times import language_prunes, latencies, times
from benchmarks.library.sections import Cell, Section, Sheet

SECTIONS: dict[str, tuple[Callable[[torch.device, bool, float], Section], float]] = {
    "checks": (checks, 120.0),
    "table": (times, 180.0),
    "latency": (latencies, 80.0),
    "llama": (language_prunes, 90.0),
}
"""Name -> what makes it, and seconds that it may take."""


def default_device() -> str:
    """The accelerator, if there is one."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if found is None else found.type


def processor() -> str:
    """Its name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def about(device: torch.device, small: bool) -> dict[str, Cell]:
    """What is measured, and on what."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "device": card,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "lnr_prune": lnr.__version__,
        "small": str(small),
    }


def main(
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ... Default: the accelerator, if there is one.")] = "",
    sections: Annotated[str, typer.Option(help=f"Some of {', '.join(SECTIONS)}.")] = ",".join(SECTIONS),
    small: Annotated[bool, typer.Option("--small", help="Tiny sizes: to see that the script works.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the rows, written after each.")] = None,
    stretch: Annotated[float, typer.Option(help="The time limits are so many times as long.")] = 1.0,
) -> None:
    """Compares a device with the CPU."""
    names = [name.strip() for name in sections.split(",")]
    if unknown := [name for name in names if name not in SECTIONS]:
        raise typer.BadParameter(f"unknown section {unknown[0]!r}, expected some of {', '.join(SECTIONS)}")
    begin, place = time.perf_counter(), torch.device(device or default_device())
    logging.getLogger("lnr_prune").setLevel(logging.ERROR)  # few samples are meant
    if small:
        torch.set_num_threads(1)  # more would wait for one another
    sheet = Sheet(about(place, small), json_file)
    print(", ".join(f"{key}: {value}" for key, value in sheet.about.items()), flush=True)
    for name in names:
        make, limit = SECTIONS[name]
        sheet.run(make(place, small, stretch * limit))
    print(f"\n{len(sheet.wrong)} of {len(sheet.rows)} rows are wrong, {time.perf_counter() - begin:.0f} s in all")
    for row in sheet.wrong:
        print(f"- {row.section}, {row.what}: {row.wrong}")
    if sheet.wrong:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

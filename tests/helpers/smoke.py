"""What `make package` does with the wheel, installed alone: it finds its adapters, prunes, saves and loads."""

import subprocess
import sys
import sysconfig
import tempfile
from importlib import metadata
from importlib.resources import files
from pathlib import Path

import torch
from torch import nn

import lnr_prune as lnr


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()


def main() -> None:
    assert Path(str(lnr.__file__)).is_relative_to(sys.prefix), f"not the wheel's: {lnr.__file__}"
    assert metadata.version("lnr-prune") == lnr.__version__
    assert [entry.value for entry in metadata.entry_points(group="lnr_prune.adapters")] == ["lnr_adapters"]
    assert all(files(package).joinpath("py.typed").is_file() for package in ("lnr_prune", "lnr_adapters"))
    x = torch.randn(512, 1, 8, 8)
    pruned = lnr.prune(network(), [x], lnr.Keep(0.5))
    assert pruned.report.params_after < pruned.report.params_before
    with tempfile.TemporaryDirectory() as folder:
        pruned.save(f"{folder}/m.safetensors")
        assert torch.equal(lnr.load(f"{folder}/m.safetensors", network())(x), pruned.model(x))
    assert "<svg" in pruned.report.to_html()  # with the templates of the wheel
    command = Path(sysconfig.get_path("scripts"), "lnr-prune")
    assert "Usage" in subprocess.run([command, "--help"], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()

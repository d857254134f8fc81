"""Files: written completely or not at all, and only where a file may be."""

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import lnr_prune as lnr


def pruned() -> lnr.Pruned:
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    return lnr.prune(model, [torch.randn(256, 8)], lnr.Keep(0.5))


SAVERS: dict[str, Callable[[lnr.Pruned, Path], object]] = {
    "model": lambda pruned, path: pruned.save(path),
    "plan": lambda pruned, path: lnr.save_plan(path, pruned.plan),
    "page": lambda pruned, path: pruned.report.to_html(path),
}


@pytest.mark.parametrize("save", SAVERS)
def test_a_pipe_or_a_device_is_not_replaced(save: str, tmp_path: Path) -> None:
    done, pipe, link = pruned(), tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to("/dev/null")
    for path in (pipe, link, Path("/dev/null")):
        before = os.stat(path)
        with pytest.raises(OSError, match="a device, a pipe or a socket; give the name of a file"):
            SAVERS[save](done, path)
        assert os.stat(path).st_ino == before.st_ino
        assert stat.S_IFMT(os.stat(path).st_mode) == stat.S_IFMT(before.st_mode)
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]


FULL = """
import resource, sys, torch, lnr_prune as lnr
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
data = [torch.randn(300, 64)]
pruned = lnr.prune(model, data, lnr.Keep(0.5))
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
run = lnr.Run(work=sys.argv[1] + "/work")
for save in (lambda: pruned.save(sys.argv[1] + "/m"), lambda: lnr.prune(model, data, lnr.Keep(0.5), run=run)):
    try:
        save()
    except OSError as error:
        print(error.errno, error.strerror)
"""


def test_what_does_not_fit_on_the_disk_is_an_error_of_the_system(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: safetensors meets it in the same way."""
    done = subprocess.run([sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0] == f"{errno.EFBIG} {os.strerror(errno.EFBIG)}"
    assert lines[1].startswith(f"{errno.EFBIG} the work folder cannot be written: {os.strerror(errno.EFBIG)}; free")
    assert not (tmp_path / "m").exists()
    assert not list(tmp_path.rglob("*.part"))

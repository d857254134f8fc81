"""The drawing shows every layer, its group, and why it is frozen; images need graphviz and say so."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import lnr_prune as lnr
from lnr_prune.graph.flow import INPUT, OUTPUT
from lnr_prune.graph.groups import find_groups
from tests.helpers.models import Functional, Residual, mlp, randomised
from tests.helpers.patterns import AuxiliaryHead

IMAGE = torch.randn(2, 3, 8, 8)


def test_the_flow_follows_the_data_and_leaves_out_what_is_between_layers() -> None:
    flow = find_groups(randomised(Residual()), (IMAGE,), {}).flow
    meeting = {re.sub(r"\d+", "", name): name for pair in flow for name in pair if name[0] == "<"}
    add, cat, mul = meeting["<add_>"], meeting["<cat_>"], meeting["<mul_>"]
    assert set(flow) == {
        (INPUT, "stem"), ("stem", "depthwise"), ("depthwise", "point"), ("stem", add), ("point", add), (add, "side"),
        (add, cat), ("side", cat), (cat, "squeeze"), ("squeeze", "excite"), (cat, mul), ("excite", mul),
        (mul, "head"), ("head", OUTPUT),
    }  # fmt: skip


def test_raw_weights_loops_and_training_heads_are_in_the_flow() -> None:
    flow = find_groups(Functional(), (torch.randn(2, 5),), {}).flow
    assert set(flow) == {(INPUT, "w1"), ("w1", "w2"), ("w2", "w1"), ("w2", OUTPUT)}
    flow = find_groups(AuxiliaryHead(), (IMAGE,), {}).flow
    assert {("a", "b"), ("b", "head"), ("head", OUTPUT), ("a", "auxiliary"), ("auxiliary", OUTPUT)} < set(flow)
    assert len(set(flow)) == len(flow)


def test_groups_have_colours_and_frozen_layers_their_reason() -> None:
    text = lnr.inspect(randomised(Residual()), IMAGE).to_dot()
    nodes = {match[1]: match[0] for match in re.finditer(r'^  "([^"]+)" \[.*$', text, re.MULTILINE)}
    colour = {name: re.findall(r'fillcolor="?([^" \]]+)', line) for name, line in nodes.items()}
    assert colour["stem"] == colour["depthwise"] == colour["point"]
    assert colour["excite"] == [f"{colour['stem'][0]}:{colour['side'][0]}"]  # the gate of a concatenation
    assert len({str(colour[name]) for name in ("stem", "side", "squeeze", "head")}) == 4
    assert colour["head"] == ["gray90"]
    assert "output of the model" in nodes["head"]
    assert "8 channels of 186 parameters and 5,724 MACs each, read by point, side, squeeze, head" in nodes["point"]
    assert text == lnr.inspect(randomised(Residual()), IMAGE).to_dot()


def test_names_are_quoted() -> None:
    model = mlp(4, 6, 3)
    model.add_module('a "b" \\', nn.Linear(3, 2))
    assert '"a \\"b\\" \\\\" [' in lnr.inspect(model, torch.randn(2, 4)).to_dot()


def test_text_needs_nothing_and_images_need_graphviz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = lnr.inspect(mlp(4, 6, 3), torch.randn(2, 4))
    assert found.draw(tmp_path / "groups.dot").read_text(encoding="utf-8") == found.to_dot()
    with pytest.raises(ValueError, match=r"groups\.bmp.*\.svg"):
        found.draw(tmp_path / "groups.bmp")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(lnr.LnrPruneError, match=r"graphviz.*\.dot file"):
        found.draw(tmp_path / "groups.svg")


@pytest.mark.skipif(shutil.which("dot") is None, reason="needs graphviz")
@pytest.mark.parametrize("suffix", ["svg", "png", "pdf"])
def test_graphviz_draws_it(tmp_path: Path, suffix: str) -> None:
    path = lnr.inspect(randomised(Residual()), IMAGE).draw(str(tmp_path / f"groups.{suffix}"))
    content = path.read_bytes()
    assert content.startswith({"svg": b"<?xml", "png": b"\x89PNG", "pdf": b"%PDF"}[suffix])
    assert suffix != "svg" or b"squeeze" in content


def test_a_graphviz_that_fails_or_takes_too_long_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = lnr.inspect(mlp(4, 6, 3), torch.randn(2, 4))
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    fake = tmp_path / "dot"
    fake.write_text("#!/bin/sh\necho broken on purpose >&2\nexit 1\n", encoding="utf-8")
    fake.chmod(0o755)
    with pytest.raises(lnr.LnrPruneError, match="broken on purpose"):
        found.draw(tmp_path / "groups.svg")
    fake.write_text("#!/bin/sh\nexec sleep 3600\n", encoding="utf-8")
    monkeypatch.setattr("lnr_prune.graph.drawing.LIMIT", 0.1)
    with pytest.raises(lnr.LnrPruneError, match="too large"):
        found.draw(tmp_path / "groups.svg")

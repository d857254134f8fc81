"""Pruned models and plans survive being written to files; what fails leaves nothing behind."""

import io
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import lnr_prune as lnr
from lnr_prune.collapse import files
from lnr_prune.collapse.graph_module import PrunedGraph
from lnr_prune.errors import GraphError, PlanError, VerificationError
from lnr_prune.graph.module import named_tensors
from lnr_prune.runtime.digest import digest_of
from tests.helpers import held, models, patterns
from tests.helpers.models import randomised


class Tied(nn.Module):
    """A language model's head is its embedding; a buffer that state dicts leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.up, self.down = nn.Embedding(11, 6), nn.Linear(6, 10), nn.Linear(10, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.rand(6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        return self.head(x + self.down(self.up(x).relu()) * self.scale)


CASES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "mlp": (partial(models.mlp, 4, 9, 8, 3), torch.randn(32, 4)),
    "cnn": (models.cnn, torch.randn(8, 2, 12, 12)),
    "residual": (models.Residual, torch.randn(8, 3, 8, 8)),
    "attributes": (held.HeldHeads, torch.randn(8, 5, 16)),
    "settings": (partial(held.HeldBySettings, held.Settings(4, 12)), torch.randn(8, 5, 12)),
    "entries": (held.HeldByParts, torch.randn(8, 4)),
    "multihead": (patterns.TorchAttention, torch.randn(8, 5, 12)),
    "auxiliary": (patterns.AuxiliaryHead, torch.randn(8, 3, 8, 8)),
    "tied": (Tied, torch.randint(11, (8, 5))),
}


def fresh(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomised(CASES[name][0](), seed)


def pruned_mlp(keep: Any = 0.5, selector: str = "group_lasso") -> lnr.Pruned:
    return lnr.prune(fresh("mlp"), [CASES["mlp"][1]], lnr.Keep(keep), selector=selector)


def with_gelu() -> nn.Module:
    model = models.mlp(4, 9, 8, 3)
    model[3] = nn.GELU()
    return model


def layers(pruned: lnr.Pruned) -> Any:
    assert isinstance(pruned.model, nn.Sequential)
    return pruned.model


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("verified", [False, True])
def test_a_loaded_model_is_the_pruned_one(name: str, verified: bool, tmp_path: Path) -> None:
    x, path = CASES[name][1], tmp_path / "m.safetensors"
    pruned = lnr.prune(fresh(name), [x], lnr.Keep(0.5))
    pruned.save(path)
    other = fresh(name, seed=1)
    text, before = repr(other), named_tensors(other)
    loaded = lnr.load(path, other, example=x if verified else None)
    torch.testing.assert_close(loaded(x), pruned.model(x), rtol=0, atol=0)
    assert repr(loaded) == repr(pruned.model)
    assert type(loaded) is type(other)
    assert repr(other) == text
    assert all(tensor is before[key] for key, tensor in named_tensors(other).items())
    own = named_tensors(loaded)
    for key, tensor in named_tensors(pruned.model).items():
        assert torch.equal(own[key], tensor)
        assert (type(own[key]), own[key].requires_grad) == (type(tensor), tensor.requires_grad)
    assert len({id(tensor) for tensor in own.values()}) == len(load_file(path))
    assert lnr.load_plan(path) == pruned.plan
    assert files.report_of(path) == pruned.report
    assert lnr.load(path, other, into="model") is other
    torch.testing.assert_close(other(x), pruned.model(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["attributes", "entries", "auxiliary", "tied"])
def test_a_loaded_graph_is_the_pruned_one(name: str, tmp_path: Path) -> None:
    x, path = CASES[name][1], tmp_path / "m.safetensors"
    pruned = lnr.prune(fresh(name), [x], lnr.Keep(0.5), into="graph")
    pruned.save(path)
    loaded = lnr.load(path, fresh(name, seed=1), example=x)
    assert isinstance(loaded, PrunedGraph)
    torch.testing.assert_close(loaded(x[:3]), pruned.model(x[:3]), rtol=0, atol=0)
    with pytest.raises(PlanError, match="give a batch as example="):
        lnr.load(path, fresh(name))
    with pytest.raises(PlanError, match="without into='model'"):
        lnr.load(path, fresh(name), example=x, into="model")


def test_the_original_may_be_on_the_meta_device(tmp_path: Path) -> None:
    pruned = pruned_mlp()
    pruned.save(tmp_path / "m.safetensors")
    with torch.device("meta"):
        empty = models.mlp(4, 9, 8, 3)
    loaded = lnr.load(tmp_path / "m.safetensors", empty)
    torch.testing.assert_close(loaded(CASES["mlp"][1]), pruned.model(CASES["mlp"][1]), rtol=0, atol=0)


@pytest.mark.parametrize("into", ["copy", "model"])
def test_a_loaded_model_is_in_evaluation_mode(into: str, tmp_path: Path) -> None:
    lnr.prune(fresh("mlp"), [CASES["mlp"][1]], lnr.Keep(0.5)).save(tmp_path / "m.safetensors")
    assert not any(
        part.training for part in lnr.load(tmp_path / "m.safetensors", fresh("mlp").train(), into=into).modules()
    )


def test_what_the_model_has_become_is_saved(tmp_path: Path) -> None:
    """Fine-tuned and cast."""
    pruned = pruned_mlp()
    with torch.no_grad():
        layers(pruned)[0].weight.mul_(2)
    pruned.model.bfloat16()
    pruned.save(tmp_path / "m.safetensors")
    loaded = lnr.load(tmp_path / "m.safetensors", fresh("mlp", seed=1))
    x = CASES["mlp"][1].bfloat16()
    torch.testing.assert_close(loaded(x), pruned.model(x), rtol=0, atol=0)


def test_views_of_one_storage_are_stored_each(tmp_path: Path) -> None:
    pruned = pruned_mlp()
    storage = torch.randn(9)
    for layer in (layers(pruned)[0], layers(pruned)[2]):
        layer.bias = nn.Parameter(storage[: len(layer.bias)])
    layers(pruned)[0].weight = nn.Parameter(layers(pruned)[0].weight.detach().T.contiguous().T)
    pruned.save(tmp_path / "m.safetensors")
    x = CASES["mlp"][1]
    torch.testing.assert_close(lnr.load(tmp_path / "m.safetensors", fresh("mlp"))(x), pruned.model(x))


@pytest.mark.parametrize("name", CASES)
def test_the_state_dict_needs_no_pickle(name: str) -> None:
    x, buffer = CASES[name][1], io.BytesIO()
    pruned = lnr.prune(fresh(name), [x], lnr.Keep(0.5))
    torch.save(pruned.model.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert all(torch.equal(tensor, state[key]) for key, tensor in pruned.model.state_dict().items())


@pytest.mark.parametrize("name", CASES)
def test_a_plan_fits_another_checkpoint(name: str, tmp_path: Path) -> None:
    x, path = CASES[name][1], tmp_path / "plan.json"
    pruned = lnr.prune(fresh(name), [x], lnr.Keep(0.5))
    lnr.save_plan(path, pruned.plan)
    plan = lnr.load_plan(path)
    assert plan == pruned.plan
    assert plan.diff(pruned.plan) == ""
    other = fresh(name, seed=1)
    masked = {}
    for key, dims in plan.indices.items():
        masked[key] = named_tensors(other)[key].detach().clone()
        for dim, kept in dims.items() if masked[key].dim() > 1 else ():
            gone = [index for index in range(masked[key].shape[dim]) if index not in kept]
            masked[key].index_fill_(dim, torch.tensor(gone, dtype=torch.long), 0)
    expected = torch.func.functional_call(other, masked, (x,))
    for example, into in ((None, "copy"), (x, "copy"), (x, "model")):
        small = lnr.apply_plan(plan, other, example=example, into=into)
        torch.testing.assert_close(small(x), expected, rtol=1e-4, atol=1e-5)
        assert (small is other) == (into == "model")


def test_a_weight_that_is_normed_is_no_obstacle(tmp_path: Path) -> None:
    def net() -> nn.Module:
        conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3))
        return nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))

    model, x = randomised(net()), torch.randn(8, 3, 6, 6)
    pruned = lnr.prune(model, x, lnr.Keep(0.5))
    pruned.save(tmp_path / "pruned.safetensors")
    assert lnr.load(tmp_path / "pruned.safetensors", net(), example=x)(x).equal(pruned.model(x))
    assert lnr.apply_plan(pruned.plan, model, example=x)(x).isfinite().all()


def test_the_plan_of_a_model_is_read_from_its_file_too(tmp_path: Path) -> None:
    pruned = pruned_mlp()
    pruned.save(tmp_path / "m.safetensors")
    assert lnr.load_plan(tmp_path / "m.safetensors") == pruned.plan
    lnr.save_plan(tmp_path / "plan.json", pruned.plan)
    with pytest.raises(PlanError, match="without a report"):
        files.report_of(tmp_path / "plan.json")


def test_a_plan_can_be_read_by_people() -> None:
    first, second = pruned_mlp({"0": 4}, "norm").plan, pruned_mlp({"0": 3, "2": 5}).plan
    kept = first.channels["0"]
    assert f"0: keeps 4 channels: {kept[0]}" in str(first)
    assert "0.weight: (9, 4) -> (4, 4)" in str(first)
    assert "2.weight: (8, 9) -> (8, 4)" in str(first)
    assert "whole here, keeps 5 channels" in first.diff(second)
    assert "in both" in first.diff(second)
    assert str(pruned_mlp(1.0).plan) == "nothing is removed"
    x = CASES["attributes"][1]
    assert "num_heads = 2" in str(lnr.prune(fresh("attributes"), [x], lnr.Keep(0.5)).plan)
    assert (
        lnr.Plan({"a": (0, 1, 2, 5)}, {"a.weight": {0: (0, 1, 2, 5)}})
        .__str__()
        .startswith("a: keeps 4 channels: 0-2, 5\na.weight: dimension 0 keeps 4")
    )


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: models.mlp(4, 9, 8, 4), r"tensor '4.weight' is float32 \(4, 8\), expected float32 \(3, 8\)"),
        (lambda: models.mlp(4, 9, 8, 8, 3), "layer '5' is ReLU, expected none"),
        (lambda: models.mlp(4, 9, 3), "layer '3' is not there, expected ReLU"),
        (lambda: models.mlp(4, 9, 8, 3, bias=False), "'0.bias' is not there"),
        (lambda: models.mlp(4, 9, 8, 3).double(), r"float64 \(9, 4\), expected float32"),
        (lambda: pruned_mlp().model, "Give a new instance of the model that was pruned"),
        (
            lambda: nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 8), nn.GELU(), nn.Linear(8, 3)),
            "'3' is GELU, expected ReLU",
        ),
    ],
)
def test_a_model_of_another_architecture_is_refused(
    other: Callable[[], nn.Module], message: str, tmp_path: Path
) -> None:
    pruned = pruned_mlp()
    pruned.save(tmp_path / "m.safetensors")
    model = other()
    before = repr(model), {name: id(tensor) for name, tensor in named_tensors(model).items()}
    for into in ("copy", "model"):
        with pytest.raises(PlanError, match=message):
            lnr.load(tmp_path / "m.safetensors", model, into=into)
        with pytest.raises(PlanError, match=message):
            lnr.apply_plan(pruned.plan, model, into=into)
    assert (repr(model), {name: id(tensor) for name, tensor in named_tensors(model).items()}) == before


def test_ties_and_heads_are_part_of_the_architecture(tmp_path: Path) -> None:
    tied = lnr.prune(fresh("tied"), [CASES["tied"][1]], lnr.Keep(0.5))
    model = Tied()
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    with pytest.raises(PlanError, match=r"'head.weight' is float32 .*, expected tied to 'embedding.weight'"):
        lnr.apply_plan(tied.plan, model)
    plan = lnr.prune(fresh("multihead"), [CASES["multihead"][1]], lnr.Keep(0.5)).plan
    other = fresh("multihead")
    for module in other.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.num_heads *= 2
    with pytest.raises(PlanError, match="attribute 'num_heads' is"):
        lnr.apply_plan(plan, other)


def test_a_copy_that_would_run_on_the_original_is_refused(tmp_path: Path) -> None:
    x = torch.randn(4, 1, 28, 28)
    pruned = lnr.prune(models.ReferenceLeNet5(), [x], lnr.Keep(0.5), into="model")
    pruned.save(tmp_path / "m.safetensors")
    for example in (None, x):
        with pytest.raises(GraphError, match="into='model'"):
            lnr.load(tmp_path / "m.safetensors", models.ReferenceLeNet5(), example=example)
    loaded = lnr.load(tmp_path / "m.safetensors", models.ReferenceLeNet5(), into="model")
    torch.testing.assert_close(loaded(x), pruned.model(x), rtol=0, atol=0)


def test_an_example_shows_a_forward_that_differs(tmp_path: Path) -> None:
    """The layers are the same, the code is not: only running it tells."""

    class Net(nn.Module):
        def __init__(self, last: bool) -> None:
            super().__init__()
            self.last, self.up, self.down = last, nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.up(x).relu()
            return self.down(h * (h.mean(1, keepdim=True) if self.last else 2))

    x = torch.randn(32, 4)
    pruned = lnr.prune(Net(last=False), [x], lnr.Keep(0.5))
    pruned.save(tmp_path / "m.safetensors")
    model: Any = Net(last=True)
    for act in (partial(lnr.load, tmp_path / "m.safetensors"), partial(lnr.apply_plan, pruned.plan)):
        with pytest.raises(VerificationError, match="differs from the masked one"):
            act(model, example=x, into="model")
    assert model.up.out_features == 8


def test_a_model_that_changed_its_shape_since_is_not_saved(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    pruned = pruned_mlp()
    layers(pruned)[4] = nn.Linear(4, 7)
    with pytest.raises(PlanError, match=r"has changed since it was pruned.*'4.weight' is of shape \(7, 4\)"):
        pruned.save(path)
    pruned = pruned_mlp()
    layers(pruned).append(nn.Linear(3, 3))
    with pytest.raises(PlanError, match=r"'5\.\w+', which the original model does not have"):
        pruned.save(path)
    pruned = lnr.prune(fresh("tied"), [CASES["tied"][1]], lnr.Keep(0.5))
    pruned.model.get_submodule("head").weight = nn.Parameter(torch.randn(11, 6))
    with pytest.raises(PlanError, match="is no longer"):
        pruned.save(path)
    pruned = pruned_mlp()
    pruned.model.to("meta")
    with pytest.raises(PlanError, match="on meta, expected dense values"):
        pruned.save(path)
    with pytest.raises(PlanError, match="does not say what architecture"):
        lnr.save_plan(path, lnr.Plan({}, {}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    failure: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_half(tensors: object, part: str, metadata: object) -> None:
        Path(part).write_bytes(b"half")
        raise failure

    pruned, path = pruned_mlp(), tmp_path / "m.safetensors"
    pruned.save(path)
    before = path.read_bytes()
    monkeypatch.setattr(files, "save_file", write_half)
    with pytest.raises(failure):
        pruned.save(path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before
    with pytest.raises(FileNotFoundError):
        pruned.save(tmp_path / "nowhere" / "m.safetensors")


@pytest.mark.skipif(os.name != "posix", reason="modes and links of POSIX")
def test_files_have_ordinary_modes_and_links_stay(tmp_path: Path) -> None:
    pruned, path, link = pruned_mlp(), tmp_path / "m.safetensors", tmp_path / "link.safetensors"
    link.symlink_to(path)
    pruned.save(link)
    assert link.is_symlink()
    (tmp_path / "other").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)
    path.chmod(0o640)
    pruned.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        pruned_mlp().save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_file_names_its_versions_and_other_tools_read_its_tensors(tmp_path: Path) -> None:
    pruned = pruned_mlp()
    pruned.save(tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        record = json.loads(file.metadata()["lnr_prune"])
    assert (record["format"], record["version"], record["torch"]) == (1, lnr.__version__, torch.__version__)
    pruned.model.load_state_dict(load_file(tmp_path / "m.safetensors"))


def test_loading_needs_no_adapters(tmp_path: Path) -> None:
    """A served model: no calibration, no registry, no trace."""
    pruned_mlp().save(tmp_path / "m.safetensors")
    code = (
        "import sys, lnr_prune; from torch import nn;"
        "net = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3));"
        "print(lnr_prune.load(sys.argv[1], net)[0]); assert 'lnr_adapters' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "m.safetensors"], check=True, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert "out_features=5" in done.stdout or "out_features=4" in done.stdout


def test_a_single_strided_column_is_hashed() -> None:
    column = torch.arange(12.0).reshape(4, 3)[:, 1:2]
    assert digest_of({"w": column}) == digest_of({"w": column.clone(memory_format=torch.contiguous_format)})

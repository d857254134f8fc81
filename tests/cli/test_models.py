"""Models, weights and samples as the command line names them: only what is named is run, every mistake is told."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file, save_model

from lnr_prune.cli.data import Source, batches, random_batch
from lnr_prune.cli.images import Look
from lnr_prune.cli.models import build
from lnr_prune.errors import CalibrationError, LnrPruneError
from lnr_prune.runtime.optional import needed
from tests.helpers.models import mlp

FILE = """
from torch import nn
import helper

def net(width=4, names=()):
    return nn.Linear(width, helper.OUT)

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

ready = net()
number = 3

def broken():
    raise RuntimeError("no weights today")

def nothing():
    return None
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for module in ("helper", "some_nets"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    (tmp_path / "some_nets.py").write_text(FILE, encoding="utf-8")
    (tmp_path / "helper.py").write_text("OUT = 3", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("spec", ["some_nets.py:net", "some_nets:net", "./some_nets.py:net"])
def test_a_factory_in_a_file_or_module_beside_its_helpers(spec: str) -> None:
    model: Any = build(spec, ["width=6", 'names=["a", "b"]'])
    assert (model.in_features, model.out_features, model.training) == (6, 3, False)


def test_a_dotted_name() -> None:
    assert isinstance(build("torch:nn.Linear", ["in_features=2", "out_features=3"]), torch.nn.Linear)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("some_nets.py", ValueError, "a model is package.module:factory"),
        (":net", ValueError, "a model is"),
        ("some_nets.py:nit", ValueError, "has no 'nit'; did you mean net"),
        ("some_nets.py:ready", ValueError, "is a Linear, expected a function"),
        ("some_nets.py:number", ValueError, "is a int, expected a function"),
        ("nowhere.py:net", ValueError, "there is no file nowhere.py"),
        ("no_such_module:net", ValueError, "cannot import no_such_module"),
        ("some_nets.py:broken", LnrPruneError, "failed with RuntimeError: no weights today"),
        ("some_nets.py:nothing", LnrPruneError, "returned a NoneType"),
        ("hf:nowhere", LnrPruneError, "there is no folder 'nowhere'"),
        ("torchvision:resnet19", ValueError, "torchvision has no model 'resnet19'; did you mean resnet1"),
    ],
)
def test_what_is_no_factory_is_told(spec: str, error: type[Exception], message: str) -> None:
    if spec.startswith("torchvision"):
        pytest.importorskip("PIL")
    with pytest.raises(error, match=message):
        build(spec)


@pytest.mark.parametrize("argument", ["width", "=3", "width=wide", "width=__import__('os')"])
def test_arguments_are_json_and_nothing_else(argument: str) -> None:
    with pytest.raises(ValueError, match=r"key=value|must be JSON"):
        build("some_nets.py:net", [argument])


def test_torchvision_by_name() -> None:
    model: Any = build("torchvision:resnet18", ["num_classes=7"])
    assert model.fc.out_features == 7


def test_weights_of_every_kind_are_loaded() -> None:
    wanted = torch.nn.Linear(4, 3)
    save_file(wanted.state_dict(), "w.safetensors")
    torch.save(wanted.state_dict(), "w.pt")
    torch.save({"epoch": 3, "state_dict": wanted.state_dict()}, "w.pth")
    for file in ("w.safetensors", "w.pt", "w.pth"):
        model: Any = build("some_nets.py:net", weights=Path(file))
        assert torch.equal(model.weight, wanted.weight)
    tied: Any = build("some_nets.py:Tied")
    save_model(tied, "tied.safetensors")
    again: Any = build("some_nets.py:Tied", weights=Path("tied.safetensors"))
    assert again.a.weight is again.b.weight
    assert torch.equal(again.a.weight, tied.a.weight)


class _Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("was_here"),)


def test_weights_that_do_not_fit_or_hold_code_are_refused(folder: Path) -> None:
    torch.save(torch.nn.Linear(5, 3).state_dict(), "shape.pt")
    torch.save(torch.nn.Linear(4, 3), "model.pt")
    torch.save(torch.zeros(3), "tensor.pt")
    save_file({"other": torch.zeros(3)}, "other.safetensors")
    torch.save({"weight": _Hostile()}, "hostile.pt")
    Path("empty.pt").write_bytes(b"")
    Path("empty.safetensors").write_bytes(b"")
    for file in sorted([*folder.glob("*.pt"), *folder.glob("*.safetensors")]):
        with pytest.raises(LnrPruneError, match=f"cannot load .*{file.name} into Linear"):
            build("some_nets.py:net", weights=file)
    assert not Path("was_here").exists()


def test_a_missing_package_is_named() -> None:
    with pytest.raises(LnrPruneError, match="pip install no_such_package"):
        needed("no_such_package")


def test_images_are_scaled_cropped_and_normalised(folder: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    (folder / "photos" / "cats").mkdir(parents=True)
    for i, mode in enumerate(("RGB", "L", "RGBA", "P")):
        image.new(mode, (30 + i, 20), 10 * i).save(folder / "photos" / "cats" / f"{i}.png")
    image.new("RGB", (20, 60), (255, 0, 51)).save(folder / "photos" / "tall.jpg", quality=100)
    (folder / "photos" / "notes.txt").write_text("no image", encoding="utf-8")
    look = Look((16, 16), mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 0.5))
    source = Source(folder / "photos", batch_size=2, look=look)
    read = list(batches(source))
    assert [tuple(batch.shape) for batch in read] == [(2, 3, 16, 16), (2, 3, 16, 16), (1, 3, 16, 16)]
    assert read[0].dtype == torch.float32
    tall = torch.tensor([1.0, -2.0, -0.6])
    close = [sample for batch in read for sample in batch if torch.allclose(sample.mean((1, 2)), tall, atol=0.02)]
    assert len(close) == 1
    assert all(torch.equal(a, b) for a, b in zip(batches(source), read, strict=True))  # every pass is the same
    grey = next(iter(batches(Source(folder / "photos", look=Look((8, 8), mean=(0.5,), std=(0.5,))), torch.bfloat16)))
    assert (tuple(grey.shape), grey.dtype) == ((5, 1, 8, 8), torch.bfloat16)
    assert len(next(iter(batches(Source(folder / "photos", samples=3))))) == 3
    with pytest.raises(ValueError, match="3 values, or 1"):
        Look(mean=(0.5, 0.5), std=(0.5, 0.5))
    (folder / "photos" / "broken.png").write_bytes(b"PNG")
    with pytest.raises(CalibrationError, match=r"broken\.png"):
        list(batches(source))


def test_images_are_cropped_at_the_centre(folder: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    (folder / "wide").mkdir()
    whole = image.new("RGB", (90, 30), (255, 0, 0))
    whole.paste((0, 255, 0), (30, 0, 60, 30))
    whole.save(folder / "wide" / "a.png")
    (batch,) = batches(Source(folder / "wide", look=Look((15, 15), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))))
    inner = batch[0, :, 2:-2, 2:-2].mean((1, 2))  # resizing blurs the edges
    assert torch.allclose(inner, torch.tensor([0.0, 1.0, 0.0]), atol=0.02)


def test_arrays_are_drawn_by_the_seed_and_cast(folder: Path) -> None:
    x, y = np.arange(40.0).reshape(20, 2), np.arange(20)
    np.save("x.npy", x)
    np.savez("xy.npz", x=x, y=y)
    save_file({"x": torch.tensor(x), "mask": torch.ones(20, 2, dtype=torch.int32)}, "xm.safetensors")

    def read(name: str, **options: Any) -> list[Any]:
        return list(batches(Source(Path(name), batch_size=8, **options)))

    first = read("x.npy")
    assert [len(batch) for batch in first] == [8, 8, 4]
    assert first[0].dtype == torch.float32
    assert sorted(torch.cat(first)[:, 0].tolist()) == x[:, 0].tolist()
    assert torch.equal(torch.cat(first), torch.cat(read("xy.npz", arrays=("x",))))
    assert not torch.equal(torch.cat(first), torch.cat(read("x.npy", seed=1)))
    assert torch.cat(read("x.npy", samples=5)).shape == (5, 2)
    assert torch.cat(read("xy.npz", arrays=("y",))).dtype == torch.int64
    both = read("xm.safetensors", arrays=("x", "mask"))
    assert [set(batch) for batch in both] == [{"x", "mask"}] * 3
    assert torch.equal(torch.cat([batch["x"] for batch in both]), torch.cat(first))


def test_arrays_that_cannot_be_used_are_refused(folder: Path) -> None:
    np.savez("xy.npz", x=np.zeros((4, 2)), y=np.zeros(3), empty=np.zeros((0, 2)), number=np.array(1.0))
    np.save("objects.npy", np.array([_Hostile()], dtype=object), allow_pickle=True)
    np.savez("objects.npz", x=np.array([_Hostile()], dtype=object), allow_pickle=True)
    Path("cut.npz").write_bytes(Path("xy.npz").read_bytes()[:100])
    Path("cut.npy").write_bytes(b"\x93NUMPY\x01")
    Path("bad.safetensors").write_bytes(b"12345678{}")
    cases: list[tuple[str, tuple[str, ...], str]] = [
        ("xy.npz", (), "name the model's input with --array"),
        ("xy.npz", ("z",), "has no array 'z'; known: x, y, empty, number"),
        ("xy.npz", ("x", "y"), "share a first axis"),
        ("xy.npz", ("empty",), "share a first axis"),
        ("xy.npz", ("number",), "share a first axis"),
        *[(name, ("x",), "cannot read") for name in ("objects.npy", "cut.npz", "cut.npy", "bad.safetensors", "no.npy")],
        ("objects.npz", ("x",), "cannot read"),
    ]
    for name, arrays, message in cases:
        with pytest.raises(CalibrationError, match=message):
            batches(Source(Path(name), arrays=arrays))
    assert not Path("was_here").exists()


def test_texts_need_a_tokenizer(folder: Path) -> None:
    Path("text.txt").write_text("\n \n", encoding="utf-8")
    with pytest.raises(ValueError, match="--tokenizer"):
        batches(Source(Path("text.txt")))
    with pytest.raises(CalibrationError, match="holds no text"):
        batches(Source(Path("text.txt"), tokenizer=folder))
    Path("text.txt").write_text("a line", encoding="utf-8")
    with pytest.raises(ValueError, match="there is no folder nowhere"):
        batches(Source(Path("text.txt"), tokenizer=Path("nowhere")))


def test_hugging_face_from_folders(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_labels=3
    )
    saved = transformers.BertForSequenceClassification(config)
    saved.save_pretrained(folder / "bert")
    (folder / "bert" / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "line"]))
    transformers.BertTokenizer(str(folder / "bert" / "vocab.txt")).save_pretrained(folder / "bert")
    model: Any = build("hf:bert")
    assert type(model) is type(saved)
    assert torch.equal(model.classifier.weight, saved.classifier.weight)
    Path("text.txt").write_text("a line\n\na\nline line line\n", encoding="utf-8")
    (batch,) = batches(Source(Path("text.txt"), tokenizer=Path("bert"), tokens=4))
    assert tuple(batch["input_ids"].shape) == tuple(batch["attention_mask"].shape) == (3, 4)
    assert model(**batch).logits.shape == (3, 3)
    assert random_batch(model, 2, None, 6)["input_ids"].shape == (2, 6)


def test_random_batches_are_the_same_every_time_and_of_the_models_type() -> None:
    model = mlp(4, 3).double()
    batch = random_batch(model, 5, (4,), None)
    assert (tuple(batch.shape), batch.dtype) == ((5, 4), torch.float64)
    assert torch.equal(batch, random_batch(model, 5, (4,), None))

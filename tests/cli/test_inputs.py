"""Files as people have them: tables, images that are made ready as in training, packed texts."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from lnr_prune.cli.data import Source, batches
from lnr_prune.cli.images import Look, look_of
from lnr_prune.cli.main import app
from lnr_prune.cli.texts import cut, packed, predicted, reads_on
from lnr_prune.errors import CalibrationError
from lnr_prune.runtime.optional import import_torchvision
from tests.helpers.models import mlp


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "TERM": "dumb"})


def table(**columns: Any) -> Any:
    return pytest.importorskip("pandas").DataFrame(columns)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_a_table_gives_its_columns(suffix: str) -> None:
    frame = table(age=[1, 2, 3], height=[0.1, 0.2, 0.3], old=[True, False, True], target=[7, 8, 9])
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
        frame.to_parquet("t.parquet")
    else:
        frame.to_csv(f"t.{suffix}", sep="," if suffix == "csv" else "\t")  # with a column of row numbers

    def read(**options: Any) -> torch.Tensor:
        (batch,) = batches(Source(Path(f"t.{suffix}"), **options))
        assert batch.dtype == torch.float32
        return batch[batch[:, 0].argsort()]

    everything = torch.tensor([[1, 0.1, 1, 7], [2, 0.2, 0, 8], [3, 0.3, 1, 9]])
    torch.testing.assert_close(read(), everything)
    torch.testing.assert_close(read(drop=("target",)), everything[:, :3])
    torch.testing.assert_close(read(columns=("height", "age")), everything[:, [1, 0]])
    assert len(read(samples=2)) == 2


def test_tables_that_cannot_be_read_say_what_to_do() -> None:
    table(x=[1.0, None], city=["Ulm", "Bonn"]).to_csv("t.csv", index=False)
    Path("empty.csv").touch()
    Path("bad.parquet").write_bytes(b"no table")
    cases: list[tuple[Source, type[Exception], str]] = [
        (Source(Path("t.csv")), CalibrationError, "column 'x' of t.csv has 1 missing values.*--drop x"),
        (Source(Path("t.csv"), drop=("x",)), CalibrationError, "column 'city' .*expected numbers.*--drop city"),
        (Source(Path("t.csv"), drop=("x", "city")), CalibrationError, "2 rows and 0 columns"),
        (Source(Path("t.csv"), drop=("citi",)), ValueError, "--drop citi: t.csv has no such column; did you mean city"),
        (Source(Path("empty.csv")), CalibrationError, "cannot read empty.csv"),
        (Source(Path("bad.parquet")), CalibrationError, "cannot read bad.parquet"),
    ]
    for source, error, message in cases:
        with pytest.raises(error, match=message):
            batches(source)


def test_a_tabular_network_from_a_table_to_a_file() -> None:
    x = np.random.default_rng(0).normal(size=(80, 3))
    table(**dict(zip("abc", x.T, strict=True)), target=np.arange(80)).to_csv("t.csv", index=False)
    Path("net.py").write_text(
        "from torch import nn\ndef net(): return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))\n"
    )
    options = ("--data", "t.csv", "--drop", "target", "--batch-size", "16", "--device", "cpu", "--seed", "3")
    done = run("prune", "net.py:net", *options, "--keep", "0.5", "--out", "m.safetensors", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["report"]["groups"][0]["kept"] == 4
    for command in (("inspect", "net.py:net"), ("bench", "net.py:net", "m.safetensors", "--rounds", "1")):
        done = run(*command, *options, "--json")
        assert done.exit_code == 0, done.output
    forgot = run("prune", "net.py:net", "--data", "t.csv", "--keep", "0.5", "--dry-run")
    assert forgot.exit_code == 1
    assert "does not accept inputs of shape (32, 4)" in forgot.output


def picture(width: int, height: int) -> Any:
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return image.fromarray(pixels).resize((width, height))


SIZES = [(300, 200), (100, 333), (224, 224)]


@pytest.mark.parametrize("size", SIZES)
def test_images_look_as_torchvision_makes_them(size: tuple[int, int]) -> None:
    weights: Any = import_torchvision().models.ResNet18_Weights
    look, origin = look_of(mlp(2, 2), "torchvision:resnet18")
    assert (look.interpolation, origin) == ("bilinear", "torchvision")
    image = picture(*size)
    torch.testing.assert_close(look.of(image), weights.DEFAULT.transforms()(image), rtol=0, atol=1e-6)
    newer = look_of(mlp(2, 2), "torchvision:resnet50")[0]
    assert newer != look_of(mlp(2, 2), "torchvision:resnet50", "ResNet50_Weights.IMAGENET1K_V1")[0] == look


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0", "vit_tiny_patch16_224"])
def test_images_look_as_timm_makes_them(name: str, size: tuple[int, int]) -> None:
    timm = pytest.importorskip("timm")
    import_torchvision()
    model = nn.Module()
    model.pretrained_cfg = timm.models.get_pretrained_cfg(name).to_dict()
    look, origin = look_of(model, "my_models.py:net")
    assert origin == "timm"
    config = timm.data.resolve_data_config({}, model=model)
    transform = timm.data.create_transform(**config, is_training=False)
    image = picture(*size)
    torch.testing.assert_close(look.of(image), transform(image), rtol=0, atol=1e-6)


def test_how_images_look_is_told_and_can_be_changed(folder: Path) -> None:
    (folder / "photos").mkdir()
    for index in range(4):
        picture(40, 30).save(folder / "photos" / f"{index}.png")
    Path("net.py").write_text(
        "from torch import nn\ndef net(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))\n"
    )
    options = ("--data", "photos", "--image-size", "16", "--crop", "0.9", "--interpolation", "box", "--mean", "0,0,0")
    done = run("prune", "net.py:net", *options, "--keep", "0.5", "--dry-run")
    assert done.exit_code == 0, done.output
    assert "images: 16 x 16, crop 0.9, box, mean 0 0 0, std 0.229 0.224 0.225 (default)" in done.stderr
    assert run("inspect", "net.py:net", "--data", "photos").exit_code == 0
    for wrong, message in (
        (("--crop", "2"), "--crop must be in (0, 1]"),
        (("--interpolation", "best"), "one of nearest"),
    ):
        done = run("prune", "net.py:net", "--data", "photos", *wrong, "--keep", "0.5", "--dry-run")
        assert done.exit_code == 2
        assert message in done.stderr


def test_grey_images_and_squashed_ones() -> None:
    image = picture(60, 20)
    assert Look((8, 8), mean=(0.5,), std=(0.5,)).of(image).shape == (1, 8, 8)
    whole = Look((10, 20), mean=(0.0,), std=(1.0,), squash=True).of(image)
    expected = torch.from_numpy(np.array(image.convert("L").resize((20, 10), 3))) / 255
    torch.testing.assert_close(whole[0], expected)


class Words:
    """A tokenizer: a letter is a token."""

    eos_token_id: int | None = 0

    def __call__(self, line: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - 96 for letter in line]}


def test_packed_texts_have_no_padding() -> None:
    lines = ["abc", "d", "efghi", "j"]
    assert packed(Words(), lines, 4, 9)["input_ids"].tolist() == [[1, 2, 3, 0], [4, 0, 5, 6], [7, 8, 9, 0]]
    assert packed(Words(), lines, 4, 2)["input_ids"].tolist() == [[1, 2, 3, 0], [4, 0, 5, 6]]
    assert packed(Words(), ["ab"], 8, 2)["input_ids"].tolist() == [[1, 2, 0]]
    endless = Words()
    endless.eos_token_id = None
    assert packed(endless, lines, 5, 9)["input_ids"].tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
    assert reads_on(type("LlamaForCausalLM", (nn.Module,), {})())
    assert not reads_on(mlp(2, 2))


def test_perplexities_and_divergences_are_those_of_the_tokens() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6)).requires_grad_(False) for _ in range(2)]

    class Named(nn.Module):
        def __init__(self, inside: nn.Module) -> None:
            super().__init__()
            self.inside = inside

        def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
            return {"logits": self.inside(input_ids), "hidden": input_ids.double()}

    ids = torch.randint(6, (5, 200))
    found = predicted(Named(models[0]), Named(models[1]), [{"input_ids": some} for some in ids.split(2)])
    p, q = (model(ids[:, :-1]).double().log_softmax(-1).flatten(0, 1) for model in models)
    losses = [nn.functional.nll_loss(each, ids[:, 1:].flatten()) for each in (p, q)]
    assert found.tokens == 5 * 199
    assert [found.before, found.after] == pytest.approx([float(loss.exp()) for loss in losses])
    assert found.divergence == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()))
    assert "on 995 tokens" in str(found)


def test_the_last_lines_judge() -> None:
    lines = [str(number) for number in range(25)]
    assert cut(lines) == (lines[:23], lines[23:])
    assert cut(lines[:5]) == (lines[:5], [])


def test_a_language_model_goes_from_folder_to_folder(folder: Path) -> None:
    import_torchvision()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers", exc_type=ImportError)
    parts: Any = pytest.importorskip("tokenizers")
    torch.manual_seed(0)
    words = {word: number for number, word in enumerate(["<s>", "</s>", "a", "line", "of", "text"])}
    plain = parts.Tokenizer(parts.models.WordLevel(words, unk_token="<s>"))
    plain.pre_tokenizer = parts.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>", bos_token="<s>")
    settings = transformers.LlamaConfig(
        vocab_size=6, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(settings).save_pretrained("whole")
    tokenizer.save_pretrained("whole")
    (folder / "text.txt").write_text("a line of text\nof a text\nline\n" * 40, encoding="utf-8")
    command = ["prune", "hf:whole", "--data", "text.txt", "--tokens", "8", "--batch-size", "4", "--keep", "0.5"]
    result = run(*command, "--out", "small", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["text"]["before"] > 1
    assert said["text"]["after"] > 1
    assert said["text"]["tokens"] == 5 * 7
    small = transformers.AutoModelForCausalLM.from_pretrained("small")
    assert small.config.use_cache
    assert small.config.intermediate_size == 6
    assert transformers.AutoTokenizer.from_pretrained("small")("a text")["input_ids"] == [2, 5]
    assert "--test is for packed texts" in run(*command, "--dry-run", "--pad", "--test", "text.txt").output
    for out, message in (("whole", "is the folder of the model"), ("small", "expected a new or an empty folder")):
        result = run(*command, "--out", out)
        assert result.exit_code == 2
        assert message in result.output

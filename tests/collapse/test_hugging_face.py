"""Hugging Face folders: settings stay true, both kinds give the same outputs, and hostile ones are refused."""

import json
import os
import pickle
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lnr_prune as lnr
from lnr_prune.collapse.hugging_face import settings as found
from lnr_prune.collapse.hugging_face.settings import described
from lnr_prune.collapse.masks import masked_weights
from lnr_prune.collapse.plan import plan_for
from lnr_prune.collapse.remove import remove
from lnr_prune.errors import LnrPruneError, PlanError
from lnr_prune.graph.groups import find_groups
from lnr_prune.graph.module import named_tensors
from lnr_prune.runtime.optional import import_torchvision
from tests.helpers.models import mlp


@dataclass
class Settings:
    """What a model is made from; ``heads`` and ``each`` are as large, but only one of them counts what leaves."""

    width: int = 6
    inner: int | None = None
    each: int = 3
    heads: int = 3
    depth: int = 2


class Layer(nn.Module):
    def __init__(self, config: Settings) -> None:
        super().__init__()
        self.config, self.size, self.each = config, config.each * config.heads, config.each
        inner = config.inner or 4 * config.width
        self.mix, self.out = nn.Linear(config.width, self.size), nn.Linear(self.size, config.width)
        self.up, self.down = nn.Linear(config.width, inner), nn.Linear(inner, config.width)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.mix(x).unflatten(-1, (-1, self.each)).softmax(-1)
        x = x + self.out(heads.flatten(-2))
        return x + self.down(self.up(x).relu())


class Made(nn.Module):
    def __init__(self, config: Settings) -> None:
        super().__init__()
        self.config, self.layers = config, nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.head = nn.Linear(config.width, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))


def made(**settings: int) -> Any:
    torch.manual_seed(0)
    return Made(Settings(**settings))


@pytest.mark.parametrize("into", ["copy", "model"])
def test_settings_that_a_model_was_made_from_are_true_afterwards_and_still_shared(into: str, tmp_path: Path) -> None:
    model = made()
    before = model.config
    pruned = lnr.prune(model, [X], lnr.Keep(0.67), into=into)
    small: Any = pruned.model
    assert vars(small.config) == {"width": 6, "inner": 16, "each": 3, "heads": 2, "depth": 2}
    assert all(layer.config is small.config for layer in small.layers)
    assert {layer.size for layer in small.layers} == {6}
    assert vars(before) == vars(Settings())
    again = Made(small.config)
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(X), small(X))
    pruned.save(tmp_path / "m.safetensors")
    loaded: Any = lnr.load(tmp_path / "m.safetensors", made())
    assert loaded.config == small.config
    assert all(layer.config is loaded.config for layer in loaded.layers)
    with pytest.raises(PlanError, match=r"attribute 'config.inner' is 24, expected None"):
        lnr.load(tmp_path / "m.safetensors", made(inner=24))


def test_what_is_true_for_some_layers_only_stays() -> None:
    small: Any = lnr.prune(made(), [X], lnr.Keep({"layers.0.up": 10, "layers.1.up": 12, "layers.0.mix": 2})).model
    assert small.config == Settings()
    small = lnr.prune(made(), [X], lnr.Keep({"layers.0.up": 10, "layers.1.up": 12, **mixed(2)})).model
    assert small.config == Settings(heads=2)


def mixed(heads: int) -> dict[str, int]:
    return {f"layers.{i}.mix": heads for i in range(2)}


def test_settings_that_change_a_number_or_no_model_accepts_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scaled(Made):
        def __init__(self, config: Settings) -> None:
            super().__init__(config)
            self.scale = (config.inner or 24) ** -0.5

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scale

    small: Any = lnr.prune(Scaled(Settings()), [X], lnr.Keep(0.67)).model
    assert small.config == Settings(heads=2)

    def refuses(*_: Any) -> nn.Module:
        raise OSError

    monkeypatch.setattr(found, "made_from", refuses)
    assert lnr.prune(made(), [X], lnr.Keep(0.67)).model.config == Settings()


def test_a_plan_whose_settings_do_not_pass_gives_way_to_the_next_one() -> None:
    model = made(each=3, heads=3)
    graph = find_groups(model, (X,), {})
    supports = {group: torch.arange(group.size) > 0 for group in graph.groups if group.name.endswith("mix")}
    plan = plan_for(model, supports)
    better = list(described(model, plan, supports))
    assert [each.attributes[""] for each in better] == [{"config.each": 2}, {"config.heads": 2}]
    masked = masked_weights(supports, named_tensors(model))
    small, followed = remove(model, model, plan, masked, ((X,), {}), better=better, training=False)
    assert followed is better[1]
    assert vars(small)["config"].heads == 2
    other = made()
    small, followed = remove(other, other, plan, masked, ((X,), {}), better=better[:1], training=False)
    assert followed is plan
    assert vars(small)["config"] == Settings()


# transformers


@pytest.fixture(scope="module")
def transformers() -> Any:
    import_torchvision()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package: Any = pytest.importorskip("transformers", exc_type=ImportError)
        package.utils.logging.set_verbosity_error()
        package.utils.logging.disable_progress_bar()
    return package


SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
GROUPED = {**SIZES, "vocab_size": 50, "num_key_value_heads": 2, "head_dim": 8, "use_cache": False}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
FAMILIES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "bert": ("BertConfig", "BertForSequenceClassification", {**SIZES, "vocab_size": 50}, "intermediate.dense"),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50}, "mlp.c_fc"),
    "llama": ("LlamaConfig", "LlamaForCausalLM", GROUPED, "mlp.gate_proj"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**GROUPED, "tie_word_embeddings": True}, "mlp.gate_proj"),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", GROUPED, "mlp.gate_proj"),
    "t5": ("T5Config", "T5ForConditionalGeneration", {**T5, "vocab_size": 50}, "DenseReluDense.wi"),
    "vit": ("ViTConfig", "ViTForImageClassification", {**SIZES, "image_size": 16, "patch_size": 8}, "mlp.fc1"),
}
"""Configuration, model, sizes, and the layers that widen; GPT-2's settings leave their width to the model."""
TRUE = {"bert": "intermediate_size", "gpt2": "n_inner", "t5": "d_ff", "vit": "intermediate_size"}


def family(package: Any, name: str) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    settings, kind, sizes, _ = FAMILIES[name]
    own = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} if "vocab_size" in sizes else {}
    model = getattr(package, kind)(getattr(package, settings)(**sizes, **own)).eval()
    tokens = torch.randint(3, 50, (8, 7))
    if name == "vit":
        return model, {"pixel_values": torch.randn(8, 3, 16, 16)}
    return model, {"input_ids": tokens, **({"decoder_input_ids": tokens[:, :4]} if name == "t5" else {})}


def wide(model: nn.Module, name: str) -> list[str]:
    return [layer for layer, _ in model.named_modules() if layer.endswith(FAMILIES[name][3])]


def answers(model: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Outputs, and what is generated with and without a cache."""
    with torch.no_grad():
        out = [model(**inputs).logits]
    if model.can_generate():
        tokens = inputs["input_ids"][:2]
        for cache in (True, False):
            some = {"max_new_tokens": 4, "do_sample": False, "use_cache": cache}
            out.append(model.generate(tokens, attention_mask=torch.ones_like(tokens), **some))
    return out


def same(model: Any, other: Any, inputs: Mapping[str, Tensor]) -> bool:
    return all(map(torch.equal, answers(model, inputs), answers(other, inputs)))


@pytest.mark.parametrize("name", FAMILIES)
def test_where_widths_are_equal_plain_transformers_loads_the_folder(
    name: str, transformers: Any, tmp_path: Path
) -> None:
    model, inputs = family(transformers, name)
    grouped = name in ("llama", "qwen3", "gemma")  # their settings can say all that leaves
    keep = 0.5 if grouped else dict.fromkeys(wide(model, name), 20)
    pruned = lnr.prune(model, [inputs], lnr.Keep(keep))
    changed = {"intermediate_size": 20, "num_attention_heads": 2, "num_key_value_heads": 1} if grouped else {}
    small: Any = pruned.model
    for entry, value in (changed or {TRUE[name]: 20}).items():
        assert getattr(small.config, entry) == value
        assert getattr(model.config, entry) != value
    if grouped:
        assert small.config is small.model.layers[0].self_attn.config
        assert small.model.layers[0].mlp.intermediate_size == 20
    pruned.save_pretrained(tmp_path)
    plain = type(small).from_pretrained(tmp_path)
    ours: Any = lnr.from_pretrained(tmp_path)
    assert same(plain, small, inputs)
    assert same(ours, small, inputs)
    assert not any(module.training for module in ours.modules())


@pytest.mark.parametrize("name", FAMILIES)
def test_where_they_are_not_the_plan_lies_beside_the_weights(
    name: str, transformers: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, inputs = family(transformers, name)
    keep = {layer: 16 + 4 * index for index, layer in enumerate(wide(model, name))}
    pruned = lnr.prune(model, [inputs], lnr.Keep(keep))
    small: Any = pruned.model
    pruned.save_pretrained(tmp_path)
    assert "load it with lnr_prune.from_pretrained" in caplog.text
    ours: Any = lnr.from_pretrained(tmp_path)
    assert same(ours, small, inputs)
    assert type(ours) is type(small)
    assert not any(module.training for module in ours.modules())
    assert ours.config.to_dict() == {**small.config.to_dict(), "architectures": [FAMILIES[name][1]], "dtype": "float32"}
    assert lnr.load_plan(tmp_path / "model.safetensors") == pruned.plan
    with pytest.raises(RuntimeError, match="mismatch"):
        type(small).from_pretrained(tmp_path)


class Tokenizer:
    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")


@pytest.fixture(scope="module")
def folders(transformers: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, lnr.Pruned]]:
    """An ordinary folder, and one with a plan."""
    made = {}
    for kind, keep in (("ordinary", 0.5), ("planned", {"model.layers.0.mlp.gate_proj": 16})):
        model, inputs = family(transformers, "llama")
        pruned = lnr.prune(model, [inputs], lnr.Keep(keep))
        folder = tmp_path_factory.mktemp("folders") / kind / "new"
        pruned.save_pretrained(folder, Tokenizer())
        made[kind] = folder, pruned
    return made


def copied(folder: Path, to: Path) -> Path:
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        entries = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({name: value for name, value in entries.items() if value is not ...}))

    return change


def file(name: str, content: bytes | None) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink() if content is None else (folder / name).write_bytes(content)


def weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return changed


class Trap:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("echo executed > executed",)


DAMAGES: list[tuple[str, Callable[[Path], object], str]] = [
    ("both", file("config.json", None), "config.json"),
    ("both", file("config.json", b"{"), "config.json: its record is not JSON"),
    ("both", file("config.json", b"\xff"), "config.json: it is not JSON"),
    ("both", file("config.json", b"[1]"), "config.json: it is a list of 1 entries, expected an object"),
    ("both", config(architectures=["os"]), r"config.json: its architecture is 'os', which is not a model of"),
    ("both", config(architectures=["PreTrainedModel"]), "PreTrainedModel"),
    ("both", config(architectures=...), "its architecture is None"),
    ("both", config(architectures="LlamaForCausalLM"), "its architecture is None"),
    ("both", config(model_type=3), "its model_type is 3, that of LlamaForCausalLM is 'llama'"),
    ("both", config(model_type="bert"), "its model_type is 'bert', that of LlamaForCausalLM is 'llama'"),
    ("both", config(hidden_size="wide"), "transformers does not accept its entries"),
    ("both", config(auto_map={"AutoModel": "code.Model"}), "an entry 'auto_map', which stands for code"),
    ("both", config(rope_parameters={"_attn_implementation": "hub/kernel"}), "'_attn_implementation', which stands"),
    ("both", config(quantization_config={"quant_method": "gptq"}), "an entry 'quantization_config'"),
    ("both", file("model.safetensors", b"no tensors"), "it is not a safetensors file"),
    ("both", file("generation_config.json", b"[]"), "generation_config.json: it is a list of 0 entries"),
    ("both", config(num_hidden_layers=3), "hold .* values: some are missing|not of the architecture"),
    ("both", config(vocab_size=2**40), "hold .* values: some are missing|not of the architecture"),
    ("ordinary", config(intermediate_size=19), "mismatch"),
    ("ordinary", config(num_hidden_layers=1), "its tensors do not fit its settings: unexpected"),
    ("ordinary", file("model.safetensors", None), "hold 0 values"),
    ("ordinary", weights(lambda t: t.pop("model.norm.weight")), "hold .* values: some are missing"),
    ("ordinary", weights(lambda t: t.update(x=t.pop("model.norm.weight"))), "its tensors do not fit its settings: "),
    ("planned", weights(lambda t: None), "its tensors do not fit|hold .* values"),  # without the plan
    ("planned", config(intermediate_size=41), "not of the architecture that the plan was made for"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [(kind, *rest) for which, *rest in DAMAGES for kind in ("ordinary", "planned") if which in ("both", kind)],
)
def test_damaged_and_hostile_folders_are_clear_errors(
    kind: str, damage: Callable[[Path], object], message: str, folders: Any, tmp_path: Path
) -> None:
    folder = copied(folders[kind][0], tmp_path)
    damage(folder)
    with pytest.raises((PlanError, OSError), match=message):
        lnr.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["ordinary", "planned"])
def test_nothing_in_a_folder_is_executed(kind: str, folders: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    folder, pruned = copied(folders[kind][0], tmp_path), folders[kind][1]
    assert (folder / "tokenizer.json").read_text() == "{}"
    for name in ("pytorch_model.bin", "model.pt", "adapter_model.bin"):
        (folder / name).write_bytes(pickle.dumps(Trap()))
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    (folder / "modeling_llama.py").write_text("open('executed', 'w')")
    ours, tokens = lnr.from_pretrained(folder), torch.randint(3, 50, (2, 5))
    assert torch.equal(ours(tokens).logits, pruned.model(tokens).logits)
    assert not (folder / "executed").exists()


def test_weights_in_several_files_and_arguments_of_the_class(transformers: Any, tmp_path: Path) -> None:
    model, inputs = family(transformers, "llama")
    model.save_pretrained(tmp_path / "llama", max_shard_size="20kB")
    assert len(list((tmp_path / "llama").glob("*.safetensors"))) > 1
    assert same(lnr.from_pretrained(tmp_path / "llama"), model, inputs)
    bert = transformers.BertModel(transformers.BertConfig(**SIZES, vocab_size=50), add_pooling_layer=False).eval()
    kinds: list[Any] = [20, {"encoder.layer.0.intermediate.dense": 20}]
    for number, keep in enumerate(kinds):
        pruned = lnr.prune(bert, [inputs["input_ids"]], lnr.Keep(keep))
        pruned.save_pretrained(tmp_path / f"bert{number}")
        with pytest.raises(PlanError, match=r"=False$|not of the architecture"):
            lnr.from_pretrained(tmp_path / f"bert{number}")
        ours: Any = lnr.from_pretrained(tmp_path / f"bert{number}", add_pooling_layer=False)
        assert torch.equal(ours(**inputs)[0], pruned.model(**inputs)[0])


def test_a_model_that_was_pruned_twice(folders: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, tokens = folders["planned"][1], torch.randint(3, 50, (8, 7))
    second = lnr.prune(first.model, [tokens], lnr.Keep({"model.layers.0.mlp.gate_proj": 8}))
    with pytest.raises(PlanError, match=r"with the plan of both: .*first.plan.then\(second.plan\)"):
        second.save_pretrained(tmp_path)
    joint = replace(second, plan=first.plan.then(second.plan))
    joint.save_pretrained(tmp_path)
    assert torch.equal(lnr.from_pretrained(tmp_path)(tokens).logits, second.model(tokens).logits)


def test_only_models_of_transformers_have_folders(tmp_path: Path) -> None:
    pruned = lnr.prune(mlp(6, 8, 3), [X], lnr.Keep(0.5))
    with pytest.raises(LnrPruneError, match=r"Sequential is not a model of transformers.*use pruned.save\(file\)"):
        pruned.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()

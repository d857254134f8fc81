"""Pruned models in other people's tools: zoos, trainers, mixed precision, dispatch, compilation."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lnr_prune as lnr
from lnr_prune.graph.module import named_tensors
from lnr_prune.runtime.optional import import_torchvision
from tests.helpers import held, models, patterns
from tests.helpers.models import randomised


def drawn(*shape: int) -> Tensor:
    """The same numbers, whatever was drawn before."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


X = drawn(256, 2, 12, 12)
LABELS = X.mean((2, 3)).argmax(1) + 2 * (X[:, 0].std((1, 2)) > 1)


def package(name: str) -> ModuleType:
    """A package that the test extra does not bring; many of them import torchvision."""
    import_torchvision()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their own
        return pytest.importorskip(name, exc_type=ImportError)


def small_cnn() -> nn.Module:
    torch.manual_seed(0)
    return lnr.prune(randomised(models.cnn()), [X], lnr.Keep(0.5)).model


def loss_of(model: nn.Module) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(model.eval()(X), LABELS))


# zoos


def resnet() -> tuple[nn.Module, Any]:
    return import_torchvision().models.resnet18(num_classes=10), torch.randn(8, 3, 64, 64)


def mobilenet() -> tuple[nn.Module, Any]:
    return import_torchvision().models.mobilenet_v3_small(num_classes=10), torch.randn(8, 3, 64, 64)


def vision_transformer() -> tuple[nn.Module, Any]:
    make = import_torchvision().models.VisionTransformer
    model = make(image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=5)
    nn.init.normal_(model.heads.head.weight)
    return model, torch.randn(8, 3, 32, 32)


def of_timm(name: str, **options: Any) -> tuple[nn.Module, Any]:
    model = package("timm").create_model(name, num_classes=10, **options)
    return model, torch.randn(4, *model.default_cfg["input_size"])


def of_huggingface(config: str, model: str, *, decoder: bool = False, **options: Any) -> tuple[nn.Module, Any]:
    transformers = package("transformers")
    tokens = torch.randint(3, 98, (8, 9))
    inputs = {"input_ids": tokens, **({"decoder_input_ids": tokens[:, :5]} if decoder else {})}
    return getattr(transformers, model)(getattr(transformers, config)(vocab_size=99, **options)), inputs


SIZES: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
ZOO: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "resnet18": resnet,
    "mobilenet_v3": mobilenet,
    "vision_transformer": vision_transformer,
    "timm_vit": partial(of_timm, "vit_tiny_patch16_224", depth=2),
    "timm_convnext": partial(of_timm, "convnext_atto"),
    "timm_swin": partial(of_timm, "swin_tiny_patch4_window7_224", depths=(2, 2), num_heads=(3, 6)),
    "bert": partial(of_huggingface, "BertConfig", "BertForSequenceClassification", **SIZES),
    "gpt2": partial(of_huggingface, "GPT2Config", "GPT2LMHeadModel", n_embd=48, n_layer=2, n_head=4, use_cache=False),
    "llama": partial(
        of_huggingface, "LlamaConfig", "LlamaForCausalLM", **SIZES, num_key_value_heads=2, use_cache=False
    ),
    "falcon": partial(
        of_huggingface, "FalconConfig", "FalconForCausalLM", hidden_size=48, num_hidden_layers=2,
        num_attention_heads=4, use_cache=False,
    ),
    "mixtral": partial(
        of_huggingface, "MixtralConfig", "MixtralForCausalLM", **SIZES, num_key_value_heads=2, num_local_experts=4,
        use_cache=False,
    ),
    "gpt_oss": partial(
        of_huggingface, "GptOssConfig", "GptOssForCausalLM", **SIZES, num_key_value_heads=2, head_dim=12,
        num_local_experts=4, num_experts_per_tok=2, use_cache=False,
    ),
    "t5": partial(
        of_huggingface, "T5Config", "T5ForConditionalGeneration", decoder=True, d_model=48, d_kv=12, d_ff=96,
        num_layers=2, num_heads=4, use_cache=False,
    ),
}  # fmt: skip


def outputs(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        out = model.eval()(**inputs) if isinstance(inputs, Mapping) else model.eval()(inputs)
    return out if isinstance(out, Tensor) else out.logits


@pytest.mark.parametrize("name", ["falcon", "mixtral", "gpt_oss"])
def test_most_of_a_mixture_is_in_groups(name: str) -> None:
    model, inputs = ZOO[name]()
    found = lnr.inspect(model, inputs)
    assert found.reachable > 0.5
    router = [reason for layer, reason in found.frozen.items() if layer.endswith(("mlp.gate", "mlp.router"))]
    assert all("chosen by their number" in reason for reason in router)
    assert bool(router) == (name != "falcon")


@pytest.mark.parametrize("name", ZOO)
def test_models_of_the_zoos_survive_a_file(name: str, tmp_path: Path) -> None:
    model, inputs = ZOO[name]()
    pruned = lnr.prune(model, [inputs], lnr.Keep(0.5), selector="norm", refit=None)  # files are the matter here
    assert pruned.plan
    pruned.save(tmp_path / "m.safetensors")
    other, _ = ZOO[name]()
    loaded = lnr.load(tmp_path / "m.safetensors", other, example=inputs)
    torch.testing.assert_close(outputs(loaded, inputs), outputs(pruned.model, inputs), rtol=0, atol=0)
    torch.save(pruned.model.state_dict(), tmp_path / "m.pt")
    loaded.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True))
    lnr.save_plan(tmp_path / "plan.json", pruned.plan)
    applied = lnr.apply_plan(lnr.load_plan(tmp_path / "plan.json"), other, example=inputs)
    assert repr(applied) == repr(pruned.model)


# training


def test_a_plain_loop_lowers_the_loss() -> None:
    model = small_cnn()
    before, shapes = loss_of(model), [parameter.shape for parameter in model.parameters()]
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(10):
        for x, y in zip(X.split(64), LABELS.split(64), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model.train()(x), y).backward()
            optimizer.step()
    assert loss_of(model) < 0.9 * before
    assert [parameter.shape for parameter in model.parameters()] == shapes


def test_what_was_pruned_can_be_pruned_again() -> None:
    once = lnr.prune(randomised(models.cnn()), [X], lnr.Keep(0.75)).model
    twice = lnr.prune(once, [X], lnr.Keep(0.5))
    assert twice.report.params_after < twice.report.params_before


def test_lightning_trains_a_pruned_model(tmp_path: Path) -> None:
    lightning = package("lightning")

    class Task(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.model.parameters(), 1e-2)

    model = small_cnn()
    before = loss_of(model)
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            max_epochs=10, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(Task(model), DataLoader(TensorDataset(X, LABELS), 64))
    assert loss_of(model) < 0.9 * before


def test_the_hugging_face_trainer_trains_a_pruned_model(tmp_path: Path) -> None:
    package("accelerate")
    transformers = package("transformers")
    model, inputs = ZOO["bert"]()
    model = lnr.prune(model, [inputs], lnr.Keep(0.5)).model
    tokens = torch.randint(3, 98, (64, 9))
    data = [{"input_ids": row, "labels": (row[0] > 50).long()} for row in tokens]

    def loss() -> float:
        with torch.no_grad():
            out = model.eval()(input_ids=tokens, labels=torch.stack([row["labels"] for row in data]))
        return float(out.loss)

    before = loss()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = transformers.TrainingArguments(
            output_dir=str(tmp_path), num_train_epochs=8, per_device_train_batch_size=16, learning_rate=3e-3,
            report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        transformers.Trainer(model=model, args=settings, train_dataset=data).train()
    assert loss() < 0.8 * before


def test_timm_makes_the_whole_model_and_load_fills_the_smaller_one(tmp_path: Path) -> None:
    create, path = package("timm").create_model, tmp_path / "small.safetensors"
    model = create("test_vit", num_classes=5).eval()
    x = torch.randn(4, 3, 160, 160)
    wide = [name for name, _ in model.named_modules() if name.endswith("mlp.fc1")]
    pruned = lnr.prune(model, [x], lnr.Keep(dict.fromkeys(wide, 0.5)))
    pruned.save(path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        create("test_vit", num_classes=5, checkpoint_path=path)
    half = create("test_vit", num_classes=5, mlp_ratio=1.5, checkpoint_path=path).eval()
    for loaded in (lnr.load(path, create("test_vit", num_classes=5)).eval(), half):
        assert torch.equal(loaded(x), pruned.model(x))


# precision


PRECISION: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "mlp": (partial(models.mlp, 8, 32, 16, 4), drawn(256, 8)),
    "residual": (models.Residual, drawn(256, 3, 8, 8)),
    "heads": (held.HeldHeads, drawn(64, 5, 16)),
    "multihead": (patterns.TorchAttention, drawn(64, 5, 12)),
    "packed": (patterns.PackedAttention, drawn(64, 5, 12)),
}


@pytest.mark.parametrize("name", PRECISION)
def test_a_bfloat16_model_is_pruned_as_well_as_a_float32_one(name: str) -> None:
    """To bfloat16's 8 bits, and where activations vary as much as they are large; noise is noise otherwise."""
    make, x = PRECISION[name]
    model = randomised(make()).bfloat16()
    pruned = lnr.prune(model, [x.bfloat16()], lnr.Keep(0.75))
    single = lnr.prune(model.float(), [x.bfloat16().float()], lnr.Keep(0.75))
    assert {tensor.dtype for tensor in pruned.model.parameters()} == {torch.bfloat16}
    assert [group.kept for group in pruned.report.groups] == [group.kept for group in single.report.groups]
    assert pruned.report.error < 1.5 * single.report.error + 1e-3


@pytest.mark.parametrize("name", PRECISION)
def test_calibration_under_autocast(name: str) -> None:
    make, x = PRECISION[name]
    model = randomised(make())
    single = lnr.prune(model, [x], lnr.Keep(0.75))
    with torch.autocast("cpu", torch.bfloat16):
        pruned = lnr.prune(model, [x], lnr.Keep(0.75))
        assert pruned.model(x).dtype == model(x).dtype
    assert {tensor.dtype for tensor in pruned.model.parameters()} == {torch.float32}
    assert [group.kept for group in pruned.report.groups] == [group.kept for group in single.report.groups]
    assert pruned.report.error < 1.5 * single.report.error + 1e-3


def test_the_refit_sees_what_autocast_makes_of_the_network() -> None:
    """Both sweeps run in threads of their own, and torch keeps autocast for each thread."""
    seen: list[torch.dtype] = []

    class Seen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.dtype)
            return x.relu()

    model = nn.Sequential(nn.Linear(8, 32), Seen(), nn.Linear(32, 4))
    with torch.autocast("cpu", torch.bfloat16):
        lnr.prune(model, [torch.randn(64, 8)], lnr.Keep(0.5))
    # in the checks of the result everything is float64, which autocast leaves alone
    assert set(seen) == {torch.bfloat16, torch.float64}
    assert seen.count(torch.bfloat16) > 3


# devices and compilers


def test_a_dispatched_model_is_pruned_with_its_hooks(tmp_path: Path) -> None:
    accelerate = package("accelerate")
    model, inputs = ZOO["bert"]()
    plain = lnr.prune(model, [inputs], lnr.Keep(0.5)).model
    dispatched = accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    accelerate.hooks.add_hook_to_module(dispatched.bert, accelerate.hooks.AlignDevicesHook("cpu"))
    pruned = lnr.prune(dispatched, [inputs], lnr.Keep(0.5))
    torch.testing.assert_close(outputs(pruned.model, inputs), outputs(plain, inputs), rtol=0, atol=0)
    own = {id(tensor) for tensor in named_tensors(dispatched).values()}
    assert hasattr(pruned.model.get_submodule("bert"), "_hf_hook")
    assert not own & {id(tensor) for tensor in named_tensors(pruned.model).values()}
    pruned.save(tmp_path / "m.safetensors")
    loaded = lnr.load(tmp_path / "m.safetensors", ZOO["bert"]()[0])
    torch.testing.assert_close(outputs(loaded, inputs), outputs(plain, inputs), rtol=0, atol=0)


def test_an_offloaded_model_is_refused_by_name() -> None:
    """Its weights are not there: nothing can be read off them, and that must be said."""
    accelerate = package("accelerate")
    model, inputs = ZOO["bert"]()
    offloaded = accelerate.cpu_offload(model, torch.device("cpu"))
    with pytest.raises(lnr.LnrPruneError, match="meta"):
        lnr.prune(offloaded, [inputs], lnr.Keep(0.5))


def test_a_pruned_model_compiles_with_inductor() -> None:
    model = small_cnn()
    torch._dynamo.reset()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            compiled = torch.compile(model)(X)
        except Exception as error:
            if "compiler" not in str(error).lower():
                raise
            pytest.skip("needs a C++ compiler")
    torch.testing.assert_close(compiled, model(X), rtol=1e-4, atol=1e-4)

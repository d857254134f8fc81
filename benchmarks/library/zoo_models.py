"""The models of the zoos: random weights, nothing is downloaded."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lnr_prune.calibration.calls import Call
from lnr_prune.runtime.optional import import_torchvision


@dataclass(frozen=True)
class Zoo:
    """Names of models, and how to make one with an example call; it may know more names than it lists."""

    names: tuple[str, ...]
    make: Callable[[str], tuple[nn.Module, Call]]


TIMM = """
    vit_tiny_patch16_224 deit_tiny_distilled_patch16_224 beit_base_patch16_224 eva02_tiny_patch14_224 cait_xxs24_224
    xcit_nano_12_p16_224 levit_128s convit_tiny crossvit_9_240 pvt_v2_b0 coat_lite_tiny twins_svt_small
    swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 coatnet_pico_rw_224 maxvit_pico_rw_256 mixer_s16_224
    resmlp_12_224 gmlp_s16_224 sequencer2d_s poolformer_s12 convformer_s18 convnextv2_atto fastvit_t8
    edgenext_xx_small efficientvit_b0 efficientvit_m0 mobilevit_xxs mobilevitv2_050 mobileone_s0 ghostnet_100
    botnet26t_256 resnest14d ecaresnet26t skresnet18 res2net50_26w_4s cspresnet50 dpn68 eca_nfnet_l0
    hiera_tiny_224
"""

TEXT: dict[str, Any] = {"vocab_size": 99, "max_position_embeddings": 64, "use_cache": False}
SIZES: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
SHARED = {"num_key_value_heads": 2}  # grouped queries
TINY = {"d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}  # fmt: skip
PICTURE = {"image_size": 32, "patch_size": 8}
GPT2 = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 99, "use_cache": False}
T5 = {"d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 99, "use_cache": False}
CLIP = {"text_config": {**SIZES, "vocab_size": 99, "max_position_embeddings": 64, "eos_token_id": 98},
        "vision_config": {**SIZES, **PICTURE}, "projection_dim": 32}  # fmt: skip
WHISPER = {**TINY, "vocab_size": 99, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 64,
           "pad_token_id": 0, "use_cache": False}  # fmt: skip

# Name -> class of the configuration, class of the model, the configuration, what the model is called with.
HUGGINGFACE: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "bert": ("BertConfig", "BertForSequenceClassification", {**SIZES, **TEXT}, "tokens"),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", {**SIZES, **TEXT}, "tokens"),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2, "tokens"),
    "opt": ("OPTConfig", "OPTForCausalLM", {**SIZES, **TEXT, "ffn_dim": 96, "word_embed_proj_dim": 48}, "tokens"),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**SIZES, **TEXT, **SHARED}, "tokens"),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**SIZES, **TEXT, **SHARED, "sliding_window": 4}, "tokens"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**SIZES, **TEXT, **SHARED}, "tokens"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**SIZES, **TEXT, **SHARED, "head_dim": 16}, "tokens"),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {**SIZES, **TEXT, **SHARED, "pad_token_id": 0}, "tokens"),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**SIZES, **TEXT}, "tokens"),
    "t5": ("T5Config", "T5ForConditionalGeneration", T5, "both"),
    "bart": ("BartConfig", "BartForConditionalGeneration", {**TINY, **TEXT}, "both"),
    "whisper": ("WhisperConfig", "WhisperForConditionalGeneration", WHISPER, "speech"),
    "vit": ("ViTConfig", "ViTForImageClassification", {**SIZES, **PICTURE}, "image"),
    "clip": ("CLIPConfig", "CLIPModel", CLIP, "pair"),
}


def torchvision_models() -> Zoo:
    """Every classifier and segmentation model of torchvision."""
    models = import_torchvision().models

    def make(name: str) -> tuple[nn.Module, Call]:
        options: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        segments = name in models.list_models(module=models.segmentation)
        if segments:
            options["weights_backbone"] = None
        # the auxiliary head normalises one position an image, so that training takes at least two
        shape = (2, 3, 299, 299) if name == "inception_v3" else (1, 3, 224, 224)
        return models.get_model(name, weights=None, **options), ((torch.randn(shape),), {})

    return Zoo((*models.list_models(module=models), *models.list_models(module=models.segmentation)), make)


def timm_models() -> Zoo:
    """Classifiers of timm, one or more of every family; any other name that timm knows will do, too."""
    import_torchvision()
    timm = importlib.import_module("timm")

    def make(name: str) -> tuple[nn.Module, Call]:
        model = timm.create_model(name)
        return model, ((torch.randn(1, *model.default_cfg["input_size"]),), {})

    return Zoo(tuple(TIMM.split()), make)


def huggingface_models() -> Zoo:
    """Tiny transformers, built from their configurations."""
    import_torchvision()
    transformers = importlib.import_module("transformers")
    tokens = torch.randint(3, 98, (2, 7))
    calls: dict[str, dict[str, Any]] = {
        "tokens": {"input_ids": tokens},
        "both": {"input_ids": tokens, "decoder_input_ids": tokens[:, :5]},
        "speech": {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": tokens},
        "image": {"pixel_values": torch.randn(2, 3, 32, 32)},
        "pair": {"input_ids": tokens, "pixel_values": torch.randn(2, 3, 32, 32)},
    }

    def make(name: str) -> tuple[nn.Module, Call]:
        config, model, options, call = HUGGINGFACE[name]
        return getattr(transformers, model)(getattr(transformers, config)(**options)), ((), calls[call])

    return Zoo(tuple(HUGGINGFACE), make)


SETS: dict[str, Callable[[], Zoo]] = {
    "torchvision": torchvision_models,
    "timm": timm_models,
    "huggingface": huggingface_models,
}

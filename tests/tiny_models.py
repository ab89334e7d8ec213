"""Small random models of diffusers and transformers, saved to folders as their makers save them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

WORDS = ("a", "the", "cat", "dog", "red", "blue", "fox", "runs", "through", "snow", "at", "night",
         "video", "of")  # fmt: skip


def image_vae(seed: int = 0, **settings: Any) -> Any:
    """AutoencoderKL: 4 latent channels, 8 px a cell, as Stable Diffusion's."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    known = {
        "block_out_channels": (8, 8, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "norm_num_groups": 4,
        "force_upcast": False,
    }
    return AutoencoderKL(**{**known, **settings})


def _wan() -> Any:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.0, 2.0, 0.5, 4.0],
    )


def _ltx() -> Any:
    from diffusers import AutoencoderKLLTXVideo

    model = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        scaling_factor=0.5,
    )
    model.latents_mean.copy_(torch.arange(8) / 10)
    model.latents_std.copy_(1 + torch.arange(8) / 10)
    return model


def _cogvideox() -> Any:
    from diffusers import AutoencoderKLCogVideoX

    return AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2
    )


def _hunyuan() -> Any:
    from diffusers import AutoencoderKLHunyuanVideo

    return AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2
    )


def _mochi() -> Any:
    from diffusers import AutoencoderKLMochi

    return AutoencoderKLMochi(
        latent_channels=12,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )


def _cosmos() -> Any:
    from diffusers import AutoencoderKLCosmos

    return AutoencoderKLCosmos(
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        num_layers=1,
        attention_resolutions=(4,),
        resolution=64,
    )


VIDEO_VAES: dict[str, Callable[[], Any]] = {
    "wan": _wan,
    "ltx": _ltx,
    "cogvideox": _cogvideox,
    "hunyuan": _hunyuan,
    "mochi": _mochi,
    "cosmos": _cosmos,
}


def video_vae(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return VIDEO_VAES[name]()


def clip_model(seed: int = 0) -> Any:
    """A whole CLIP, image and text tower: 4 x 4 patches, width 32."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
        "projection_dim": 24,
        "hidden_act": "gelu",
    }
    text = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 50,
        "projection_dim": 24,
    }
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=24))
    return _with_lively_norms(model)


def siglip_model(seed: int = 0) -> Any:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(seed)
    config = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    return _with_lively_norms(SiglipVisionModel(config))


def dino_model(seed: int = 0) -> Any:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    torch.manual_seed(seed)
    config = Dinov2WithRegistersConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        num_register_tokens=4,
    )
    return _with_lively_norms(Dinov2WithRegistersModel(config))


def _with_lively_norms(model: Any) -> Any:
    """Give norms weights that are not 1 and 0, so that leaving one out is seen."""
    for name, parameter in model.named_parameters():
        if "norm" in name or "layrnorm" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def save_text_encoder(folder: Path, seed: int = 0, dim: int = 32) -> Any:
    """Save a T5 encoder and a tokenizer that ends a caption with </s>; return the model."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed)
    tokenizer = _tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=dim,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    model = T5EncoderModel(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

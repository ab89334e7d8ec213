"""Small random models of diffusers and transformers, saved to folders as their makers save them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

WORDS = ("a", "the", "cat", "dog", "red", "blue", "fox", "runs", "through", "snow", "at", "night",
         "video", "of")  # fmt: skip


_DOWN, _UP = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
_IMAGE = {"block_out_channels": (8, 8, 16, 16), "down_block_types": _DOWN, "up_block_types": _UP}
_EIGHTS = {"block_out_channels": (8,) * 4, "layers_per_block": 1, "norm_num_groups": 2}
_MEANS = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.0, 2.0, 0.5, 4.0]}
_WAN = {"base_dim": 8, "z_dim": 4, "dim_mult": [1] * 4, "num_res_blocks": 1, **_MEANS}
_HUNYUAN_15 = {
    "latent_channels": 4,
    "block_out_channels": (8,) * 4,
    "layers_per_block": 1,
    "spatial_compression_ratio": 8,
}
_LTX = {"latent_channels": 8, "block_out_channels": (8,) * 4, "layers_per_block": (1,) * 5}
VAES: dict[str, dict[str, Any]] = {
    "AsymmetricAutoencoderKL": {
        "down_block_types": _DOWN,
        "down_block_out_channels": (32,) * 4,
        "up_block_types": _UP,
        "up_block_out_channels": (32,) * 4,
        "norm_num_groups": 4,
    },
    "AutoencoderDC": {
        "latent_channels": 4,
        "attention_head_dim": 4,
        "encoder_block_out_channels": (8,) * 4,
        "decoder_block_out_channels": (8,) * 4,
        "encoder_layers_per_block": (1,) * 4,
        "decoder_layers_per_block": (1,) * 4,
        "encoder_qkv_multiscales": ((),) * 4,
        "decoder_qkv_multiscales": ((),) * 4,
        "scaling_factor": 0.41407,
    },
    "AutoencoderKL": {**_IMAGE, "norm_num_groups": 4, "force_upcast": False},
    "AutoencoderKLAllegro": {**_EIGHTS, "latent_channels": 4, "sample_size": 32},
    "AutoencoderKLCogVideoX": {**_EIGHTS, "latent_channels": 4},
    "AutoencoderKLCosmos": {
        "encoder_block_out_channels": (8,) * 4,
        "decode_block_out_channels": (8,) * 4,
        "num_layers": 1,
        "attention_resolutions": (4,),
        "resolution": 64,
    },
    "AutoencoderKLFlux2": {**_IMAGE, "norm_num_groups": 4, "latent_channels": 4},
    "AutoencoderKLHunyuanImage": {
        **_HUNYUAN_15,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (32,) * 4,
        "sample_size": 64,
        "scaling_factor": 0.75289,
    },
    "AutoencoderKLHunyuanImageRefiner": _HUNYUAN_15,
    "AutoencoderKLHunyuanVideo": {**_EIGHTS, "latent_channels": 4},
    "AutoencoderKLHunyuanVideo15": _HUNYUAN_15,
    "AutoencoderKLKVAE": {
        "channels": 32,
        "num_enc_blocks": 1,
        "num_dec_blocks": 1,
        "z_channels": 4,
        "ch_mult": (1,) * 4,
    },
    "AutoencoderKLKVAEVideo": {
        "ch": 32,
        "ch_mult": (1,) * 4,
        "num_res_blocks": 1,
        "z_channels": 4,
    },
    "AutoencoderKLLTX2Video": {
        **_LTX,
        "decoder_block_out_channels": (8, 16, 32),
        "decoder_layers_per_block": (1,) * 4,
        "scaling_factor": 0.5,
    },
    "AutoencoderKLLTXVideo": {
        **_LTX,
        "decoder_block_out_channels": (8,) * 4,
        "decoder_layers_per_block": (1,) * 5,
        "scaling_factor": 0.5,
    },
    "AutoencoderKLMagvit": {**_EIGHTS, "latent_channels": 4},
    "AutoencoderKLMiniMaxH3": {
        **_EIGHTS,
        **_MEANS,
        "latent_channels": 4,
        "spatial_downsample_factors": (2, 2, 2, 1),
        "temporal_downsample_factors": (1, 2, 2, 1),
        "decoder_num_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_attention_head_dim": 16,
    },
    "AutoencoderKLMochi": {
        "latent_channels": 12,
        "encoder_block_out_channels": (32,) * 4,
        "decoder_block_out_channels": (32,) * 4,
        "layers_per_block": (1,) * 5,
    },
    "AutoencoderKLQwenImage": _WAN,
    "AutoencoderKLQwenImage21": {**_WAN, "decoder_base_dim": 8, "dim_mult": [1] * 5},
    "AutoencoderKLTemporalDecoder": {
        "down_block_types": _DOWN,
        "block_out_channels": (32,) * 4,
    },
    "AutoencoderKLWan": _WAN,
    "AutoencoderRAE": {
        "encoder_type": "mae",
        "encoder_hidden_size": 64,
        "encoder_patch_size": 8,
        "encoder_num_hidden_layers": 1,
        "decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 32,
        "patch_size": 8,
        "encoder_input_size": 64,
        "scaling_factor": 0.5,
    },
    "AutoencoderTiny": {
        "encoder_block_out_channels": (8,) * 4,
        "decoder_block_out_channels": (8,) * 4,
        "num_encoder_blocks": (1,) * 4,
        "num_decoder_blocks": (1,) * 4,
        "scaling_factor": 0.7,
        "shift_factor": 0.2,
    },
    "AutoencoderVidTok": {"ch": 32, "ch_mult": [1] * 4, "num_res_blocks": 1},
    "ConsistencyDecoderVAE": {
        "encoder_block_out_channels": (8,) * 4,
        "encoder_layers_per_block": 1,
        "encoder_norm_num_groups": 4,
        "decoder_block_out_channels": (32,) * 4,
        "decoder_layers_per_block": 1,
        "decoder_norm_num_groups": 8,
    },
    "Kandinsky6SRVAE": {
        "latent_channels": 4,
        "encoder_block_out_channels": (32,) * 4,
        "decoder_block_out_channels": (32,) * 4,
        "layers_per_block": 1,
    },
    "VQModel": {**_IMAGE, "norm_num_groups": 4, "latent_channels": 4, "num_vq_embeddings": 16},
}
"""Small sizes of each autoencoder of diffusers, with 8 px a latent cell, 32 of LTX's."""
VIDEO_VAES = {
    "wan": "AutoencoderKLWan",
    "ltx": "AutoencoderKLLTXVideo",
    "cogvideox": "AutoencoderKLCogVideoX",
    "hunyuan": "AutoencoderKLHunyuanVideo",
    "mochi": "AutoencoderKLMochi",
    "cosmos": "AutoencoderKLCosmos",
}


def vae(name: str, seed: int = 0, **settings: Any) -> Any:
    """An autoencoder of diffusers, its scales not 1."""
    import diffusers

    torch.manual_seed(seed)
    model = getattr(diffusers, name)(**{**VAES[name], **settings}).eval()
    if "latents_mean" in dict(model.named_buffers()):
        channels = len(model.latents_mean)
        model.latents_mean.copy_(torch.arange(channels) / 10)
        model.latents_std.copy_(1 + torch.arange(channels) / 10)
    if hasattr(model, "bn"):
        model.bn.running_mean.normal_()
        model.bn.running_var.uniform_(0.5, 2.0)
    return model


def image_vae(seed: int = 0, **settings: Any) -> Any:
    """AutoencoderKL: 4 latent channels, 8 px a cell, as Stable Diffusion's."""
    return vae("AutoencoderKL", seed, **settings)


def video_vae(name: str, seed: int = 0) -> Any:
    return vae(VIDEO_VAES[name], seed)


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
    tokenizer = plain_tokenizer()
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


def plain_tokenizer() -> Any:
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


MARKS = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer() -> Any:
    """One that knows the marks of chats, and how Qwen writes one."""
    tokenizer = plain_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS)})
    tokenizer.chat_template = CHAT
    return tokenizer


SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
MARKED = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}


def _of(model: str, config: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    return _with_lively_norms(getattr(transformers, model)(config))


def text_t5(vocabulary: int) -> Any:
    from transformers import T5Config

    config = T5Config(vocab_size=vocabulary, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return _of("T5EncoderModel", config)


def text_umt5(vocabulary: int) -> Any:
    from transformers import UMT5Config

    size = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return _of("UMT5EncoderModel", UMT5Config(vocab_size=vocabulary, **size))


def _clip_text(vocabulary: int) -> Any:
    from transformers import CLIPTextConfig

    known = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
    return CLIPTextConfig(vocab_size=vocabulary, projection_dim=24, **known, **MARKED)


def text_clip(vocabulary: int) -> Any:
    return _of("CLIPTextModel", _clip_text(vocabulary))


def text_clip_projected(vocabulary: int) -> Any:
    return _of("CLIPTextModelWithProjection", _clip_text(vocabulary))


def text_llama(vocabulary: int) -> Any:
    from transformers import LlamaConfig

    return _of("LlamaModel", LlamaConfig(vocab_size=vocabulary, **SMALL, **MARKED))


def text_gemma2(vocabulary: int) -> Any:
    from transformers import Gemma2Config

    return _of("Gemma2Model", Gemma2Config(vocab_size=vocabulary, head_dim=8, **SMALL, **MARKED))


def _gemma3(vocabulary: int) -> Any:
    from transformers import Gemma3TextConfig

    return Gemma3TextConfig(vocab_size=vocabulary, head_dim=8, **SMALL, **MARKED)


def text_gemma3(vocabulary: int) -> Any:
    return _of("Gemma3TextModel", _gemma3(vocabulary))


def whole_gemma3(vocabulary: int) -> Any:
    from transformers import Gemma3Config, SiglipVisionConfig

    known = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
    vision = SiglipVisionConfig(image_size=28, patch_size=14, **known)
    config = Gemma3Config(
        text_config=_gemma3(vocabulary).to_dict(),
        vision_config=vision.to_dict(),
        mm_tokens_per_image=1,
    )
    return _of("Gemma3ForConditionalGeneration", config)


def whole_qwen25_vl(vocabulary: int) -> Any:
    from transformers import Qwen2_5_VLConfig

    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    config = Qwen2_5_VLConfig(
        text_config={"vocab_size": vocabulary, "rope_parameters": rope, **SMALL, **MARKED},
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
        },
    )
    return _of("Qwen2_5_VLForConditionalGeneration", config)


def text_qwen3(vocabulary: int) -> Any:
    from transformers import Qwen3Config

    return _of("Qwen3Model", Qwen3Config(vocab_size=vocabulary, head_dim=8, **SMALL, **MARKED))

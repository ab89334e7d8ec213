"""OpenCLIP's own checkpoints, read into the CLIP vision model of transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from reducio_latents.autoencoders.pretrained import (
    CONFIG_FILE,
    read_config,
    renamed,
)
from reducio_latents.core.libraries import import_library
from reducio_latents.core.weight_files import load_tensors, open_tensor_file
from reducio_latents.errors import WeightsError

OPEN_CLIP_CONFIG = "open_clip_config.json"
_NAMES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
PUBLISHED_HEADS = {768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16}
"""Width of a published tower -> its heads, which weights do not show: B, L, H, g, bigG."""
_VISUAL = "visual."

_RENAMED = (
    (r"^conv1\.weight$", "vision_model.embeddings.patch_embedding.weight"),
    (r"^class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^ln_post\.", "vision_model.post_layernorm."),
    (r"^transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


def open_clip_weights(place: Path) -> Path | None:
    """Return OpenCLIP's weights at `place`, or None where it is a folder of transformers."""
    if place.is_file():
        return place
    if (place / CONFIG_FILE).is_file():
        return None
    return next((place / name for name in _NAMES if (place / name).is_file()), None)


def load_open_clip(weights: Path) -> tuple[Any, Mapping[str, Any]]:
    """Return a CLIPVisionModelWithProjection with OpenCLIP's weights, and its preprocessing.

    Sizes are read off the weights, the rest off `open_clip_config.json` beside them where there is
    one; without it, heads are those of the published width and the activation is GELU. Raises
    WeightsError for another kind of tower.
    """
    transformers = import_library("transformers")
    file = open_tensor_file(weights)
    tower = {
        key.removeprefix("module.").removeprefix(_VISUAL): file.read(key).float()
        for key in file.shapes
        if key.removeprefix("module.").startswith(_VISUAL)
    }
    beside = weights.parent
    told = (beside / OPEN_CLIP_CONFIG).is_file()
    said: Mapping[str, Any] = read_config(beside, OPEN_CLIP_CONFIG) if told else {}
    config = transformers.CLIPVisionConfig(**_sizes(tower, said.get("model_cfg", {}), weights))
    model = transformers.CLIPVisionModelWithProjection(config)
    own, found = model.state_dict(), convert_open_clip(tower)
    found |= {key: own[key] for key in own if key.endswith("position_ids")}
    load_tensors(model, found, f"{weights} (OpenCLIP's image tower)")
    return model, said.get("preprocess_cfg", {})


def convert_open_clip(tower: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the image tower's tensors (without `visual.`) under transformers' keys.

    Its attention keeps query, key and value in one matrix, one above the other; its projection is
    the transpose of a linear layer's weight.
    """
    found: dict[str, Tensor] = {}
    for key, tensor in tower.items():
        name = renamed(key, _RENAMED)
        if match := re.fullmatch(r"(.*)\.attn\.in_proj_(weight|bias)", name):
            for part, value in zip("qkv", tensor.chunk(3), strict=True):
                found[f"{match[1]}.self_attn.{part}_proj.{match[2]}"] = value
        elif name == "proj":
            found["visual_projection.weight"] = tensor.T.contiguous()
        else:
            found[name] = tensor
    return found


def _sizes(tower: Mapping[str, Tensor], said: Mapping[str, Any], where: Path) -> dict[str, Any]:
    try:
        width, _, patch, _ = tower["conv1.weight"].shape
        positions = len(tower["positional_embedding"])
        hidden = len(tower["transformer.resblocks.0.mlp.c_fc.weight"])
        projected = tower["proj"].shape[1]
    except (KeyError, ValueError, IndexError) as err:
        raise WeightsError(
            f"{where} holds no image tower of OpenCLIP's own kind ({err} is missing). Give its "
            "folder in the format of transformers."
        ) from err
    vision = said.get("vision_cfg", {})
    head_width = vision.get("head_width", 64) if said else None
    heads = width // head_width if head_width else PUBLISHED_HEADS.get(width)
    if not heads:
        raise WeightsError(
            f"{where} has width {width}, which is none of the published; put its "
            f"{OPEN_CLIP_CONFIG} beside it."
        )
    layers = {key.split(".")[2] for key in tower if key.startswith("transformer.resblocks.")}
    return {
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "patch_size": patch,
        "image_size": patch * round((positions - 1) ** 0.5),
        "projection_dim": projected,
        "hidden_act": "quick_gelu" if said.get("quick_gelu") else "gelu",
        "layer_norm_eps": 1e-5,
    }

"""Keys of an image VAE as the LDM codebase saved them, turned into those of diffusers."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from reducio_latents.autoencoders.pretrained import renamed

LDM_PREFIX = "first_stage_model."
"""Before every key of the VAE in a whole Stable Diffusion checkpoint."""

_RENAMED = (
    (r"encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
    (r"encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"decoder\.up\.(\d+)\.block\.", r"decoder.up_blocks.\1.resnets."),
    (r"decoder\.up\.(\d+)\.upsample\.", r"decoder.up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", r".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", r".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", r".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", r".mid_block.attentions.0.to_out.0."),
    (r"\.nin_shortcut\.", r".conv_shortcut."),
    (r"coder\.norm_out\.", r"coder.conv_norm_out."),
)
_LEVEL = re.compile(r"decoder\.up_blocks\.(\d+)\.")


def is_ldm_vae(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the keys are those of the LDM codebase."""
    return any(re.search(r"(^|\.)encoder\.(down\.0\.block|mid\.block_1)\.", key) for key in tensors)


def to_diffusers_keys(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the VAE's tensors under diffusers' keys; what is not the VAE's is left out.

    There the decoder's levels count from its input, here from its output, and an attention's
    projections are matrices there, convolutions of 1x1 here.
    """
    whole = any(key.startswith(LDM_PREFIX) for key in tensors)
    own = {
        key.removeprefix(LDM_PREFIX): tensor
        for key, tensor in tensors.items()
        if not whole or key.startswith(LDM_PREFIX)
    }
    found = {renamed(key, _RENAMED): tensor for key, tensor in own.items()}
    levels = 1 + max((int(m[1]) for key in found if (m := _LEVEL.match(key))), default=0)
    turned = {_turned(key, levels): tensor for key, tensor in found.items()}
    return {
        key: tensor.flatten(1) if ".attentions." in key and tensor.ndim == 4 else tensor
        for key, tensor in turned.items()
    }


def _turned(key: str, levels: int) -> str:
    return _LEVEL.sub(lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}.", key)

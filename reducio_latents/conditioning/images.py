"""What encodes the content image: a model of transformers into patch tokens that are not pooled,
an autoencoder of diffusers into latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from reducio_latents.autoencoders.diffusers import is_of_pictures, load_diffusers
from reducio_latents.autoencoders.network import NetworkAutoencoder
from reducio_latents.autoencoders.pretrained import (
    digest_of,
    find_model,
    import_class,
    load_strictly,
    read_config,
)
from reducio_latents.autoencoders.protocol import LoadOptions
from reducio_latents.conditioning.open_clip_keys import load_open_clip, open_clip_weights
from reducio_latents.conditioning.options import ContentClipOptions, ContentLatentOptions
from reducio_latents.conditioning.precision import (
    FrozenEncoder,
    place_encoder,
    probe_pixels,
    settle,
)
from reducio_latents.core.devices import usable_device
from reducio_latents.core.values import Posterior
from reducio_latents.errors import ConfigError

_ARCHITECTURE = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size",
    "image_size", "hidden_act", "layer_norm_eps",
)  # fmt: skip
_BESIDE_VISION = (
    r"text_model\.", r"text_projection\.", r"logit_(scale|bias)", r".*position_ids$",
)  # fmt: skip


class Normalisation(NamedTuple):
    """Mean and standard deviation of each channel, of pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


CLIP_PIXELS = Normalisation(
    (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
)
SIGLIP_PIXELS = Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET_PIXELS = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class ImageCodes(NamedTuple):
    """What an encoder says of a batch of images, float32."""

    tokens: Tensor
    """(B, tokens, dim), one a patch, rows of the image from the top."""
    pooled: Tensor | None
    """(B, pooled dim); None of an encoder without a pooling head."""


@dataclass(frozen=True)
class Family:
    """How a kind of image encoder is loaded and read."""

    class_name: str
    pixels: Normalisation
    """If its folder does not say."""
    read: Callable[[Any, Any], ImageCodes]
    """Of the model and its output."""


def _read_clip(model: Any, output: Any) -> ImageCodes:
    # OpenCLIP ends with a norm over all tokens; here it is over the class token only.
    vision = getattr(model, "vision_model", model)
    hidden = vision.post_layernorm(output.last_hidden_state)
    pooled = output.image_embeds if "image_embeds" in output else hidden[:, 0]
    return ImageCodes(hidden[:, 1:], pooled)


def _read_siglip(model: Any, output: Any) -> ImageCodes:
    return ImageCodes(output.last_hidden_state, output.pooler_output)


def _read_dino(model: Any, output: Any) -> ImageCodes:
    skipped = 1 + int(getattr(model.config, "num_register_tokens", 0))
    hidden = output.last_hidden_state
    return ImageCodes(hidden[:, skipped:], hidden[:, 0])


FAMILIES: dict[str, Family] = {
    "clip": Family("CLIPVisionModelWithProjection", CLIP_PIXELS, _read_clip),
    "clip_vision_model": Family("CLIPVisionModel", CLIP_PIXELS, _read_clip),
    "siglip": Family("SiglipVisionModel", SIGLIP_PIXELS, _read_siglip),
    "siglip_vision_model": Family("SiglipVisionModel", SIGLIP_PIXELS, _read_siglip),
    "dinov2": Family("Dinov2Model", IMAGENET_PIXELS, _read_dino),
    "dinov2_with_registers": Family("Dinov2WithRegistersModel", IMAGENET_PIXELS, _read_dino),
}
"""`model_type` of a config -> what it is."""


class ImageEncoder(FrozenEncoder):
    """A frozen image encoder, on one device."""

    def __init__(self, options: ContentClipOptions, device: torch.device | str = "cpu") -> None:
        folder = find_model(options.model, part="image_encoder")
        weights = open_clip_weights(folder)
        if weights is not None:
            model, self._side_px, self._pixels = _load_open_clip(weights)
            self._family = FAMILIES["clip"]
        else:
            model, self._family = _load(folder)
            self._side_px, self._pixels = _read_preprocessing(folder, model, self._family)
        self.name = f"transformers:{type(model).__name__}"
        self.options = options
        self.identity = {
            "model": {key: getattr(model.config, key, None) for key in _ARCHITECTURE},
            "weights_sha256": digest_of(model),
            "resize_to": {"side_px": self._side_px, "mode": options.resize},
            "pixels": {"mean": list(self._pixels.mean), "std": list(self._pixels.std)},
        }
        model = model.eval().requires_grad_(False)
        where = usable_device(device)

        def probe(model: Any) -> Tensor:
            return self._run(model, probe_pixels()).tokens

        self.model, self.dtype, self.error = place_encoder(model, options.dtype, where, probe)
        codes = self.encode(probe_pixels(self._side_px)[:1])
        self.tokens_shape = (int(codes.tokens.shape[1]), int(codes.tokens.shape[2]))
        self.pooled_dim = None if codes.pooled is None else int(codes.pooled.shape[1])

    def encode(self, images_BCHW: Tensor) -> ImageCodes:
        """Return the codes of pixels in [-1, 1], squeezed to the encoder's square."""
        return self._run(self.model, images_BCHW)

    @torch.inference_mode()
    def _run(self, model: Any, images_BCHW: Tensor) -> ImageCodes:
        weight = next(model.parameters())
        pixels = preprocess(
            images_BCHW.to(weight.device), self._side_px, self.options.resize, self._pixels
        )
        codes = self._family.read(model, model(pixel_values=pixels.to(weight.dtype)))
        pooled = None if codes.pooled is None else codes.pooled.float()
        return ImageCodes(codes.tokens.float(), pooled)


def preprocess(images: Tensor, side_px: int, resize: str, pixels: Normalisation) -> Tensor:
    """Pixels (B, 3, H, W) in [-1, 1] -> (B, 3, side, side), normalised as the encoder expects."""
    size = (side_px, side_px)
    if resize == "published":
        blurred = _blur(images.float(), side_px)
        square = F.interpolate(blurred, size=size, mode="bicubic", align_corners=True)
    else:
        square = F.interpolate(
            images.float(), size=size, mode="bicubic", align_corners=False, antialias=True
        )
    mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in pixels)
    return ((square + 1) / 2 - mean) / std


def _blur(images: Tensor, side_px: int) -> Tensor:
    """Blur an image that will shrink, by (factor - 1) / 2 pixels along each axis."""
    factors = [size / side_px for size in images.shape[-2:]]
    if max(factors) <= 1:
        return images
    for axis, factor in zip((2, 3), factors, strict=True):
        sigma = max((factor - 1) / 2, 0.001)
        length = int(max(4 * sigma, 3))
        length += 1 - length % 2
        offsets = torch.arange(length, device=images.device, dtype=torch.float32) - length // 2
        kernel = torch.exp(-offsets.square() / (2 * sigma**2))
        kernel = kernel / kernel.sum()
        half = length // 2
        shape, padding = (
            ((length, 1), (0, 0, half, half)) if axis == 2 else ((1, length), (half, half, 0, 0))
        )
        weight = kernel.reshape(1, 1, *shape).expand(images.shape[1], 1, *shape)
        images = F.conv2d(F.pad(images, padding, mode="reflect"), weight, groups=images.shape[1])
    return images


def _load(folder: Path) -> tuple[Any, Family]:
    config = read_config(folder)
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        raise ConfigError(
            f"{folder} holds a {kind!r} model; content_clip takes one of {', '.join(FAMILIES)}, or "
            "OpenCLIP's checkpoint."
        )
    family = FAMILIES[kind]
    name = family.class_name
    if "CLIPVisionModelWithProjection" in (config.get("architectures") or []):
        name = "CLIPVisionModelWithProjection"
    model_class = import_class("transformers", name)
    model = load_strictly(
        model_class.from_pretrained, folder, allowed=_BESIDE_VISION, dtype=torch.float32
    )
    return model, family


def _load_open_clip(weights: Path) -> tuple[Any, int, Normalisation]:
    model, preprocessing = load_open_clip(weights)
    mean = preprocessing.get("mean", CLIP_PIXELS.mean)
    std = preprocessing.get("std", CLIP_PIXELS.std)
    return model, int(model.config.image_size), Normalisation(tuple(mean), tuple(std))


def _read_preprocessing(folder: Path, model: Any, family: Family) -> tuple[int, Normalisation]:
    """Return the side and the normalisation that the model's folder names."""
    path = folder / "preprocessor_config.json"
    said = read_config(folder, path.name) if path.is_file() else {}
    side = said.get("crop_size") or said.get("size")
    if isinstance(side, Mapping):
        side = side.get("height") or side.get("shortest_edge")
    mean, std = said.get("image_mean", family.pixels.mean), said.get("image_std", family.pixels.std)
    pixels = Normalisation(tuple(map(float, mean)), tuple(map(float, std)))
    return int(side or model.config.image_size), pixels


class ImageAutoencoder:
    """A frozen AutoencoderKL, on one device."""

    def __init__(
        self,
        options: ContentLatentOptions,
        device: torch.device | str = "cpu",
        *,
        trust_config: bool = False,
    ) -> None:
        loading = LoadOptions(device=device, parts="encoder", trust_config=trust_config)
        exact = load_diffusers(f"diffusers:{options.model}", None, loading)
        if not is_of_pictures(exact):
            raise ConfigError(
                f"{options.model} is a video autoencoder ({exact.architecture}); content_latent "
                "takes one of pictures. Use it for motion: --model diffusers:DIR."
            )
        self.autoencoder, self.dtype, self.error = settle(
            exact,
            options.dtype,
            NetworkAutoencoder.with_dtype,
            lambda autoencoder: autoencoder.encode(probe_pixels()[:, :, None]).mean,
            needs_float32=exact.config["model"].get("force_upcast") is True,
        )
        self.name = self.autoencoder.name
        self.geometry = self.autoencoder.geometry
        self.final_rule = self.autoencoder.final_rule

    @property
    def config(self) -> dict[str, Any]:
        """All that changes numbers, as JSON."""
        return self.autoencoder.config

    def encode(self, images_BCHW: Tensor) -> Posterior:
        """Return the moments, float32 (B, D, h, w), of pixels in [-1, 1]."""
        mean, logvar = self.autoencoder.encode(images_BCHW[:, :, None])
        return Posterior(mean[:, :, 0], logvar[:, :, 0])

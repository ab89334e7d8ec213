"""ReducioVAE: the three networks, and the checks between them and the outside.

Shapes: video (B, 3, T, H, W), images (B, 3, H, W), pixels in [-1, 1]; latents (B, D, t, h, w).
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from torch import Tensor, nn

from reducio_latents.core.gaussian import final_latents
from reducio_latents.core.values import Posterior
from reducio_latents.errors import ConfigError, GeometryError, PixelError
from reducio_latents.vae.blocks import conv
from reducio_latents.vae.config import FRAMES, IMAGE_CHANNELS, SPATIAL_STRIDE, ReducioVAEConfig
from reducio_latents.vae.content import ContentEncoder, ContentMaps
from reducio_latents.vae.decoder import Decoder
from reducio_latents.vae.encoder import VideoEncoder
from reducio_latents.vae.norm import CHANNELS_PER_GROUP, Norm
from reducio_latents.vae.tiling import Tiling, decode_tiled, encode_tiled

FINAL_RULE = {"rule": "layer_norm", "eps": 1e-5}
PIXEL_TOLERANCE = 1e-3
"""How far outside [-1, 1] a pixel may lie: room for rounding, not for an unclamped resize."""

DIFFERENCE_SCALE = "difference_scale"
"""Key of the buffer by which a model of differences is told from one of videos."""

Parts = Literal["all", "encoder", "decoder"]
PARTS: dict[str, frozenset[str]] = {
    "all": frozenset({"encoder_3d", "quant_conv", "encoder_2d", "post_quant_conv", "decoder"}),
    "encoder": frozenset({"encoder_3d", "quant_conv"}),
    "decoder": frozenset({"encoder_2d", "post_quant_conv", "decoder"}),
}
"""Which networks a model has; the others take no memory."""


class ReducioVAE(nn.Module):
    """Video to latents of 1/32 of its size a side and 1/4 or 1/2 of its frames, and back.

    The decoder also takes the clip's centre frame, which carries what does not move.
    State-dict keys and shapes are the published ones, without `loss.*`. A model of differences
    (`config.target`, ours) has one more, `difference_scale`, by which it multiplies them, and four
    channels in each of its normalisation groups whatever its width, as the published width has at
    least: groups of one channel would take away how much of a clip moves.
    Inputs are cast to the weights' dtype; posteriors, final latents and pixels are float32.
    """

    difference_scale: Tensor

    def __init__(self, config: ReducioVAEConfig, parts: Parts = "all") -> None:
        super().__init__()
        if parts not in PARTS:
            raise ConfigError(f"parts is {parts!r}; choose one of {', '.join(PARTS)}.")
        self.config = config
        self.parts = parts
        latent, moments = config.latent_channels, 2 * config.latent_channels
        if parts != "decoder":
            self.encoder_3d = VideoEncoder(config)
            self.quant_conv = conv(3, moments, moments, 1)
        if parts != "encoder":
            self.encoder_2d = ContentEncoder(config)
            self.post_quant_conv = conv(3, latent, latent, 1)
            self.decoder = Decoder(config)
        if config.target == "difference":
            self.register_buffer(DIFFERENCE_SCALE, torch.ones(1))
            for module in self.modules():
                if isinstance(module, Norm):
                    module.num_groups = module.num_channels // CHANNELS_PER_GROUP

    def encode(self, video_BCTHW: Tensor, tiling: Tiling | None = None) -> Posterior:
        """Return the posterior, mean and log-variance each (B, D, t, H/32, W/32), float32.

        Pixels are in [-1, 1]; that is checked where it costs nothing, on the CPU (`check_pixels`).
        tiling=None encodes frames whole, of any size that divides by 32.

        Raises GeometryError for a size or frame count that the model does not take, PixelError for
        pixels that are not floats in [-1, 1], ConfigError where the model has no encoder.
        """
        self._require("encoder")
        check_pixels("video", video_BCTHW, ndim=5)
        self.config.check_clip(*video_BCTHW.shape[2:])
        video = video_BCTHW.to(self.dtype)
        if self.config.target == "difference":
            video = (video - centre_image(video).unsqueeze(2)) * self.difference_scale
        if tiling is None:
            moments = self._moments(video)
        else:
            moments = encode_tiled(self._moments, video, tiling)
        return Posterior.of_moments(moments).clamped()

    def final_latents(self, posterior: Posterior, noise: Tensor | None = None) -> Tensor:
        """Return layer_norm over (D, t, h, w) of the mean, or of mean + std * noise; float32."""
        return final_latents(posterior, noise, FINAL_RULE)

    def decode(
        self, latents_BDthw: Tensor, content_BCHW: Tensor, tiling: Tiling | None = None
    ) -> Tensor:
        """Return the video (B, 3, T, H, W), float32 and not clamped, of final latents.

        The content image is the clip's centre frame at the clip's size, pixels in [-1, 1].
        Raises as `encode` does; also GeometryError where latents and content do not belong
        together.
        """
        self._require("decoder")
        self._check_decode(latents_BDthw, content_BCHW)
        latents, content = latents_BDthw.to(self.dtype), content_BCHW.to(self.dtype)
        if tiling is None:
            video = self._pixels(latents, self.encoder_2d(content))
        else:
            video = decode_tiled(self.encoder_2d, self._pixels, latents, content, tiling)
        if self.config.target == "difference":
            video = video / self.difference_scale.float() + content_BCHW.float().unsqueeze(2)
        return video

    def forward(self, video_BCTHW: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Posterior]:
        """Return the reconstruction and the posterior: encode, final latents, decode, whole."""
        posterior = self.encode(video_BCTHW)
        latents = self.final_latents(posterior, noise)
        return self.decode(latents, centre_image(video_BCTHW)), posterior

    def lay_out(self, memory_format: torch.memory_format) -> Self:
        """Lay the weights out in memory, and so what is computed with them; return the model.

        channels_last_3d is what convolutions on recent GPUs want; the image network's weights are
        then channels_last. (`Module.to` cannot do this: it takes one rank for all weights.)
        """
        layouts = {4: torch.contiguous_format, 5: memory_format}
        if memory_format == torch.channels_last_3d:
            layouts[4] = torch.channels_last
        for parameter in self.parameters():
            if parameter.ndim in layouts:
                parameter.data = parameter.data.contiguous(memory_format=layouts[parameter.ndim])
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def _moments(self, video: Tensor) -> Tensor:
        moments: Tensor = self.quant_conv(self.encoder_3d(video))
        return moments.float()

    def _pixels(self, latents: Tensor, maps: ContentMaps) -> Tensor:
        video: Tensor = self.decoder(self.post_quant_conv(latents), maps)
        return video.float()

    def _require(self, part: str) -> None:
        if self.parts not in ("all", part):
            raise ConfigError(
                f"this model was built with parts={self.parts!r}, so it has no {part}. "
                'Load it with parts="all".'
            )

    def _check_decode(self, latents: Tensor, content: Tensor) -> None:
        self.config.geometry.check_latents(latents.shape, steps=self.config.latent_frames)
        check_pixels("content image", content, ndim=4)
        batch, _, _, h, w = latents.shape
        wanted = (batch, IMAGE_CHANNELS, h * SPATIAL_STRIDE, w * SPATIAL_STRIDE)
        if content.shape != wanted:
            raise GeometryError(
                f"the content image is {tuple(content.shape)}, but latents {tuple(latents.shape)} "
                f"decode with one of {wanted}: the clip's centre frame at the clip's size."
            )


def centre_image(video_BCTHW: Tensor) -> Tensor:
    """Return the content image (B, 3, H, W) of a clip: frame (T - 1) // 2."""
    return video_BCTHW[:, :, (FRAMES - 1) // 2]


def check_pixels(name: str, pixels: Tensor, ndim: int) -> None:
    """Raise GeometryError unless `pixels` has `ndim` axes, the second of them RGB; PixelError
    unless they are floats in [-1, 1].

    The range is looked at on the CPU alone: reading a minimum back from a GPU would make the host
    wait for it before every batch.
    """
    if pixels.ndim != ndim or pixels.shape[1] != IMAGE_CHANNELS:
        wanted = "(B, 3, T, H, W)" if ndim == 5 else "(B, 3, H, W)"
        hint = ""
        if pixels.ndim == ndim and IMAGE_CHANNELS in pixels.shape[2:]:
            hint = " Move the channel axis to the second place."
        raise GeometryError(f"{name} is {tuple(pixels.shape)}, but must be {wanted}.{hint}")

    if not pixels.is_floating_point():
        raise PixelError(
            f"{name} is {pixels.dtype}, but must be floating point in [-1, 1]. "
            "From 0..255: pixels.float() / 127.5 - 1."
        )
    if pixels.device.type != "cpu" or pixels.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = (float(bound) for bound in torch.aminmax(pixels.detach()))
    limit = 1 + PIXEL_TOLERANCE
    if not (-limit <= low and high <= limit):  # so that NaN fails too
        raise PixelError(
            f"{name} has values from {low:g} to {high:g}, but must lie in [-1, 1]. "
            "From 0..255: pixels / 127.5 - 1; after a bicubic resize: clamp."
        )

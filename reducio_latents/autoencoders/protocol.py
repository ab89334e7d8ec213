"""What the flows ask of any autoencoder, how it is loaded, and what a store says of it."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from reducio_latents.core.choices import Compile
from reducio_latents.core.clips import centre_frame
from reducio_latents.core.config import check_choices
from reducio_latents.core.gaussian import final_latents
from reducio_latents.core.geometry import LatentGeometry
from reducio_latents.core.values import Posterior
from reducio_latents.errors import ConfigError
from reducio_latents.metrics.psnr import frame_psnr
from reducio_latents.vae.model import Parts
from reducio_latents.vae.tiling import Tiling

TilingChoice = Tiling | Literal["auto"] | None


class Autoencoder(ABC):
    """Anything that turns clips into latents and back. It holds weights, not files.

    Video is (B, 3, T, H, W) with pixels in [-1, 1]; moments and latents are (B, D, t, h, w) and
    float32.
    """

    name: str
    """The name by which `load_autoencoder` loads one like it."""
    geometry: LatentGeometry
    check_clip: Callable[[int, int, int], object]
    """Raises GeometryError, naming a size that would do, unless clips of that T, H, W fit."""
    fingerprint: str
    """Identifies architecture and weights, whatever the precision, device or tiling."""
    weights_sha256 = ""
    final_rule: Mapping[str, Any]
    """How final latents come from a sample: see `gaussian`."""
    needs_content = False
    """Whether `decode` takes the clip's centre frame."""
    model: nn.Module | None = None
    """What has the weights; None if there are none."""
    device: torch.device
    dtype: torch.dtype
    tiling: Tiling | None = None
    """How large frames are cut; None: they are not."""
    options: LoadOptions
    described: Mapping[str, Any]
    remarks: Mapping[str, Any] = {}
    """What `config` says before the hashes, and after them."""

    @property
    def config(self) -> dict[str, Any]:
        """All that changes numbers, as JSON: architecture, weights, tiling, precision."""
        tiling = self.tiling
        return {
            **self.described,
            "fingerprint": self.fingerprint,
            "weights_sha256": self.weights_sha256,
            **self.remarks,
            "tiling": tiling and {"tile_px": tiling.tile_px, "overlap": tiling.overlap},
            "precision": self.precision,
        }

    @property
    def precision(self) -> dict[str, Any]:
        """How numbers are computed, as JSON: dtype, layout, compiled or not."""
        exact = self.dtype == torch.float32
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "memory_format": str(self.options.memory_format).removeprefix("torch."),
            "compiled": self.options.compile,
            # PyTorch lets float32 convolutions use 10-bit mantissas unless told otherwise.
            "tf32": self.device.type == "cuda" and exact and torch.backends.cudnn.allow_tf32,
        }

    @abstractmethod
    def encode(self, video_BCTHW: Tensor) -> Posterior:
        """Return the posterior, on this autoencoder's device."""

    def final_latents(self, posterior: Posterior, noise: Tensor | None = None) -> Tensor:
        """Return what a diffusion model trains on, of the mean or of mean + std * noise."""
        return final_latents(posterior, noise, self.final_rule)

    @abstractmethod
    def decode(self, latents: Tensor, content_image: Tensor | None = None) -> Tensor:
        """Return the video of final latents, float32 and not clamped.

        content_image is (B, 3, H, W), pixels in [-1, 1].
        """


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a model is put to work. Nothing here changes which model it is."""

    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    """Of weights and activations; reductions that need it stay in float32."""
    tiling: TilingChoice = "auto"
    """How large frames are cut; "auto" is the model's published way, None never cuts."""
    parts: Parts = "all"
    """`encoder` or `decoder` leave the other half out of memory."""
    compile: Compile = "none"
    """What torch.compile makes programs of, once for each size of input: `all`, the networks whole;
    `norms`, each normalisation with its activation, which takes seconds. It stops after eight sizes
    (torch._dynamo.config.recompile_limit) and runs the others as they are; the norms of one network
    see some seven sizes for one of the input."""
    trust_config: bool = False
    """Whether a class of diffusers that is not in the table is tried by its config."""
    memory_format: torch.memory_format = torch.contiguous_format
    """Layout of weights and activations; channels_last_3d also lays images out channels last."""

    def __post_init__(self) -> None:
        check_choices(self)

    def compiles_whole(self, name: str) -> bool:
        """Whether to compile whole networks; ConfigError for norms, where they are not ours."""
        if self.compile == "norms":
            raise ConfigError(
                f"{name} has no norms that could be compiled by themselves; Reducio-VAE has. "
                'Use compile="all" or "none".'
            )
        return self.compile == "all"


CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""By the rank of a weight."""


def lay_out(network: nn.Module, options: LoadOptions) -> None:
    """Lay the weights of convolutions out as `memory_format` asks."""
    if options.memory_format == torch.contiguous_format:
        return
    for parameter in network.parameters():
        if parameter.ndim in CHANNELS_LAST:
            parameter.data = parameter.data.contiguous(memory_format=CHANNELS_LAST[parameter.ndim])


def identity_hash(**identity: Any) -> str:
    """Return the fingerprint of a model: SHA-256 over all that makes it another one, as JSON."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def tiling_of(record: Any) -> Tiling | None:
    """Return the tiling of a record in a store; raise ConfigError for what is none."""
    if record is None:
        return None
    try:
        return Tiling(tile_px=int(record["tile_px"]), overlap=float(record["overlap"]))
    except (KeyError, TypeError, ValueError) as err:
        raise ConfigError(f"the store's tiling is {record!r}, which is not understood.") from err


def is_untrained(model: Autoencoder) -> bool:
    """Whether the weights are random: made so by name, or loaded from a file of such.

    A file tells by its normalisation layers. They begin as the identity, and one step of training
    moves them all.
    """
    if model.config.get("random_weights", False):
        return True
    untouched = [
        bool(torch.all(parameter == first))
        for module in (model.model.modules() if model.model is not None else ())
        if "norm" in type(module).__name__.lower()
        for name, first in (("weight", 1.0), ("bias", 0.0))
        if (parameter := dict(module.named_parameters(recurse=False)).get(name)) is not None
    ]
    return bool(untouched) and all(untouched)


def decoded_psnr(autoencoder: Autoencoder, posterior: Posterior, video_BCTHW: Tensor) -> Tensor:
    """Return the PSNR in dB of each frame, (B, T), of clips decoded from their posterior's mean."""
    latents = final_latents(posterior, None, autoencoder.final_rule).to(autoencoder.device)
    content = video_BCTHW[:, :, centre_frame(video_BCTHW.shape[2])]
    decoded = autoencoder.decode(latents, content if autoencoder.needs_content else None)
    return frame_psnr(video_BCTHW, decoded)

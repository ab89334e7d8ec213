"""Final latents back to pixels, by the model that made a store's latents; `Store.decoder` makes it.

It is held beside a diffusion model in training, so neither this module nor a decoder that nobody
has asked for pictures loads a VAE or a video library.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from reducio_latents.core.choices import Dtype
from reducio_latents.core.devices import usable_device
from reducio_latents.core.gaussian import final_channels
from reducio_latents.core.geometry import Bucket
from reducio_latents.errors import (
    ConfigError,
    GeometryError,
    PixelError,
    StoreError,
    VideoError,
    WeightsError,
)
from reducio_latents.store.meta import differences

if TYPE_CHECKING:
    from reducio_latents.autoencoders import Autoencoder
    from reducio_latents.store.store import Store

log = logging.getLogger(__name__)

NOT_IDENTITY = frozenset({"precision", "resize", "deinterlace", "colours"})
"""What of a column's config may differ: rounding, and what was done before the model."""
PIXELS_AT_ONCE = 1 << 22
"""Pixels of the clips that a model is given at once, four of 16x256x256; of a larger clip, one. On
a CPU nothing else bounds memory, and a GPU is busy with so many."""


class ChannelScale(NamedTuple):
    """How a dataset normalised final latents: (latents - mean) / std, a number a channel each."""

    mean: Sequence[float]
    std: Sequence[float]


class LatentDecoder:
    """Decodes final latents as the clips of a store were; loads the store's model at first use."""

    def __init__(
        self,
        store: Store,
        weights: str | os.PathLike[str] | None = None,
        device: torch.device | str = "auto",
        dtype: torch.dtype | str | None = None,
        *,
        model: str | None = None,
        shapes: Mapping[str, Sequence[int]] | None = None,
        normalized: ChannelScale | None = None,
    ) -> None:
        """Say what to decode with; see `Store.decoder`. `model`: another name for the store's.

        shapes: bucket -> a row of motion, by default those of the store. normalized: what to undo
        first, for latents like those of `LatentDataset(..., normalize="channel")`.
        """
        store.require_columns(["motion"])
        if dtype in get_args(Dtype):
            dtype = getattr(torch, str(dtype))
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ConfigError(f"dtype is {dtype!r}; give one of floats, such as torch.bfloat16.")
        self.store = store
        if device != "auto":
            usable_device(device)
        # Which GPU is the current one, a rank may still have to say.
        self._device, self._dtype = device, dtype or torch.float32
        self._motion = store.meta.columns["motion"]
        self._named, self._weights = model, weights
        self._buckets: dict[tuple[int, ...], Bucket] = {}
        for name, row in (shapes or self._motion.row_shapes).items():
            channels = row[0] // 2
            if self._motion.final is not None:
                channels = final_channels(self._motion.final, channels)
            shape = (channels, *row[1:])
            self._buckets[shape] = max(Bucket.parse(name), self._buckets.get(shape, _NO_BUCKET))
        self._normalized = normalized
        self._model: Autoencoder | None = None
        self._fits: dict[tuple[int, ...], int] = {}

    def __repr__(self) -> str:
        return f"LatentDecoder({self.store.files.url}: {self._motion.encoder} on {self._device})"

    def load(self) -> Autoencoder:
        """Return the store's model, loaded once. Call it early to know early that all is well.

        Raises StoreError, saying what differs, for a model that is not the store's, WeightsError
        where its weights are missing. Random numbers of the process stay as they were.
        """
        if self._model is None:
            device = usable_device(self._device)
            # Some models draw weights before theirs are read, which would change a training run.
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                self._model = self._load(device)
        return self._model

    def decode(self, latents: Tensor, content_image: Tensor | None = None) -> Tensor:
        """Return videos, uint8 (B, T, H, W, 3) on the CPU, of final latents (B, D, t, h, w).

        Latents are what a batch of `LatentDataset` has, or what a model trained on those samples,
        of any float type and on any device. content_image: uint8 (B, 3, H, W), the clips' centre
        frames as batches hold them; a model that does without does not look at it. Clips are
        decoded in parts that fit into memory. Raises GeometryError, PixelError or ConfigError for
        what cannot be decoded, and as `load`.
        """
        return self._decode(latents, content_image, _to_frames)

    def pixels(self, latents: Tensor, content_image: Tensor | None = None) -> Tensor:
        """Return what `decode` rounds: float32 (B, 3, T, H, W), about [-1, 1] and not clamped."""
        return self._decode(latents, content_image, lambda video: video.float().cpu())

    def write(self, path: str | Path, frames: Tensor | NDArray[np.uint8]) -> None:
        """Write uint8 frames (T, H, W, 3) as .mp4 or .webp at the store's rate, one also as .png.

        Of a batch (B, T, H, W, 3), the clips stand side by side in rows. The file appears whole or
        not at all. Raises PixelError for other frames, VideoError if it cannot be written.
        """
        from reducio_latents.video.write import write_image, write_mp4, write_webp

        array = frames.cpu().numpy() if isinstance(frames, Tensor) else np.asarray(frames)
        if array.dtype != np.uint8 or array.ndim not in (4, 5) or array.shape[-1] != 3:
            raise PixelError(
                f"frames are {array.dtype} {array.shape}; write takes uint8 (T, H, W, 3), as "
                "decode gives them."
            )
        if not array.size:
            raise PixelError(f"frames are {array.shape}: there is nothing to write to {path}.")
        clip = np.ascontiguousarray(_side_by_side(array) if array.ndim == 5 else array)
        suffix = Path(path).suffix.lower()
        if suffix == ".mp4":
            write_mp4(path, clip, self.store.meta.clip.rate_fps)
        elif suffix == ".webp":
            write_webp(path, clip, self.store.meta.clip.rate_fps)
        elif len(clip) == 1:
            write_image(path, clip[0])
        else:
            raise VideoError(f"{path} cannot be written: name it .mp4 or .webp.")

    def _load(self, device: torch.device) -> Autoencoder:
        from reducio_latents.autoencoders import load_autoencoder
        from reducio_latents.autoencoders.protocol import tiling_of

        motion, url = self._motion, self.store.files.url
        loaded = load_autoencoder(
            self._named or motion.encoder,
            self._place(),
            device=device,
            dtype=self._dtype,
            tiling=tiling_of(motion.config.get("tiling")),
            parts="decoder",
            trust_config="assumed" in motion.config,
        )
        lines = differences(_identity(loaded.config), _identity(motion.config))
        if lines:
            raise StoreError(
                f"{url} was made by another model ({motion.encoder}), so {loaded.name} cannot "
                f"decode it: {'; '.join(lines[:4])}. Give the weights that made it."
            )
        return loaded

    def _place(self) -> str | os.PathLike[str] | None:
        """Return where the weights are: as given, or where the store remembers them to be."""
        place = self._motion.weights
        if self._weights is not None or self._named is not None or place is None:
            return self._weights
        path = Path(place)  # of a store from elsewhere, maybe: a pipe or a device is no place
        if path.is_absolute() and not (path.is_file() or path.is_dir()):
            raise WeightsError(
                f"{self.store.files.url} was made by {self._motion.encoder} of {place}, which is "
                "no longer there. Say where its weights are now: --weights PLACE, or "
                "decoder(weights=PLACE)."
            )
        return place

    def _decode(
        self, latents: Tensor, content_image: Tensor | None, finish: Callable[[Tensor], Tensor]
    ) -> Tensor:
        bucket = self._check_latents(latents)
        if content_image is not None:
            _check_content(content_image, len(latents), bucket)
        model = self.load()
        if not model.needs_content:
            content_image = None
        elif content_image is None:
            raise ConfigError(
                f"{model.name} decodes with the clips' content images: give decode their "
                "content_image, uint8 (B, 3, H, W), a column that batches may have."
            )
        z = latents.detach().float()
        if self._normalized is not None:
            mean, std = (z.new_tensor(value).view(1, -1, 1, 1, 1) for value in self._normalized)
            z = z * std + mean
        shape = tuple(z.shape[1:])
        parts: list[Tensor] = []
        done = 0
        while done < len(z):
            most = max(1, PIXELS_AT_ONCE // (bucket.frames * bucket.height * bucket.width))
            count = min(self._fits.get(shape, most), len(z) - done)
            images = None if content_image is None else content_image[done : done + count]
            try:
                parts.append(finish(self._video(model, z[done : done + count], images, bucket)))
                done += count
                continue
            except torch.OutOfMemoryError as err:
                if count == 1:
                    raise ConfigError(
                        f"one clip of {bucket} does not fit in the memory of {model.device}. "
                        "Decode it on the CPU, or in bfloat16 (dtype)."
                    ) from err
            # Outside of the handler, whose traceback keeps tensors alive.
            self._fits[shape] = count // 2
            log.warning("%d clips do not fit in memory; decoding %d at once.", count, count // 2)
            if model.device.type == "cuda":
                torch.cuda.empty_cache()
        return torch.cat(parts)

    @torch.inference_mode()
    def _video(self, model: Autoencoder, z: Tensor, images: Tensor | None, size: Bucket) -> Tensor:
        # The precision is the decoder's own, also inside of a training step's autocast.
        with torch.autocast(model.device.type, enabled=False):
            content = None
            if images is not None:
                content = images.to(model.device).float().div_(127.5).sub_(1.0)
            return model.decode(z.to(model.device), content)[:, :, : size.frames]

    def _check_latents(self, latents: Tensor) -> Bucket:
        """Return the bucket that latents are of; raise where they are of none, or no latents."""
        if not isinstance(latents, Tensor) or not latents.is_floating_point():
            found = latents.dtype if isinstance(latents, Tensor) else type(latents).__name__
            raise PixelError(f"latents are {found}; decode takes a tensor of floats.")
        shape = tuple(latents.shape)
        bucket = self._buckets.get(shape[1:])
        if bucket is None or not len(latents):
            known = ", ".join(f"{size}: {(*s,)}" for s, size in list(self._buckets.items())[:4])
            raise GeometryError(
                f"latents are {shape}; {self.store.files.url} has clips of (B, D, t, h, w), one of "
                f"{known}.{self._hint(shape)}"
            )
        if not torch.isfinite(latents).all():
            raise PixelError("latents have values that are not finite, so there is no picture.")
        return bucket

    def _hint(self, shape: tuple[int, ...]) -> str:
        if shape in self._buckets:
            return " Give a batch, of one clip: latents[None]."
        if len(shape) == 5 and (shape[1] // 2, *shape[2:]) in self._buckets and not shape[1] % 2:
            return (
                " These are moments: draw final latents first, by sample_moments, or read with "
                'latents="mean".'
            )
        if len(shape) == 6:
            return " Join the clips of all samples: latents.flatten(0, 1)."
        return ""


_NO_BUCKET = Bucket(1, 1, 1)


def _check_content(image: Tensor, batch: int, bucket: Bucket) -> None:
    if not isinstance(image, Tensor) or image.dtype != torch.uint8:
        found = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise PixelError(
            f"content_image is {found}; decode takes a uint8 tensor (B, 3, H, W) in [0, 255], "
            "as batches have it."
        )
    wanted = (batch, 3, bucket.height, bucket.width)
    if tuple(image.shape) != wanted:
        hint = " Move the channels to the second axis." if image.shape[-1:] == (3,) else ""
        raise GeometryError(
            f"content_image is {tuple(image.shape)}; for these latents, of {bucket}, it must be "
            f"{wanted}.{hint}"
        )


def _to_frames(video_BCTHW: Tensor) -> Tensor:
    from reducio_latents.video.pixels import to_uint8

    return to_uint8(video_BCTHW).permute(0, 2, 3, 4, 1).contiguous().cpu()


def _side_by_side(clips_BTHWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return one clip with all of a batch in rows and columns, black where there is none left."""
    columns = math.ceil(math.sqrt(len(clips_BTHWC)))
    missing = -len(clips_BTHWC) % columns
    padded = np.pad(clips_BTHWC, ((0, missing), *((0, 0),) * 4))
    joined: NDArray[np.uint8] = rearrange(padded, "(r q) t h w c -> t (r h) (q w) c", q=columns)
    return joined


def _identity(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in NOT_IDENTITY}

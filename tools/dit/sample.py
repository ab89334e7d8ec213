"""Samples for held-out clips, decoded by the VAE that made the store, as videos."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dit.data import CONTENT_IMAGE, conditions_of
from dit.flow import Draw, Velocity, flow_loss, sample_euler, start_noise
from dit.model import Conditions
from dit.settings import SampleSettings
from reducio_latents.check.pictures import Panel, file_name, side_by_side
from reducio_latents.dataset import LatentDataset
from reducio_latents.dataset.batches import LatentBatch
from reducio_latents.errors import ConfigError
from reducio_latents.store import Store

LOSS_TIMES = 8
"""Times at which the loss of a held-out clip is measured."""


class Sampler:
    """Makes samples for the same held-out clips from the same noise, whenever it is asked."""

    def __init__(
        self,
        store: Store,
        columns: Sequence[str],
        settings: SampleSettings,
        *,
        val_fraction: float,
        seed: int,
        device: torch.device,
    ) -> None:
        """Load the VAE that made the store, and the clips.

        Raises StoreError for other weights than the store's, ConfigError if nothing is held out.
        """
        self.settings, self.columns = settings, columns
        self._seed, self._device = seed, device
        self.decoder = store.decoder(settings.weights, device)
        shown = [name for name in (CONTENT_IMAGE,) if name in store.columns]
        vae = self.decoder.load()
        if vae.needs_content and not shown:
            raise ConfigError(f"{vae.name} decodes with {CONTENT_IMAGE}, which is missing.")
        held_out = _held_out(store, [*dict.fromkeys([*columns, *shown]), "clip_id"], val_fraction)
        spread = np.linspace(0, held_out.num_batches(0) - 1, settings.count).round().astype(int)
        self.clips = [held_out.batch(0, int(number)) for number in dict.fromkeys(spread.tolist())]
        """Each a batch of one."""

    def held_out_loss(self, network: Velocity) -> float:
        """Return the loss on the clips, at times spread from 0 to 1."""
        losses = []
        for number, clip in enumerate(self.clips):
            latents, conditions = self._inputs(clip)
            shape = (LOSS_TIMES, *latents.shape[1:])
            noise = start_noise(shape, seed=self._seed, first=number * LOSS_TIMES)
            time = (torch.arange(LOSS_TIMES, device=self._device) + 0.5) / LOSS_TIMES
            many = conditions.repeat(LOSS_TIMES)
            drawn = Draw(noise.to(self._device), time, many.keep)
            with torch.no_grad():
                losses.append(float(flow_loss(network, latents.expand(shape), drawn, many)))
        return sum(losses) / len(losses)

    def latents(self, network: Velocity, number: int) -> Tensor:
        """Return sampled final latents (1, D, t, h, w) for the content of clip `number`."""
        latents, conditions = self._inputs(self.clips[number])
        noise = start_noise(latents.shape, seed=self._seed, first=number).to(self._device)
        settings = self.settings
        return sample_euler(
            network, noise, conditions, steps=settings.steps, guidance=settings.guidance
        )

    def decode(self, latents: Tensor, clip: LatentBatch) -> NDArray[np.uint8]:
        """Return the video of final latents (1, D, t, h, w): uint8 RGB (T, H, W, 3)."""
        frames: NDArray[np.uint8] = self.decoder.decode(latents, clip.get(CONTENT_IMAGE))[0].numpy()
        return frames

    def write(self, network: Velocity, folder: Path) -> list[Path]:
        """Write one mp4 a clip: its content image, its own latents decoded, what was sampled."""
        paths = []
        for number, clip in enumerate(self.clips):
            own, _ = self._inputs(clip)
            panels = [
                Panel("stored", self.decode(own, clip)),
                Panel("sampled", self.decode(self.latents(network, number), clip)),
            ]
            if CONTENT_IMAGE in clip:
                still = clip[CONTENT_IMAGE][0].permute(1, 2, 0).cpu().numpy()
                frames = np.repeat(still[None], len(panels[0].frames), axis=0)
                panels.insert(0, Panel("content image", frames))
            paths.append(folder / f"{file_name(clip['clip_id'][0])}.mp4")
            self.decoder.write(paths[-1], side_by_side(panels))
        return paths

    def _inputs(self, clip: LatentBatch) -> tuple[Tensor, Conditions]:
        keep = torch.ones(1, dtype=torch.bool)
        conditions = conditions_of(clip, self.columns, keep).to(self._device)
        return clip["latents"].to(self._device), conditions


def _held_out(store: Store, columns: Sequence[str], val_fraction: float) -> LatentDataset:
    try:
        return LatentDataset(
            store,
            columns,
            batch_size=1,
            shuffle=False,
            rank=0,
            world_size=1,
            split="val",
            val_fraction=val_fraction,
            latents="mean",
        )
    except ConfigError as err:
        raise ConfigError(
            f"no clip can be held out for samples ({str(err).rstrip('.')}). Raise --val-fraction, "
            f"which is {val_fraction}, or leave --sample-every out."
        ) from err

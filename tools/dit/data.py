"""From a store's columns to what the network is trained on and conditioned on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dit.model import Conditions, DiTConfig
from reducio_latents.dataset import LatentDataset
from reducio_latents.dataset.batches import LatentBatch
from reducio_latents.errors import ConfigError
from reducio_latents.store import Store
from reducio_latents.store.row_kinds import TokenVectorRows

MOTION, TEXT = "motion", "text"
IMPORTED = "latents"
"""Column that imported stores have instead of `motion`: samples that are final already."""
CONTENT_IMAGE = "content_image"
CONTENTS = ("content_latent", "content_latent_sample", CONTENT_IMAGE)
"""What may show the network the still image, the better ones first."""


def choose_columns(store: Store, asked: Sequence[str] | None) -> tuple[str, ...]:
    """Return `motion` and the columns that condition it: those asked for, or all there are.

    Of the columns of content one is taken. Raises ConfigError for other columns.
    """
    texts = [name for name in store.columns if type(store.kind(name)) is TokenVectorRows]
    motion = IMPORTED if IMPORTED in store.columns and MOTION not in store.columns else MOTION
    if asked is None:
        content = [name for name in CONTENTS if name in store.columns][:1]
        return (motion, *content, *texts[:1])
    for name in asked:
        if name not in (motion, *CONTENTS, *texts):
            raise ConfigError(
                f"--columns names {name}; the network can be conditioned on "
                f"{', '.join(CONTENTS)} and token vectors of {TEXT} or {TEXT}:NAME."
            )
    for kind in ([n for n in CONTENTS if n in asked], [n for n in asked if n in texts]):
        if len(kind) > 1:
            raise ConfigError(f"--columns names {' and '.join(kind)}. Leave all but one out.")
    return (motion, *(name for name in dict.fromkeys(asked) if name != motion))


def conditions_of(batch: LatentBatch, columns: Sequence[str], keep: Tensor) -> Conditions:
    """Return a batch's conditions; `keep` (B,) says for which samples they count."""
    content = None
    for name in columns:
        if name in CONTENTS:
            content = to_unit_range(batch[name]) if name == CONTENT_IMAGE else batch[name].float()
    text = next((name for name in columns if f"{name}_mask" in batch), None)
    if text is not None:
        return Conditions(content, batch[text], batch[f"{text}_mask"], keep)
    return Conditions(content, None, None, keep)


def to_unit_range(image: Tensor) -> Tensor:
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return image.float() / 127.5 - 1


def sizes_of(dataset: LatentDataset, columns: Sequence[str], **sizes: int) -> DiTConfig:
    """Return the network's sizes, those that the data decides read off its first batch."""
    batch = dataset.batch(0, 0)
    latents = batch["latents"]
    if latents.ndim != 5:
        raise ConfigError(
            f"{MOTION} has rows of {latents.ndim - 1} axes; the network takes latents of videos, "
            "(D, t, h, w)."
        )
    conditions = conditions_of(batch, columns, torch.ones(len(latents), dtype=torch.bool))
    content, text = conditions.content, conditions.text
    return DiTConfig(
        latent_channels=latents.shape[1],
        content_channels=0 if content is None else content.shape[1],
        content_stride=1 if content is None else _stride(content, latents),
        text_width=0 if text is None else text.shape[2],
        **sizes,
    )


def _stride(content: Tensor, latents: Tensor) -> int:
    (height, width), (h, w) = content.shape[2:], latents.shape[3:]
    if height % h or width % w or height // h != width // w:
        raise ConfigError(
            f"content of {height}x{width} does not cover latents of {h}x{w} by one whole stride. "
            f"Leave it out: --columns {TEXT}, or --columns {MOTION} for no condition."
        )
    return height // h

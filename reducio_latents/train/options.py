"""What a training run is told beside its config. Plain Python."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from reducio_latents.core.fetching import WeightsPlace


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where things are, and how the run shows itself."""

    pretrained: WeightsPlace | None = None
    """Weights to start from: published ones, also of the Hub, or a checkpoint of another run.

    Only used if the run has no checkpoint yet."""
    lpips_weights: WeightsPlace | None = None
    """VGG16's state dict, instead of torchvision's, which is fetched.

    With `loss.perceptual: none` validations alone use it."""
    wandb_key: str | None = None
    """Key for log.wandb=online."""
    eval_only: bool = False
    """Validate, print the scores, and stop."""
    tell: Callable[[str], None] = logging.getLogger("reducio_latents.train").info
    """Takes what the run has to say, a line at a time, from the first rank."""
    bar: bool = False
    """Show a bar on the terminal."""

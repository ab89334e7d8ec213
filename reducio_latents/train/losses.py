"""The terms of the published objective, each a pure function of tensors.

x is the clip, y its reconstruction, both (B, 3, T, H, W) in [-1, 1]. Every function returns scalar
means over the batch unless it says otherwise. The KL term is `gaussian.kl_to_unit_normal`.
Tian et al., arXiv 2411.13552; the adversarial part after Esser et al., arXiv 2012.09841.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Reconstruction = Literal["l1", "l2"]
RECONSTRUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l1": F.l1_loss, "l2": F.mse_loss}

PENALTY_STDS = 3.0
WEIGHT_EPS = 1e-4
WEIGHT_LIMIT = 1e4


def nll(reconstruction: Tensor, logvar: float) -> Tensor:
    """Return reconstruction / exp(logvar) + logvar.

    `reconstruction` is the mean over pixels of the pixel term and the weighted perceptual one;
    `logvar` is the log-variance of the pixels' noise, one number for all of them.
    """
    return reconstruction / math.exp(logvar) + logvar


def outlier_penalty(y: Tensor) -> Tensor:
    """Return the mean excess of y over mean + 3 std of its own channel and frame, one-sided.

    The standard deviation is the unbiased one. Keeps the decoder from single bright spots.
    """
    std, mean = torch.std_mean(y, dim=(-2, -1), keepdim=True)
    return F.relu(y - mean - PENALTY_STDS * std).mean()


def hinge_discriminator(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Return 0.5 * (mean relu(1 - real) + mean relu(1 + fake))."""
    return 0.5 * (F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean())


def adversarial(logits_fake: Tensor) -> Tensor:
    """Return what the generator minimises: minus the mean logit of its reconstructions."""
    return -logits_fake.mean()


def adaptive_weight(nll_grad: Tensor, adversarial_grad: Tensor) -> Tensor:
    """Return |nll_grad| / (|adversarial_grad| + 1e-4), clamped to [0, 1e4], without gradient.

    Both are gradients at the decoder's last weight, so the adversarial term comes to weigh as much
    there as the reconstruction does. Esser et al. (2021), equation 7.
    """
    ratio: Tensor = nll_grad.norm() / (adversarial_grad.norm() + WEIGHT_EPS)
    return ratio.clamp(0, WEIGHT_LIMIT).detach()


def started(step: int, start_step: int) -> float:
    """Return 1.0 from `start_step` on and 0.0 before; steps count from 0."""
    return 1.0 if step >= start_step else 0.0

"""The Frechet distance of two Gaussians, by eigenvalues. Dowson and Landau (1982)."""

from __future__ import annotations

import torch
from torch import Tensor

from reducio_latents.errors import GeometryError


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Return |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), in float64.

    Means are (D,), covariances (D, D), symmetric and positive semi-definite. The trace of the root
    is taken of the symmetric cov_a^(1/2) cov_b cov_a^(1/2), which has the same eigenvalues.
    """
    cov_a, cov_b = cov_a.double(), cov_b.double()
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    shared = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    shift = (mean_a.double() - mean_b.double()).square().sum()
    distance = shift + cov_a.trace() + cov_b.trace() - 2 * shared
    return max(0.0, float(distance))  # rounding can leave a little below zero


def frechet_of_features(a_ND: Tensor, b_ND: Tensor) -> float:
    """Return the Frechet distance of Gaussians fitted to two sets of features, (N, D) and (M, D).

    The covariance is the unbiased one. With fewer rows than features the distance is biased
    upwards: compare only numbers made with the same N. Raises GeometryError for fewer than 2 rows.
    """
    if min(len(a_ND), len(b_ND)) < 2:
        raise GeometryError(
            f"a Frechet distance needs at least 2 clips on either side, got {len(a_ND)} and "
            f"{len(b_ND)}."
        )
    return frechet_distance(*_fit(a_ND), *_fit(b_ND))


def _fit(features_ND: Tensor) -> tuple[Tensor, Tensor]:
    features = features_ND.double()
    return features.mean(0), torch.cov(features.T)

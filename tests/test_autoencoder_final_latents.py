"""Final latents: rules as JSON, applied when reading."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from reducio_latents.core.gaussian import (
    apply_final_rule,
    check_final_rule,
    final_latents,
    kl_to_unit_normal,
    sample,
    undo_final_rule,
)
from reducio_latents.core.values import Posterior
from reducio_latents.errors import ConfigError, GeometryError

LAYER_NORM = {"rule": "layer_norm", "eps": 1e-5}
SCALE_SHIFT = {"rule": "scale_shift", "scale": 0.18215, "shift": 0.1}
PER_CHANNEL = {"rule": "scale_shift", "scale": [1.0, 2.0, 4.0], "shift": [0.0, -1.0, 3.0]}


def posterior(batch: int = 4) -> Posterior:
    generator = torch.Generator().manual_seed(batch)
    mean, logvar = torch.randn(2, batch, 3, 4, 2, 2, generator=generator)
    return Posterior(2 * mean + 1, logvar - 1)


def test_the_divergence_is_that_of_torch_distributions() -> None:
    q = posterior()
    normal = torch.distributions.Normal
    wanted = torch.distributions.kl_divergence(
        normal(q.mean, torch.exp(0.5 * q.logvar)), normal(torch.tensor(0.0), torch.tensor(1.0))
    )
    torch.testing.assert_close(kl_to_unit_normal(q), wanted.flatten(1).sum(1))


def test_samples_have_the_posteriors_mean_and_spread() -> None:
    one = posterior(1)
    many = Posterior(*(x.expand(20_000, -1, -1, -1, -1) for x in one))
    noise = torch.randn(many.mean.shape, generator=torch.Generator().manual_seed(0))
    drawn = sample(many, noise)
    assert (drawn.mean(0) - one.mean[0]).abs().max() < 0.05
    assert (drawn.std(0) / torch.exp(0.5 * one.logvar[0]) - 1).abs().max() < 0.05
    assert torch.equal(sample(many, torch.zeros_like(noise)), many.mean)


def test_layer_norm_is_over_a_whole_clip_and_no_other() -> None:
    q = posterior()
    latents = final_latents(q, None, LAYER_NORM)
    for clip, mean in zip(latents, q.mean, strict=True):
        wanted = (mean - mean.mean()) / torch.sqrt(mean.var(correction=0) + 1e-5)
        torch.testing.assert_close(clip, wanted)


def test_scale_and_shift_are_numbers_or_per_channel() -> None:
    q = posterior()
    torch.testing.assert_close(final_latents(q, None, SCALE_SHIFT), (q.mean - 0.1) * 0.18215)
    latents = final_latents(q, None, PER_CHANNEL)
    torch.testing.assert_close(latents[:, 1], (q.mean[:, 1] + 1.0) * 2.0)
    for rule in (SCALE_SHIFT, PER_CHANNEL):
        torch.testing.assert_close(undo_final_rule(rule, apply_final_rule(rule, q.mean)), q.mean)


@pytest.mark.parametrize("rule", [LAYER_NORM, SCALE_SHIFT, PER_CHANNEL])
def test_rules_survive_json_and_stored_float16(rule: dict[str, Any]) -> None:
    read = json.loads(json.dumps(rule))
    q = posterior()
    stored = Posterior(q.mean.half(), q.logvar.half())
    latents = final_latents(stored, torch.ones_like(stored.mean), read)
    assert latents.dtype == torch.float32
    wanted = final_latents(q, torch.ones_like(q.mean), rule)
    torch.testing.assert_close(latents, wanted, rtol=1e-2, atol=1e-2)


def test_a_layer_norm_cannot_be_undone() -> None:
    with pytest.raises(ConfigError, match="'layer_norm' has no inverse"):
        undo_final_rule(LAYER_NORM, posterior().mean)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({}, "is None"),
        ({"rule": "whiten"}, "'whiten'; this version knows layer_norm, scale_shift"),
        ({"rule": "layer_norm"}, r"needs \['eps', 'rule'\]"),
        ({"rule": "layer_norm", "eps": 1e-5, "affine": True}, "affine"),
        ({"rule": "scale_shift", "scale": 1.0}, "shift"),
    ],
)
def test_a_rule_this_version_does_not_know_is_refused(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_final_rule(rule)


def test_a_rule_for_another_number_of_channels_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"3.*channel.*16"):
        apply_final_rule(PER_CHANNEL, torch.zeros(1, 16, 4, 2, 2))


@pytest.mark.parametrize("shape", [(1, 4, 2, 2), (2, 4, 2, 2, 1), (1, 1, 1, 1, 1)])
@pytest.mark.parametrize("which", ["noise", "log-variance"])
def test_shapes_that_are_not_equal_are_refused_and_never_stretched(
    which: str, shape: tuple[int, ...]
) -> None:
    mean, other = torch.zeros(2, 4, 2, 2, 2), torch.zeros(shape)
    logvar, noise = (mean, other) if which == "noise" else (other, mean)
    rule = {"rule": "layer_norm", "eps": 1e-5}
    with pytest.raises(GeometryError, match=f"the {which} is .*but the posterior's mean is"):
        final_latents(Posterior(mean, logvar), noise, rule)


def test_moments_are_split_joined_and_clamped_in_one_place() -> None:
    moments = torch.randn(2, 6, 2, 3, 4) * 30
    posterior = Posterior.of_moments(moments)
    assert posterior.mean.shape == posterior.logvar.shape == (2, 3, 2, 3, 4)
    assert torch.equal(posterior.moments, moments)
    clamped = posterior.clamped()
    assert torch.equal(clamped.mean, posterior.mean)
    assert torch.equal(clamped.logvar, posterior.logvar.clamp(-30, 20))

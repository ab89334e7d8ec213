"""From raw latents, a Gaussian per clip, to final latents, what a diffusion model trains on.

A final rule is a small JSON object; it is written into a store and applied when reading:
  {"rule": "layer_norm", "eps": 1e-5}                  over all of (D, t, h, w) of a clip, no affine
  {"rule": "scale_shift", "scale": s, "shift": m}      (z - m) * s; numbers, or lists of one per
                                                       channel, or of a list per channel with one
                                                       per latent step
  {"rule": "repeat_channels", "scale": s, "shift": m}  the same, with all channels twice
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from reducio_latents.core.values import Posterior
from reducio_latents.errors import ConfigError, GeometryError

FinalRule = Mapping[str, Any]


def sample(posterior: Posterior, noise: Tensor) -> Tensor:
    """Draw from the posterior, given standard normal `noise` of its mean's shape; float32.

    Raises GeometryError if shapes are not equal.
    """
    _require_equal_shapes(posterior, noise)
    std = posterior.logvar.to(torch.float32, copy=True).mul_(0.5).exp_()
    return torch.addcmul(posterior.mean.float(), std, noise.float())


def kl_to_unit_normal(posterior: Posterior) -> Tensor:
    """Return KL(posterior || N(0, I)) of each clip, (B,), in nats. Kingma and Welling (2014)."""
    _require_equal_shapes(posterior)
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)


def final_latents(posterior: Posterior, noise: Tensor | None, rule: FinalRule) -> Tensor:
    """Return the final latents of the mean, or of mean + std * noise; float32, as the mean's shape.

    Raises ConfigError for a rule that is not known or does not fit, GeometryError for shapes that
    are not equal.
    """
    if noise is None:
        _require_equal_shapes(posterior)
    z = posterior.mean if noise is None else sample(posterior, noise)
    return apply_final_rule(rule, z)


def apply_final_rule(rule: FinalRule, z: Tensor) -> Tensor:
    """Return the final latents, float32, of samples or means z (B, D, ...)."""
    check_final_rule(rule)
    if z.ndim < 2:
        raise GeometryError(f"latents are {tuple(z.shape)}, but must be (B, D, ...).")
    return _RULES[rule["rule"]][1](z.float(), rule)


def _require_equal_shapes(posterior: Posterior, noise: Tensor | None = None) -> None:
    for name, found in (("log-variance", posterior.logvar), ("noise", noise)):
        if found is not None and found.shape != posterior.mean.shape:
            raise GeometryError(
                f"the {name} is {tuple(found.shape)}, but the posterior's mean is "
                f"{tuple(posterior.mean.shape)}; give both for the same clips."
            )


def undo_final_rule(rule: FinalRule, latents: Tensor) -> Tensor:
    """Return z of its final latents; ConfigError where the rule loses something.

    A layer norm does: Reducio's decoder takes final latents as they are.
    """
    check_final_rule(rule)
    if rule["rule"] == "layer_norm":
        raise ConfigError(f"the final rule {rule['rule']!r} has no inverse.")
    latents = latents.chunk(final_channels(rule, 1), dim=1)[-1]
    scale, shift = (_per_channel(rule[key], latents) for key in ("scale", "shift"))
    return latents.float() / scale + shift


def final_channels(rule: FinalRule, channels: int) -> int:
    """Return how many channels final latents have of raw ones with `channels`."""
    return 2 * channels if rule.get("rule") == "repeat_channels" else channels


def check_final_rule(rule: FinalRule) -> None:
    """Raise ConfigError unless `rule` is one that this version applies, with all that it needs."""
    name = rule.get("rule")
    if name not in _RULES:
        raise ConfigError(f"the final rule is {name!r}; this version knows {', '.join(_RULES)}.")
    wanted = {"rule", *_RULES[name][0]}
    if set(rule) != wanted:
        raise ConfigError(
            f"the final rule {name!r} has the keys {sorted(rule)}; it needs {sorted(wanted)}."
        )


def _layer_norm(z: Tensor, rule: FinalRule) -> Tensor:
    shape = z.shape[1:]
    if z.device.type == "cpu" and not z.requires_grad:
        # The same bits in half the time: PyTorch's kernel is vectorised for an affine map alone.
        return F.layer_norm(z, shape, torch.ones(shape), torch.zeros(shape), eps=rule["eps"])
    return F.layer_norm(z, shape, eps=rule["eps"])


def _scale_shift(z: Tensor, rule: FinalRule) -> Tensor:
    return (z - _per_channel(rule["shift"], z)) * _per_channel(rule["scale"], z)


def _per_channel(value: Any, z: Tensor) -> Tensor:
    """Return a number, or values as (D, 1, ...) or (D, t, 1, 1), against z (B, D, ...)."""
    values = torch.as_tensor(value, dtype=torch.float32, device=z.device)
    if values.ndim == 0:
        return values
    if values.ndim == 2 and z.ndim == 5:
        values = values[:, : z.shape[2]]
    if values.shape != z.shape[1 : 1 + values.ndim]:
        raise ConfigError(
            f"the final rule has values for {tuple(values.shape)} channels (and latent steps), the "
            f"latents are {tuple(z.shape[1:])}."
        )
    return values.reshape(*values.shape, *(1,) * (z.ndim - 1 - values.ndim))


_RULES: dict[str, tuple[tuple[str, ...], Callable[[Tensor, FinalRule], Tensor]]] = {
    "layer_norm": (("eps",), _layer_norm),
    "scale_shift": (("scale", "shift"), _scale_shift),
    "repeat_channels": (
        ("scale", "shift"),
        lambda z, rule: _scale_shift(z, rule).repeat(1, 2, *(1,) * (z.ndim - 2)),
    ),
}
"""What a rule needs beside its name, and what it does."""

"""The published objective, term by term, against numbers of the published implementation."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from reducio_latents.core.gaussian import kl_to_unit_normal
from reducio_latents.train import losses
from reducio_latents.train.discriminator import LAYERS_3D, Discriminators, PatchDiscriminator
from reducio_latents.vae import ReducioVAE, ReducioVAEConfig
from reducio_latents.vae.rule_weights import rule_weight

HERE = Path(__file__).parent
SHARED = Path(os.environ.get("REDUCIO_SHARED", HERE.parents[1] / "shared")) / "reference"
BATCH_NORM_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def rule_vae(width: int) -> ReducioVAE:
    vae = ReducioVAE(
        ReducioVAEConfig(width=width, content_width=width, decoder_width=width)
    ).requires_grad_(False)
    vae.load_state_dict({k: rule_weight(k, t.shape) for k, t in vae.state_dict().items()})
    return vae


def rule_discriminator() -> PatchDiscriminator:
    net = PatchDiscriminator(LAYERS_3D, sync_batchnorm=True).requires_grad_(False)
    state = {
        key: t
        if key.endswith(BATCH_NORM_BUFFERS)
        else rule_weight(f"loss.discriminator.{key}", t.shape)
        for key, t in net.state_dict().items()
    }
    net.load_state_dict(state)
    return net


def rule_video(seed: int, side_px: int) -> Tensor:
    x = np.random.RandomState(seed).standard_normal((2, 3, 16, side_px, side_px))
    return torch.from_numpy(np.tanh(0.7 * x).astype(np.float32))


def every_term(width: int, side_px: int) -> dict[str, float]:
    """Compute the objective of one batch as the published model has it, latents from the mean."""
    vae, net, x = rule_vae(width), rule_discriminator(), rule_video(21, side_px)
    last = vae.decoder.conv_out.get_parameter("weight").requires_grad_(True)
    y, posterior = vae(x)
    nll = losses.nll(losses.RECONSTRUCTIONS["l1"](y, x), logvar=0.0)
    g_loss = losses.adversarial(net(y))
    nll_grad, g_grad = (
        torch.autograd.grad(term, last, retain_graph=True)[0] for term in (nll, g_loss)
    )
    real, fake = net(x), net(y.detach())
    terms = {
        "nll_loss": nll,
        "penalty_loss": losses.outlier_penalty(y),
        "kl_loss": kl_to_unit_normal(posterior).mean(),
        "g_loss": g_loss,
        "nll_grads": nll_grad.norm(),
        "g_grads": g_grad.norm(),
        "d_weight": 0.05 * losses.adaptive_weight(nll_grad, g_grad),
        "logits_real": real.mean(),
        "logits_fake": fake.mean(),
        "disc_loss": losses.hinge_discriminator(real, fake),
    }
    found = {name: float(term.detach()) for name, term in terms.items()}
    found["total_loss_ae"] = (
        found["nll_loss"]
        + 1e-6 * found["kl_loss"]
        + found["penalty_loss"]
        + found["d_weight"] * found["g_loss"]
    )
    return found


NEAR = 1e-4
"""Relative: logits of either sign are averaged, so little is left of what float32 rounds."""
LOOSE = {"g_grads": 5e-3, "d_weight": 5e-3}
"""One unit sits on the kink of a LeakyReLU."""


@pytest.mark.skipif(not SHARED.is_dir(), reason="the reference numbers are not here")
def test_every_term_is_that_of_the_published_implementation() -> None:
    golden = json.loads((SHARED / "loss_narrow_ft4.json").read_text())
    wanted = golden["g_20000"] | golden["d_20000"]
    for name, value in every_term(width=32, side_px=64).items():
        assert value == pytest.approx(wanted[name], rel=LOOSE.get(name, NEAR)), name
    assert golden["g_0"]["weighted_g_loss"] == golden["d_0"]["disc_loss"] == 0.0


def test_every_term_stays_what_it_was_when_it_agreed_with_the_published_implementation() -> None:
    wanted = json.loads((HERE / "golden" / "train_losses.json").read_text())
    for name, value in every_term(width=8, side_px=32).items():
        assert value == pytest.approx(wanted[name], rel=LOOSE.get(name, NEAR)), name


@pytest.mark.skipif(not SHARED.is_dir(), reason="the reference numbers are not here")
def test_the_discriminator_has_the_published_keys_and_shapes() -> None:
    published = json.loads((SHARED / "state_dict_narrow_ft4.json").read_text())
    prefix = "loss.discriminator."
    wanted = {
        k.removeprefix(prefix): tuple(s) for k, s in published.items() if k.startswith(prefix)
    }
    found = PatchDiscriminator(LAYERS_3D, sync_batchnorm=True).state_dict()
    assert {key: tuple(t.shape) for key, t in found.items()} == wanted


def test_a_larger_pixel_variance_makes_errors_cheaper_and_costs_itself() -> None:
    error = torch.tensor(0.5)
    assert float(losses.nll(error, 0.0)) == 0.5
    assert float(losses.nll(error, 1.0)) == pytest.approx(0.5 / np.e + 1.0)


def test_the_penalty_is_of_bright_outliers_alone_and_falls_when_they_do() -> None:
    y = torch.zeros(1, 3, 2, 32, 32)
    y[..., 5, 5] = 1.0
    assert losses.outlier_penalty(torch.rand(1, 3, 2, 32, 32)) == 0
    assert losses.outlier_penalty(y) > losses.outlier_penalty(0.5 * y) > 0
    assert losses.outlier_penalty(-y) == 0


def test_the_hinge_loss_is_zero_only_beyond_the_margins() -> None:
    real, fake = torch.tensor([1.0, 2.0]), torch.tensor([-1.0, -3.0])
    assert losses.hinge_discriminator(real, fake) == 0
    assert losses.hinge_discriminator(fake, real) > losses.hinge_discriminator(fake, fake) > 0


def test_the_adversarial_weight_balances_the_gradients_and_carries_none() -> None:
    nll_grad, g_grad = torch.full((4,), 3.0), torch.full((4,), 0.5)
    weight = losses.adaptive_weight(nll_grad, g_grad)
    assert float(weight * g_grad.norm()) == pytest.approx(float(nll_grad.norm()), rel=1e-3)
    assert not losses.adaptive_weight(nll_grad.requires_grad_(), g_grad).requires_grad
    assert losses.adaptive_weight(nll_grad, torch.zeros(4)) == losses.WEIGHT_LIMIT


def test_the_discriminator_is_heard_from_its_first_step_on() -> None:
    assert [losses.started(step, 3) for step in range(5)] == [0, 0, 0, 1, 1]


def test_two_discriminators_see_clips_and_frames() -> None:
    nets = Discriminators(["3d", "2d"], sync_batchnorm=False)
    real, fake = nets(rule_video(0, 32), rule_video(1, 32))
    assert [tuple(x.shape) for x in real] == [(2, 1, 2, 2, 2), (32, 1, 2, 2)]
    assert [x.shape for x in fake] == [x.shape for x in real]
    weights = [p for p in nets.parameters() if p.ndim > 1]
    assert all(float(w.std()) == pytest.approx(0.02, rel=0.1) for w in weights if w.numel() > 5000)

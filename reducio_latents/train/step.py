"""One step: what the networks are asked, what the losses say, what changes, in that order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from reducio_latents.core.gaussian import kl_to_unit_normal
from reducio_latents.core.values import Posterior
from reducio_latents.errors import TrainingError
from reducio_latents.metrics.lpips import LPIPS
from reducio_latents.train import losses
from reducio_latents.train.batch import PixelBatch, clip_noise
from reducio_latents.train.config import TrainConfig
from reducio_latents.train.ranks import RunRanks
from reducio_latents.train.state import PRECISIONS, Networks, TrainState, update_average
from reducio_latents.video.pixels import to_unit

Terms = dict[str, Tensor]
"""Scalars by name."""

SCALED = ("grad_norm", "disc_grad_norm", "adversarial_weight", "total")
"""Values that are made of scaled gradients, where the loss is scaled."""


class NotFiniteError(TrainingError):
    """A term or a gradient of a step is infinite or not a number."""


@dataclass(frozen=True)
class Stepper:
    """Everything that a step needs and that no step changes, but for the state it is given."""

    config: TrainConfig
    networks: Networks
    lpips: LPIPS | None
    ranks: RunRanks


def train_step(state: TrainState, batches: Sequence[PixelBatch], run: Stepper) -> dict[str, float]:
    """Update the networks once; return the means over batches and ranks of every term.

    Raises NotFiniteError, before weights or optimisers change, where a term or gradient is not
    finite.
    """
    config = run.config
    listening = losses.started(state.step, config.adversarial.start_step)
    adversarial = bool(listening and len(state.discriminators))
    set_rates(state, config)
    state.vae_optimizer.zero_grad(set_to_none=True)
    state.discriminators.zero_grad(set_to_none=True)

    seen: list[Terms] = []
    for i, batch in enumerate(batches):
        with _averaging(run.networks, last=i == len(batches) - 1):
            seen.append(_backward(state, batch, run, adversarial, share=1 / len(batches)))
    terms = {name: torch.stack([s[name] for s in seen]).mean() for name in seen[0]}

    state.scaler.unscale_(state.vae_optimizer)
    limit = config.train.max_grad_norm or float("inf")
    terms["grad_norm"] = nn.utils.clip_grad_norm_(state.vae.parameters(), limit)
    if adversarial:
        assert state.discriminator_optimizer is not None
        state.scaler.unscale_(state.discriminator_optimizer)
        norm = nn.utils.clip_grad_norm_(state.discriminators.parameters(), float("inf"))
        terms["disc_grad_norm"] = norm
    means = run.ranks.mean(torch.stack([term.float() for term in terms.values()]))
    values = dict(zip(terms, means.tolist(), strict=True))  # waits for the device, once a step
    _require_finite(values, state, batches, run.ranks)

    state.scaler.step(state.vae_optimizer)
    if adversarial and state.discriminator_optimizer is not None:
        state.scaler.step(state.discriminator_optimizer)
    state.scaler.update()
    if state.average is not None and config.train.ema_decay is not None:
        decay = min(config.train.ema_decay, (1 + state.step) / (10 + state.step))
        update_average(state.average, state.vae, decay)
    state.step += 1
    state.batches += len(batches) * run.ranks.size
    return values


def set_rates(state: TrainState, config: TrainConfig) -> None:
    """Give both optimisers the learning rate of the coming step."""
    rate = config.train.lr * config.train.schedule.multiplier(state.step)
    for group in state.vae_optimizer.param_groups:
        group["lr"] = rate
    if state.discriminator_optimizer is not None:
        base = config.train.lr * config.adversarial.lr_factor
        for group in state.discriminator_optimizer.param_groups:
            group["lr"] = base * config.adversarial.schedule.multiplier(state.step)


def _backward(
    state: TrainState, batch: PixelBatch, run: Stepper, adversarial: bool, share: float
) -> Terms:
    """Add the gradients of one batch, times `share`; the discriminators see the same pictures."""
    device = run.ranks.device
    video = to_unit(batch.frames_BTHWC.to(device))
    if not run.config.train.channels_last:
        video = video.contiguous()
    height, width = video.shape[-2:]
    shape = run.config.model.geometry.latent_shape(video.shape[2], height, width)
    noise = clip_noise(batch.seeds, shape).to(device)

    # The discriminators only listen: the generator's loss must leave no gradient in them.
    state.discriminators.requires_grad_(False)
    with autocast(run.config, device):
        recon, posterior = run.networks.reconstruct(video, noise)
    terms = generator_terms(state, video, recon, posterior, run, adversarial)
    state.scaler.scale(terms["total"] * share).backward()  # type: ignore[no-untyped-call]

    state.discriminators.requires_grad_(True)
    if adversarial:
        with autocast(run.config, device):
            real, fake = run.networks.discriminate(video, recon.detach())
        terms |= discriminator_terms(real, fake)
        state.scaler.scale(terms["disc"] * share).backward()  # type: ignore[no-untyped-call]
    return {name: term.detach() for name, term in terms.items()}


def generator_terms(
    state: TrainState,
    video: Tensor,
    recon: Tensor,
    posterior: Posterior,
    run: Stepper,
    adversarial: bool,
) -> Terms:
    """Return every term of the VAE's objective; `total` is what the optimiser sees."""
    loss = run.config.loss
    pixel = losses.RECONSTRUCTIONS[loss.reconstruction](recon, video)
    reconstruction = pixel
    terms: Terms = {loss.reconstruction: pixel}
    if run.lpips is not None:
        frames = (x.transpose(1, 2).flatten(0, 1) for x in (video, recon))
        with autocast(run.config, recon.device):
            terms["lpips"] = run.lpips(*frames).float().mean()
        reconstruction = pixel + loss.perceptual_weight * terms["lpips"]
    terms["nll"] = losses.nll(reconstruction, loss.logvar)
    terms["kl"] = kl_to_unit_normal(posterior).mean()
    terms["penalty"] = losses.outlier_penalty(recon)
    total = terms["nll"] + loss.kl_weight * terms["kl"] + loss.penalty_weight * terms["penalty"]
    if adversarial:
        with autocast(run.config, recon.device):
            logits = state.discriminators.logits(recon)
        terms["adversarial"] = torch.stack([losses.adversarial(x.float()) for x in logits]).sum()
        terms["adversarial_weight"] = adversarial_weight(
            state, terms["nll"], terms["adversarial"], run
        )
        total = total + terms["adversarial_weight"] * terms["adversarial"]
    return {"total": total, **terms}


def adversarial_weight(state: TrainState, nll: Tensor, adversarial: Tensor, run: Stepper) -> Tensor:
    """Return the weight of the adversarial term for this batch, without gradient."""
    settings = run.config.adversarial
    if not settings.adaptive:
        return nll.new_tensor(settings.weight)
    last = state.vae.decoder.conv_out.get_parameter("weight")
    scale = state.scaler.get_scale()
    grads = [
        # Scaled on the way, as half precision needs it, and unscaled after.
        torch.autograd.grad(term * scale, last, retain_graph=True)[0].float() / scale
        for term in (nll, adversarial)
    ]
    if settings.sync:
        grads = [run.ranks.mean(grad) for grad in grads]
    return settings.weight * losses.adaptive_weight(*grads)


def discriminator_terms(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Terms:
    """Return the discriminators' loss, summed over them, and their mean logits."""
    pairs = [(r.float(), f.float()) for r, f in zip(real, fake, strict=True)]
    return {
        "disc": torch.stack([losses.hinge_discriminator(r, f) for r, f in pairs]).sum(),
        "logits_real": torch.stack([r.mean() for r, _ in pairs]).mean(),
        "logits_fake": torch.stack([f.mean() for _, f in pairs]).mean(),
    }


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[object]:
    """Run the networks in the configured precision."""
    dtype = PRECISIONS[config.train.precision]
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def _averaging(networks: Networks, *, last: bool) -> AbstractContextManager[object]:
    """Average gradients over ranks with the last batch of a step, and only then."""
    if last:
        return nullcontext()
    stack = ExitStack()
    for network in (networks.reconstruct, networks.discriminate):
        if isinstance(network, DistributedDataParallel):
            stack.enter_context(network.no_sync())
    return stack


def _require_finite(
    values: dict[str, float], state: TrainState, batches: Sequence[PixelBatch], ranks: RunRanks
) -> None:
    # A scaled gradient that overflows is the scaler's business: it skips the update.
    scaled = SCALED if state.scaler.is_enabled() else ()
    wrong = [k for k, value in values.items() if not math.isfinite(value) and k not in scaled]
    if wrong:
        clips = "; ".join(str(clip) for batch in batches for clip in batch.clips)
        some, whose = (" on some rank", "this rank's") if ranks.size > 1 else ("", "its")
        raise NotFiniteError(
            f"step {state.step + 1}: {', '.join(wrong)} not finite{some}; nothing of this step was "
            f"kept. Clips of {whose} batch: {clips}. Lower train.lr, or look at them."
        )

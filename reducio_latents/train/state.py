"""What a run holds: networks, average, optimisers, and how far it has come."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reducio_latents.train.config import FREEZABLE, OptimisationConfig, TrainConfig
from reducio_latents.train.discriminator import Discriminators
from reducio_latents.train.ranks import RunRanks
from reducio_latents.vae import ReducioVAE
from reducio_latents.vae.blocks import ResidualBlock

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Best:
    """The validation that went best so far."""

    step: int
    psnr_db: float


@dataclass(kw_only=True)
class TrainState:
    """Everything that a checkpoint must hold to continue bit for bit.

    There is no state of random numbers: each is drawn from (seed, epoch, clip).
    """

    vae: ReducioVAE
    average: ReducioVAE | None
    """Running average of the weights, if the run keeps one."""
    discriminators: Discriminators
    vae_optimizer: torch.optim.Optimizer
    discriminator_optimizer: torch.optim.Optimizer | None
    scaler: torch.amp.GradScaler
    step: int = 0
    """Updates done."""
    batches: int = 0
    """Batches that all ranks together have taken from the order of clips."""
    best: Best | None = None

    @property
    def measured(self) -> ReducioVAE:
        """The weights that are validated: the average, if there is one."""
        return self.vae if self.average is None else self.average


def build_state(config: TrainConfig, device: torch.device) -> TrainState:
    """Build networks and optimisers at step 0; equal for equal seeds, on every rank."""
    train = config.train
    torch.manual_seed(train.seed)
    vae = ReducioVAE(config.model).to(device)
    discriminators = Discriminators(
        config.adversarial.discriminators, sync_batchnorm=config.adversarial.sync
    ).to(device)
    for name in train.freeze:
        for module in FREEZABLE[name]:
            vae.get_submodule(module).requires_grad_(False)
    if train.channels_last:
        vae.lay_out(torch.channels_last_3d)
    average = None
    if train.ema_decay is not None:
        average = deepcopy(vae).eval().requires_grad_(False)
    return TrainState(
        vae=vae,
        average=average,
        discriminators=discriminators,
        vae_optimizer=_adam(vae, train),
        discriminator_optimizer=_adam(discriminators, train) if len(discriminators) else None,
        scaler=torch.amp.GradScaler(device.type, enabled=train.precision == "fp16"),
    )


def _adam(module: nn.Module, train: OptimisationConfig) -> torch.optim.Optimizer:
    # All parameters, frozen ones too, so that a resumed run may freeze others.
    return torch.optim.Adam(module.parameters(), lr=train.lr, betas=train.betas, eps=train.eps)


@dataclass(frozen=True)
class Networks:
    """The networks as a step calls them: distributed, compiled, checkpointed as the run wants."""

    reconstruct: nn.Module
    """(video, noise) -> (reconstruction, posterior)."""
    discriminate: nn.Module
    """(real, fake) -> (logits of real, logits of fake), a list each."""


def prepare_networks(state: TrainState, train: OptimisationConfig, ranks: RunRanks) -> Networks:
    """Return the state's networks, ready for `train_step`."""
    blocks = [module for module in state.vae.modules() if isinstance(module, ResidualBlock)]
    if train.compile:  # block by block: quick, and the last layer's gradient stays cheap to ask for
        from torch._dynamo import config  # slow to import

        # All blocks share one forward, of which dynamo keeps but a few versions by default.
        config.cache_size_limit = max(config.cache_size_limit, 4 * len(blocks))
        for block in blocks:
            block.compile(dynamic=False)
    if train.checkpointing:
        for block in blocks:
            _keep_no_activations(block)
    return Networks(ranks.distribute(state.vae), ranks.distribute(state.discriminators))


def _keep_no_activations(block: ResidualBlock) -> None:
    """Have the block's forward pass run again in the backward pass."""
    whole = block.forward

    def forward(x: Tensor, pads: Sequence[int] = ()) -> Tensor:
        if not torch.is_grad_enabled():
            return whole(x, pads)
        out: Tensor = checkpoint(whole, x, pads, use_reentrant=False)
        return out

    block.forward = forward  # type: ignore[method-assign]


@torch.no_grad()
def update_average(average: nn.Module, current: nn.Module, decay: float) -> None:
    """Set every weight of `average` to decay * its own + (1 - decay) * the current one.

    Buffers, which nothing trains, are taken as they are.
    """
    for slow, now in zip(average.parameters(), current.parameters(), strict=True):
        slow.lerp_(now, 1 - decay)
    for kept, buffer in zip(average.buffers(), current.buffers(), strict=True):
        kept.copy_(buffer)

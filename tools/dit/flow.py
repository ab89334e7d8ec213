"""Flow matching along straight lines, its random draws, and sampling by Euler's method.

x is data, e noise, and t runs from data at 0 to noise at 1:

    x_t = (1 - t) x + t e          Liu et al. (2023), eq. 1; Lipman et al. (2023), eq. 22, sigma_min
                                   being 0 and time running the other way
    dx_t / dt = v = e - x          what the network learns, by a squared error: Lipman, eq. 23
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dit.model import Conditions

Velocity = Callable[[Tensor, Tensor, Conditions], Tensor]
"""(x_t (B, D, t, h, w), t (B,), conditions) -> v, of the shape of x_t."""

TIMES = ("logit-normal", "uniform")
TRAINING, SAMPLING = range(2)
"""What random numbers are for."""


class Draw(NamedTuple):
    """The random part of a training step."""

    noise: Tensor
    """Standard normal, of the latents' shape."""
    time: Tensor
    """(B,), in [0, 1]."""
    keep: Tensor
    """bool (B,), False where the conditions are left out."""


def draw(
    shape: Sequence[int], *, seed: int, step: int, first: int, times: str, dropout: float
) -> Draw:
    """Draw for latents of `shape`, whose first sample is number `first` of the global batch.

    Every sample has a generator of its own, a pure function of (seed, step, its number): a resumed
    run draws what it would have drawn, and so does one of another number of ranks. `logit-normal`
    times are sigmoid(N(0, 1)): Esser et al. (2024), section 3.1. Without its conditions is each
    sample with the probability `dropout`: Ho and Salimans (2022), algorithm 1.
    """
    noise, time, keep = torch.empty(*shape), torch.empty(shape[0]), torch.empty(shape[0])
    for i in range(shape[0]):
        generator = generator_of(seed, TRAINING, step, first + i)
        noise[i].normal_(generator=generator)
        if times == "uniform":
            time[i].uniform_(generator=generator)
        else:
            time[i].normal_(generator=generator).sigmoid_()
        keep[i].uniform_(generator=generator)
    return Draw(noise, time, keep >= dropout)


def start_noise(shape: Sequence[int], *, seed: int, first: int) -> Tensor:
    """Return the noise that samples `first`, `first + 1`, ... start from, always the same."""
    noise = torch.empty(*shape)
    for i in range(shape[0]):
        noise[i].normal_(generator=generator_of(seed, SAMPLING, first + i))
    return noise


def generator_of(*key: int) -> torch.Generator:
    """Return a generator that the key alone decides."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def flow_loss(network: Velocity, x: Tensor, drawn: Draw, conditions: Conditions) -> Tensor:
    """Return the mean squared error of the predicted velocity, a scalar, float32."""
    t = drawn.time.view(-1, 1, 1, 1, 1)
    x_t = (1 - t) * x + t * drawn.noise
    v = drawn.noise - x
    return F.mse_loss(network(x_t, drawn.time, conditions).float(), v)


@torch.no_grad()
def sample_euler(
    network: Velocity, noise: Tensor, conditions: Conditions, *, steps: int, guidance: float
) -> Tensor:
    """Follow the velocity from noise at t = 1 to data at t = 0 in equal steps; float32.

    With a guidance other than 1 it is v_without + guidance * (v_with - v_without): Ho and Salimans
    (2022), eq. 6, where guidance is 1 + w.
    """
    x = noise
    for i in range(steps):
        time = x.new_full((len(x),), 1 - i / steps)
        v = network(x, time, conditions).float()
        if guidance != 1:
            without = network(x, time, conditions.without()).float()
            v = without + guidance * (v - without)
        x = x - v / steps
    return x

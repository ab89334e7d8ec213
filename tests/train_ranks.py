"""Steps on made-up clips, alone or as one of several ranks.

`python -m tests.train_ranks --compare STEPS` trains on one rank and on two of half the batch, and
prints how far apart each value ever was, and since when; the tests do the same with fewer steps.
The norms of so small a model see four values each, so differences of rounding grow severalfold a
step until nothing is alike. `--exact` trains in float64, without discriminators: there they take
ten steps to be seen at all, and before that every digit is the same.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from reducio_latents.train.batch import Batch, ClipName
from reducio_latents.train.config import (
    AdversarialConfig,
    LossConfig,
    OptimisationConfig,
    TrainConfig,
)
from reducio_latents.train.ranks import Ranks, join_ranks
from reducio_latents.train.schedule import Schedule
from reducio_latents.train.state import TrainState, build_state, prepare_networks
from reducio_latents.train.step import Stepper, train_step
from reducio_latents.vae import ReducioVAEConfig

TINY = ReducioVAEConfig(width=8, content_width=8, decoder_width=8)
STEPS = 2
CLIPS_A_STEP = 2
SEEN = 1e-6
"""What single precision cannot hide."""

Values = list[dict[str, float]]
"""What `train_step` returned, step by step."""


class Difference(nn.Module):
    """Stands in for LPIPS, whose weights are nowhere near: the mean difference of each frame."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x - y).abs().flatten(1).mean(1)


def tiny_config(
    train: OptimisationConfig | None = None, adversarial: AdversarialConfig | None = None
) -> TrainConfig:
    return TrainConfig(
        model=TINY,
        loss=LossConfig(perceptual="none"),
        # With Adam's usual eps, weights without a gradient follow the sign of its rounding noise.
        train=train or OptimisationConfig(precision="fp32", lr=1e-4, eps=1e-3),
        adversarial=adversarial
        or AdversarialConfig(start_step=1, schedule=Schedule(), lr_factor=1.0),
    )


def made_up_batch(numbers: Sequence[int], side_px: int = 32) -> Batch:
    """Return clips of four coloured squares that depend on their numbers alone."""
    # Frames that differ as a whole: in so small a model some norms see one value of each.
    clips = [np.random.RandomState(n).randint(0, 256, (16, 2, 2, 3)) for n in numbers]
    squares = torch.from_numpy(np.stack(clips)).to(torch.uint8)
    half = side_px // 2
    frames = squares.repeat_interleave(half, 2).repeat_interleave(half, 3)
    names = tuple(ClipName(f"{n}.mp4", 0.0) for n in numbers)
    return Batch(frames, tuple(numbers), names)


def run_steps(state: TrainState, config: TrainConfig, ranks: Ranks, steps: int = STEPS) -> Values:
    """Do steps of CLIPS_A_STEP clips, shared by the ranks and their accumulated batches."""
    run = Stepper(config, prepare_networks(state, config.train, ranks), None, ranks)
    each = CLIPS_A_STEP // (ranks.size * config.train.accumulate)
    values = []
    for step in range(steps):
        batches = []
        for i in range(config.train.accumulate):
            first = step * CLIPS_A_STEP + (i * ranks.size + ranks.rank) * each
            batches.append(made_up_batch(range(first, first + each)))
        values.append(train_step(state, batches, run))
    return values


def weights(state: TrainState) -> dict[str, Tensor]:
    return {
        **state.vae.state_dict(),
        **{f"discriminators.{k}": t for k, t in state.discriminators.state_dict().items()},
    }


def start_ranks(arguments: Sequence[str], size: int) -> list[subprocess.Popen[str]]:
    """Start `python -m ARGUMENTS` as the ranks of one run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(size),
        "OMP_NUM_THREADS": "1",
    }
    return [
        subprocess.Popen(
            [sys.executable, "-m", *arguments],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]


def train_both_ways(steps: int, out: Path, exact: bool = False) -> tuple[Values, Values]:
    """Train on one rank, and at the same time on two that share the same batches."""
    words = ["tests.train_ranks", "--steps", str(steps), "--out", str(out)]
    ranks = start_ranks([*words, "--exact"] if exact else words, 2)
    config = rank_config(exact)
    alone = Ranks(0, 1, torch.device("cpu"))
    values = run_steps(rank_state(config, alone, exact), config, alone, steps)
    outputs = [process.communicate()[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], outputs
    return values, json.loads(out.read_text())


def rank_config(exact: bool) -> TrainConfig:
    if not exact:
        return tiny_config()
    config = tiny_config(
        OptimisationConfig(precision="fp32", lr=2e-5), AdversarialConfig(discriminators=())
    )
    return replace(config, model=replace(TINY, target="difference"))


def rank_state(config: TrainConfig, ranks: Ranks, exact: bool) -> TrainState:
    state = build_state(config, ranks.device)
    if exact:
        state.vae.double()
        state.vae.register_forward_pre_hook(lambda _, inputs: tuple(x.double() for x in inputs))
    return state


def train_as_a_rank(steps: int, out: Path, exact: bool) -> None:
    with join_ranks() as ranks:
        config = rank_config(exact)
        values = run_steps(rank_state(config, ranks, exact), config, ranks, steps)
        if ranks.first:
            out.write_text(json.dumps(values))


def compare(steps: int, exact: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        alone, together = train_both_ways(steps, Path(folder) / "values.json", exact)
    for name in alone[-1]:
        pairs = [(a[name], b[name]) for a, b in zip(alone, together, strict=True) if name in a]
        apart = [abs(a - b) / max(abs(a), abs(b), 1e-12) for a, b in pairs]
        seen = next((i for i, value in enumerate(apart) if value > SEEN), len(apart))
        print(f"{name:20} apart {max(apart):.1e}, by more than {SEEN} from step {seen + 1} on")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compare", type=int, metavar="STEPS")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--exact", action="store_true", help="In float64, without discriminators.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.compare:
        compare(arguments.compare, arguments.exact)
    else:
        train_as_a_rank(arguments.steps, arguments.out, arguments.exact)


if __name__ == "__main__":
    main()

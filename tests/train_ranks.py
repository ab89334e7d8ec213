"""Steps on made-up clips, alone or as one of several ranks.

`python -m tests.train_ranks --compare STEPS` trains on one rank, and on two that share its batches,
with both discriminators, adaptive weight, accumulation, clipping and average, and prints how far
apart all values and weights come. The yardstick is how far one rank comes from itself when each of
its first weights is changed by a rounding error.

Gradients jump at the sign in L1 and at the bend of LeakyReLU, and a jump makes a rounding error
large. The run is therefore trained on L2, with SiLU in the discriminators. `--kinks` puts L1 and
LeakyReLU back: one rank then comes as far from itself as two ranks do. `--resynchronised` starts
every step from the state of the one rank, so that nothing can grow. `--exact` trains in float64,
where jumps are too rare to be met; it takes several times as long. `--thin` has an eighth of the
discriminators' filters, and takes half as long.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from reducio_latents.train import discriminator
from reducio_latents.train import step as training
from reducio_latents.train.batch import ClipName, PixelBatch
from reducio_latents.train.config import (
    AdversarialConfig,
    LossConfig,
    OptimisationConfig,
    Schedule,
    TrainConfig,
)
from reducio_latents.train.discriminator import LAYERS_2D, LAYERS_3D, Layer
from reducio_latents.train.ranks import RunRanks, join_ranks
from reducio_latents.train.state import TrainState, build_state, prepare_networks
from reducio_latents.train.step import Stepper, train_step
from reducio_latents.vae import ReducioVAEConfig
from reducio_latents.video.pixels import to_unit
from tests.forked import Python, free_port

QUICK: Literal["fp32", "bf16"] = (
    "bf16" if torch.backends.cpu.get_cpu_capability() == "AVX512" else "fp32"
)
"""The precision in which a step takes least: a third of the other, or a fifth on older CPUs."""
TINY = ReducioVAEConfig(width=8, content_width=8, decoder_width=8)
STEPS = 2
CLIPS_A_STEP = 2
ALONE = RunRanks(0, 1, torch.device("cpu"))

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


def made_up_batch(numbers: Sequence[int], side_px: int = 32, frames: int = 16) -> PixelBatch:
    """Return clips of four coloured squares that depend on their numbers alone."""
    # Frames that differ as a whole: in so small a model some norms see one value of each.
    clips = [np.random.RandomState(n).randint(0, 256, (frames, 2, 2, 3)) for n in numbers]
    squares = torch.from_numpy(np.stack(clips)).to(torch.uint8)
    half = side_px // 2
    pixels = squares.repeat_interleave(half, 2).repeat_interleave(half, 3)
    names = tuple(ClipName(f"{n}.mp4", 0.0) for n in numbers)
    return PixelBatch(pixels, tuple(numbers), names)


def step_batches(config: TrainConfig, ranks: RunRanks, step: int, clips: int) -> list[PixelBatch]:
    """Return this rank's share of the clips of a step, a batch for each that is accumulated."""
    each = clips // (ranks.size * config.train.accumulate)
    firsts = [
        step * clips + (i * ranks.size + ranks.rank) * each for i in range(config.train.accumulate)
    ]
    return [made_up_batch(range(first, first + each)) for first in firsts]


def run_steps(
    state: TrainState,
    config: TrainConfig,
    ranks: RunRanks,
    steps: int = STEPS,
    clips: int = CLIPS_A_STEP,
) -> Values:
    """Do steps of so many clips, shared by the ranks and their accumulated batches."""
    run = stepper(state, config, ranks)
    return [
        train_step(state, step_batches(config, ranks, step, clips), run) for step in range(steps)
    ]


def stepper(state: TrainState, config: TrainConfig, ranks: RunRanks) -> Stepper:
    return Stepper(config, prepare_networks(state, config.train, ranks), None, ranks)


def weights(state: TrainState) -> dict[str, Tensor]:
    return {
        **state.vae.state_dict(),
        **{f"discriminators.{k}": t for k, t in state.discriminators.state_dict().items()},
    }


def start_ranks(arguments: Sequence[str], size: int) -> list[Python]:
    """Start `python -m ARGUMENTS` as the ranks of one run."""
    shared = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(size),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",  # gloo, whatever the machine
    }
    return [
        Python(["-m", *arguments], shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(size)
    ]


def thinned(layers: Sequence[Layer], times: int) -> tuple[Layer, ...]:
    """Return layers with so many times fewer filters."""
    return tuple((-(-filters // times), *shape) for filters, *shape in layers)  # type: ignore[misc]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A training on one rank and on two, side by side."""

    steps: int
    clips: int = 4
    """In a step."""
    accumulate: int = 2
    """Batches in which a rank sees its clips of a step."""
    kinks: bool = False
    """L1 and LeakyReLU, as published; else L2 and SiLU."""
    resynchronised: bool = False
    """Two ranks start every step from the state of the one."""
    exact: bool = False
    """In float64."""
    thin: bool = False
    """An eighth of the discriminators' filters."""
    yardstick: bool = False
    """Also train one rank whose first weights are wrong by a rounding error each."""

    @property
    def config(self) -> TrainConfig:
        """Everything on; rate and Adam as published, the discriminators' rate ten times that."""
        return TrainConfig(
            # In so small a model of videos, norms of four values each make rounding errors large.
            model=replace(TINY, target="difference"),
            loss=LossConfig(perceptual="none", reconstruction="l1" if self.kinks else "l2"),
            train=OptimisationConfig(
                precision="fp32", accumulate=self.accumulate, max_grad_norm=3.0, ema_decay=0.99
            ),
            adversarial=AdversarialConfig(
                discriminators=("3d", "2d"),
                start_step=min(1, self.steps - 1),
                schedule=Schedule(),
                lr_factor=1.0,
            ),
        )

    def begin(self, config: TrainConfig) -> TrainState:
        if self.exact:  # even what the step itself adds up in float32
            torch.set_default_dtype(torch.float64)
            torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
            training.to_unit = partial(to_unit, dtype=torch.float64)  # type: ignore[attr-defined]
        filters = 8 if self.thin else 1
        with (
            mock.patch.object(discriminator, "LAYERS_3D", thinned(LAYERS_3D, filters)),
            mock.patch.object(discriminator, "LAYERS_2D", thinned(LAYERS_2D, filters)),
        ):
            state = build_state(config, ALONE.device)
        for layers in state.discriminators.modules():
            if isinstance(layers, nn.Sequential) and not self.kinks:
                for i, layer in enumerate(layers):
                    if isinstance(layer, nn.LeakyReLU):
                        layers[i] = nn.SiLU()
        return state

    def options(self) -> list[str]:
        """Return the command line that says the same."""
        chosen = [f"--{name}" for name in FLAGS if getattr(self, name)]
        numbers = ("steps", "clips", "accumulate")
        return [*(f"--{name}={getattr(self, name)}" for name in numbers), *chosen]


FLAGS = ("kinks", "resynchronised", "exact", "thin", "yardstick")

Apart = dict[str, list[float]]
"""How far apart every value and network was after each step, as a share of what it is.

Of a value: its mean size. Of weights: how far they had moved since the runs were last the same.
"""


def compare(trial: Trial, folder: Path) -> list[Apart]:
    """Return how far two ranks come from one, and how far its yardstick if there is one."""
    ranks = start_ranks(["tests.train_ranks", *trial.options(), "--out", str(folder)], 2)
    outputs = [process.communicate() for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], outputs
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def train_side_by_side(trial: Trial, ranks: RunRanks) -> Apart:
    """Train on all ranks and on the first one alone; return how far apart they come.

    On the other rank the yardstick is trained alone, and compared instead.
    """
    together = trial.begin(trial.config)
    # What is alone must not meet other ranks in its batch norms.
    adversarial = replace(trial.config.adversarial, sync=False)
    config = replace(trial.config, adversarial=adversarial)
    alone = trial.begin(config)
    run, own = stepper(together, trial.config, ranks), stepper(alone, config, ALONE)

    start = parts(together)
    values: list[tuple[dict[str, float], dict[str, float]]] = []
    apart: Apart = {name: [] for name in start}
    for step in range(trial.steps):
        if trial.resynchronised:
            if ranks.first:
                copy_state(alone, together)
            for tensor in tensors(together):
                dist.broadcast(tensor, 0)
            start = parts(together)
        mine = {}
        if ranks.first or trial.yardstick:
            if not ranks.first and (step == 0 or trial.resynchronised):
                copy_state(together, alone)
                add_rounding_errors(alone)
            mine = train_step(alone, step_batches(config, ALONE, step, trial.clips), own)
        shared = train_step(together, step_batches(trial.config, ranks, step, trial.clips), run)

        reference, wanted = parts(alone), [mine]
        for tensor in reference.values():
            dist.broadcast(tensor, 0)
        dist.broadcast_object_list(wanted, 0)
        values.append((wanted[0], shared if ranks.first else mine))
        for name, found in parts(together if ranks.first else alone).items():
            moved = float((reference[name] - start[name]).norm())
            if moved:  # discriminators rest in the first step
                apart[name].append(float((found - reference[name]).norm()) / moved)
    if ranks.first or trial.yardstick:
        apart |= compare_values(values)
    return apart


def compare_values(values: Sequence[tuple[dict[str, float], dict[str, float]]]) -> Apart:
    """Return how far apart two runs were in each value of the last step, for all steps with it."""
    apart = {}
    for name in values[-1][0]:
        pairs = [(a[name], b[name]) for a, b in values if name in a]
        size = sum(abs(a) for a, _ in pairs) / len(pairs)
        apart[name] = [abs(a - b) / size for a, b in pairs]
    return apart


def parts(state: TrainState) -> dict[str, Tensor]:
    """Return copies of all that a step changes in the networks, in one row each."""
    assert state.average is not None
    statistics = [x for x in state.discriminators.buffers() if x.is_floating_point()]
    found = {
        "VAE": state.vae.parameters(),
        "average": state.average.parameters(),
        "discriminators": state.discriminators.parameters(),
        "batch statistics": statistics,
    }
    return {name: nn.utils.parameters_to_vector(x).detach() for name, x in found.items()}


def tensors(state: TrainState) -> list[Tensor]:
    """Return all tensors that a step changes: those of the networks, and Adam's."""
    assert state.average is not None
    assert state.discriminator_optimizer is not None
    found: list[Tensor] = []
    for net in (state.vae, state.average, state.discriminators):
        found += net.state_dict().values()
    for optimizer in (state.vae_optimizer, state.discriminator_optimizer):
        for moments in optimizer.state.values():
            found += moments.values()
    return found


def copy_state(source: TrainState, target: TrainState) -> None:
    for there, here in zip(tensors(source), tensors(target), strict=True):
        here.copy_(there)


@torch.no_grad()
def add_rounding_errors(state: TrainState) -> None:
    """Change each weight by about as much as its last digit is worth."""
    generator = torch.Generator().manual_seed(1)
    for weight in (*state.vae.parameters(), *state.discriminators.parameters()):
        error = torch.finfo(weight.dtype).eps * torch.randn(weight.shape, generator=generator)
        weight.mul_(1 + error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compare", type=int, metavar="STEPS")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--clips", type=int, default=Trial.clips, help="In a step.")
    parser.add_argument("--accumulate", type=int, default=Trial.accumulate)
    parser.add_argument("--out", type=Path, help="Be one of the ranks, and write there.")
    for flag in FLAGS:
        parser.add_argument(f"--{flag}", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    flags = {flag: getattr(arguments, flag) for flag in FLAGS}
    if arguments.out:
        trial = Trial(
            steps=arguments.steps, clips=arguments.clips, accumulate=arguments.accumulate, **flags
        )
        with join_ranks() as ranks:
            apart = train_side_by_side(trial, ranks)
            (arguments.out / f"{ranks.rank}.json").write_text(json.dumps(apart))
        return
    flags["yardstick"] = True
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(
            steps=arguments.compare,
            clips=arguments.clips,
            accumulate=arguments.accumulate,
            **flags,
        )
        ranks_apart, yardstick = compare(trial, Path(folder))
    print(f"{'largest, last':20} two ranks from one   one from itself")
    for name, course in ranks_apart.items():
        cells = [f"{max(x):8.1e} {x[-1]:8.1e}" for x in (course, yardstick[name])]
        print(f"{name:20} {'    '.join(cells)}")


if __name__ == "__main__":
    main()

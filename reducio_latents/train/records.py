"""What a run writes while it trains: CSV always, pictures, TensorBoard and wandb where wanted."""

from __future__ import annotations

import csv
import io
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reducio_latents.core.images import encode_image
from reducio_latents.errors import ConfigError
from reducio_latents.files import LocalFiles
from reducio_latents.train.config import TrainConfig
from reducio_latents.train.validate import Pair, compare

TRAIN_COLUMNS = (
    "step", "epoch", "total", "nll", "l1", "l2", "lpips", "kl", "penalty", "adversarial",
    "adversarial_weight", "disc", "logits_real", "logits_fake", "grad_norm", "disc_grad_norm",
    "lr", "clips_per_s", "waiting_share", "failed_clips",
)  # fmt: skip
VALIDATION_COLUMNS = (
    "step", "clips", "psnr_db", "ssim", "lpips", "l1", "clip_psnr_db", "content_psnr_db",
)  # fmt: skip
WANDB_ID = "wandb-id.txt"
PICTURE_FRAMES = 8
"""Frames of a clip that a PNG shows; the video shows all."""


class CsvTable:
    """A CSV file of numbers by step, appended to; what lies after `step` is cut off first."""

    def __init__(self, path: Path, columns: Sequence[str], step: int) -> None:
        self._path, self._columns = path, list(columns)
        rows = []
        if path.exists():
            with path.open(newline="") as file:
                # A run that was killed may have left a torn last line.
                whole = (row for row in csv.DictReader(file) if None not in row.values())
                rows = [row for row in whole if int(row["step"]) <= step]
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        LocalFiles(path.parent).write(path.name, text.getvalue().encode())

    def add(self, row: Mapping[str, float]) -> None:
        with self._path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns, restval="", lineterminator="\n").writerow(row)


class Records:
    """Where the first rank writes numbers and pictures of a run that stands at `step`."""

    def __init__(
        self, out: Path, config: TrainConfig, step: int, wandb_key: str | None = None
    ) -> None:
        self._out, self._rate_fps = out, config.data.clip.rate_fps
        self._train = CsvTable(out / "train.csv", TRAIN_COLUMNS, step)
        self._validation = CsvTable(out / "validation.csv", VALIDATION_COLUMNS, step)
        self._board = _open_tensorboard(out, step) if config.log.tensorboard else None
        self._wandb = None
        if config.log.wandb != "off":
            self._wandb = open_wandb(out, config, wandb_key)

    def train(self, step: int, values: Mapping[str, float]) -> None:
        self._train.add({"step": step, **values})
        self._publish("train", step, values)

    def validation(self, step: int, values: Mapping[str, float]) -> None:
        self._validation.add({"step": step, **values})
        self._publish("validation", step, values)

    def pictures(self, name: str, step: int, pairs: Sequence[Pair]) -> None:
        """Write originals above reconstructions as `pictures/NAME-STEP` .png and .mp4."""
        if not pairs:
            return
        sheet, video = write_pictures(self._out, name, step, pairs, self._rate_fps)
        if self._board is not None:
            self._board.add_image(f"{name}/pictures", sheet.numpy(), step, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            self._wandb.log({f"{name}/video": wandb.Video(str(video), format="mp4")}, step=step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _publish(self, split: str, step: int, values: Mapping[str, float]) -> None:
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{split}/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log({f"{split}/{k}": v for k, v in values.items()}, step=step)


def write_pictures(
    out: Path, name: str, step: int, pairs: Sequence[Pair], rate_fps: float
) -> tuple[Tensor, Path]:
    """Write `pictures/NAME-STEP` .png and .mp4 of pairs of the first one's size; return both."""
    from reducio_latents.video.write import write_mp4

    pairs = [pair for pair in pairs if pair.original.shape == pairs[0].original.shape]
    stem = f"pictures/{name}-{step:08d}"
    sheet = pairs_sheet(pairs)
    LocalFiles(out).write(f"{stem}.png", encode_image(sheet.numpy(), "png"))
    video = out / f"{stem}.mp4"
    write_mp4(video, compare(pairs).numpy(), rate_fps)
    return sheet, video


def pairs_sheet(pairs: Sequence[Pair]) -> Tensor:
    """Return a picture (rows, columns, 3): for each clip a row of originals above its own."""
    total = pairs[0].original.shape[0]
    frames = torch.linspace(0, total - 1, min(PICTURE_FRAMES, total)).round().long()
    rows = [torch.cat(list(clip[frames]), dim=1) for pair in pairs for clip in pair]
    return torch.cat(rows, dim=0)


def _open_tensorboard(out: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as err:
        raise ConfigError(
            f"TensorBoard cannot be imported ({err}). pip install 'reducio-latents[train]', or "
            "--set log.tensorboard=false."
        ) from err
    return SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)


def open_wandb(out: Path, config: TrainConfig, key: str | None) -> Any:
    """Start, or continue, this folder's wandb run; the key is kept nowhere.

    Raises ConfigError where wandb is missing or does not start.
    """
    try:
        import wandb
    except ImportError as err:
        raise ConfigError(
            f"wandb cannot be imported ({err}). pip install wandb, or --set log.wandb=off."
        ) from err
    files = LocalFiles(out)
    if files.size(WANDB_ID) is None:
        files.write(WANDB_ID, secrets.token_hex(8).encode())
    try:
        return wandb.init(
            project=config.log.wandb_project,
            name=out.name,
            dir=str(out),
            id=files.read(WANDB_ID).decode(),
            resume="allow",
            mode=config.log.wandb,
            config=asdict(config),
            settings=None if key is None else wandb.Settings(api_key=key),
        )
    except (wandb.Error, ValueError) as err:  # a key of a wrong form is a ValueError
        raise ConfigError(
            f"wandb does not start: {' '.join(str(err).split())} --set log.wandb=offline keeps "
            "everything here, for `wandb sync` later."
        ) from err

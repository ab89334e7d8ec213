"""The recipe of the small model: one command, weights that load, a card that tells the truth."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from reducio_latents import load_autoencoder
from reducio_latents.train.config import TrainConfig
from reducio_latents.train.settings import read_settings
from reducio_latents.vae import ReducioVAE, ReducioVAEConfig
from reducio_latents.video.pixels import to_unit
from tests.corpora import write_video
from tests.train_ranks import QUICK

TOOLS = Path(__file__).parents[1] / "tools"
TINY = (
    "data.size_px=32", "data.workers=1", "data.validation_share=0.5", "train.steps=1",
    "train.batch_size=1", "validation.clips=1", "log.tensorboard=false",
    f"train.precision={QUICK}", "model.width=8", "model.content_width=8", "model.decoder_width=8",
)  # fmt: skip


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(TOOLS)


@pytest.mark.parametrize("start", [(), ("--start", "linear", "--shorten-start", "700")])
def test_the_recipe_packs_what_it_trained_and_does_not_praise_it(
    tools: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: tuple[str, ...]
) -> None:
    recipe = importlib.import_module("train_tiny")
    monkeypatch.setattr(recipe, "EVALUATED_PX", (64, 32))
    monkeypatch.setattr(recipe, "EVALUATED_CLIPS", 2)
    monkeypatch.setattr(recipe, "START_PX", 32)
    for seed in (1, 2):
        write_video(tmp_path / "clips" / f"{seed}.mp4", 1.1, seed=seed)
    options = [word for setting in TINY for word in ("--set", setting)]
    out = tmp_path / "out"
    words = ["train_tiny.py", str(tmp_path / "clips"), "--out", str(out), *start, *options]
    monkeypatch.setattr(sys, "argv", words)
    assert recipe.main() == 1  # one step makes no model
    folder = out / "reducio-tiny-ft4-fs32"
    vae = load_autoencoder("reducio", folder)
    card = (folder / "README.md").read_text()
    scores = json.loads((out / "evaluation-64" / "evaluation.json").read_text())
    assert vae.fingerprint in card
    assert f"| {scores['psnr_db']:.2f} |" in card
    assert str(tmp_path) not in card


def moving_clips(count: int, seed: int) -> torch.Tensor:
    """uint8 (N, 16, 32, 32, 3): wide waves in colour, each moving in its own way."""
    random = torch.Generator().manual_seed(seed)
    time, y, x = torch.meshgrid(torch.arange(16), torch.arange(32), torch.arange(32), indexing="ij")
    clips = []
    for _ in range(count):
        fy, fx, ft, phase = (torch.rand(4, generator=random) - 0.5).tolist()
        wave = torch.sin(6.28 * (fy * y / 32 + fx * x / 32 + ft * time / 8 + phase))
        colour = 100 * torch.rand(3, generator=random)
        clips.append((127.5 + wave[..., None] * colour).round().to(torch.uint8))
    return torch.stack(clips)


def test_a_linear_start_is_better_than_repeating_the_content_image(tools: None) -> None:
    start = importlib.import_module("linear_start")
    torch.manual_seed(0)
    vae = ReducioVAE(
        ReducioVAEConfig(width=8, content_width=8, decoder_width=8, target="difference")
    )
    told: list[str] = []
    start.linear_start(
        vae,
        moving_clips(16, seed=0),
        fitted=16,
        linear=start.Descent(steps=12, lr=1e-3, batch_size=4),
        whole=start.Descent(steps=1, lr=1e-5, batch_size=2),
        tell=told.append,
    )
    video = to_unit(moving_clips(4, seed=1))
    with torch.no_grad():
        image = video[:, :, 7]
        found = vae.decode(vae.final_latents(vae.encode(video)), image)
        error = (found - video).square().mean()
        repeated = (image.unsqueeze(2) - video).square().mean()
    assert error < repeated / 2  # 3 dB, on clips that it has not seen
    assert told


def test_the_small_model_is_small_enough_to_ship() -> None:
    config: TrainConfig = read_settings("reducio_tiny_ft4_fs32")
    parameters = sum(t.numel() for t in ReducioVAE(config.model).state_dict().values())
    assert 2 * parameters + 100_000 < 8_000_000  # float16, and room for the names
    assert config.model.temporal_stride == 4

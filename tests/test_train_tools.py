"""The recipe of the small model: one command, weights that load, a card that tells the truth."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from reducio_latents import load_autoencoder
from reducio_latents.train.config import TrainConfig
from reducio_latents.train.settings import read_settings
from reducio_latents.vae import ReducioVAE
from tests.corpora import write_video

RECIPE = Path(__file__).parents[1] / "tools" / "train_tiny.py"
TINY = (
    "data.size_px=32", "data.workers=1", "data.validation_share=0.5", "train.steps=1",
    "train.batch_size=1", "validation.clips=1", "log.tensorboard=false",
    "model.width=8", "model.content_width=8",
)  # fmt: skip


@pytest.fixture
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_tiny", RECIPE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_recipe_packs_what_it_trained_and_does_not_praise_it(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (1, 2):
        write_video(tmp_path / "clips" / f"{seed}.mp4", 1.1, seed=seed)
    options = [word for setting in TINY for word in ("--set", setting)]
    out = tmp_path / "out"
    words = ["train_tiny.py", str(tmp_path / "clips"), "--out", str(out), *options]
    monkeypatch.setattr(sys, "argv", words)
    assert recipe.main() == 1  # one step makes no model
    folder = out / "reducio-tiny-ft4-fs32"
    vae = load_autoencoder("reducio", folder)
    card = (folder / "README.md").read_text()
    scores = json.loads((out / "evaluation" / "evaluation.json").read_text())
    assert vae.fingerprint in card
    assert f"{scores['psnr_db']:.2f} dB" in card
    assert str(tmp_path) not in card


def test_the_small_model_is_small_enough_to_ship() -> None:
    config: TrainConfig = read_settings("reducio_tiny_ft4_fs32")
    parameters = sum(t.numel() for t in ReducioVAE(config.model).state_dict().values())
    assert 2 * parameters + 100_000 < 8_000_000  # float16, and room for the names
    assert config.model.temporal_stride == 4

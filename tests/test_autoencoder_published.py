"""Baselines have names and published sizes, and random weights are told from trained ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from reducio_latents.autoencoders import load_autoencoder
from reducio_latents.autoencoders.diffusers import PUBLISHED
from reducio_latents.autoencoders.protocol import is_untrained
from reducio_latents.errors import ConfigError, WeightsError
from tests import tiny_models

diffusers = pytest.importorskip("diffusers")

TINY = {
    "sdxl-vae": {
        **PUBLISHED["sdxl-vae"].sizes,
        "block_out_channels": (8, 8, 16, 16),
        "norm_num_groups": 4,
        "layers_per_block": 1,
    },
    "cosmos-cv8x16x16": {
        **PUBLISHED["cosmos-cv8x16x16"].sizes,
        "encoder_block_out_channels": (8, 8, 8, 8),
        "decode_block_out_channels": (8, 8, 8, 8),
        "num_layers": 1,
        "attention_resolutions": (4,),
        "resolution": 64,
    },
}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, sizes in TINY.items():
        monkeypatch.setitem(PUBLISHED, name, replace(PUBLISHED[name], sizes=sizes))


def touch_a_norm(model: nn.Module) -> None:
    norm = next(m for m in model.modules() if isinstance(m, nn.GroupNorm))
    with torch.no_grad():
        norm.weight[0] += 1e-3


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("sd21-vae", 83.65),
        ("sdxl-vae", 83.65),
        ("cosmos-cv8x8x8", 105.65),
        ("cosmos-cv8x16x16", 110.90),
    ],
)
def test_a_published_model_has_its_number_of_weights(name: str, millions: float) -> None:
    wanted = PUBLISHED[name]
    model_class = getattr(diffusers, wanted.architecture)  # modules make tensors of their own
    with torch.device("meta"):
        model = model_class(**wanted.sizes)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize(
    ("name", "frames", "latents"),
    [("sdxl-vae", 3, (4, 3, 8, 8)), ("cosmos-cv8x16x16", 9, (16, 2, 4, 4))],
)
def test_a_constant_video_makes_the_round_trip_in_the_paper_tables_strides(
    tiny: None, name: str, frames: int, latents: tuple[int, ...]
) -> None:
    model = load_autoencoder(f"{name}:random:3")
    video = torch.full((1, 3, frames, 64, 64), 0.3)
    posterior = model.encode(video)
    assert tuple(posterior.mean.shape[1:]) == latents
    assert model.geometry.latent_shape(frames, 64, 64) == latents
    decoded = model.decode(model.final_latents(posterior))
    assert decoded.shape == video.shape
    assert decoded.isfinite().all()


@pytest.mark.parametrize("name", list(TINY))
def test_what_is_made_at_random_says_so_and_what_is_saved_is_loaded_by_its_name(
    tiny: None, name: str, tmp_path: Path
) -> None:
    made: Any = load_autoencoder(f"{name}:random:1")
    assert made.name == f"{name}:random:1"
    assert is_untrained(made)
    assert load_autoencoder(made.name).fingerprint == made.fingerprint
    assert load_autoencoder(f"{name}:random").fingerprint != made.fingerprint
    made.model.save_pretrained(tmp_path)
    loaded: Any = load_autoencoder(name, tmp_path)
    assert (loaded.name, loaded.fingerprint) == (name, made.fingerprint)
    told = [is_untrained(loaded)]  # though nothing in its name says so
    touch_a_norm(loaded.model)
    assert [*told, is_untrained(loaded)] == [True, False]


def test_weights_of_other_sizes_are_not_taken_for_a_published_model(
    tiny: None, tmp_path: Path
) -> None:
    tiny_models.image_vae(layers_per_block=1, scaling_factor=0.18215).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"is not sdxl-vae: its scaling_factor is 0.18215"):
        load_autoencoder("sdxl-vae", tmp_path)
    with pytest.raises(ConfigError, match="holds AutoencoderKL, not AutoencoderKLCosmos"):
        load_autoencoder("cosmos-cv8x8x8", tmp_path)
    with pytest.raises(WeightsError, match=r"needs its weights \(stabilityai/sdxl-vae\).*:random"):
        load_autoencoder("sdxl-vae")
    with pytest.raises(ConfigError, match="after the colon write random"):
        load_autoencoder("sdxl-vae:rnadom")
    with pytest.raises(ConfigError, match="takes no weights"):
        load_autoencoder("sdxl-vae:random", tmp_path)


def test_random_weights_are_told_whatever_the_model_and_floors_are_not_called_untrained() -> None:
    assert is_untrained(load_autoencoder("reducio-random:8"))
    assert not is_untrained(load_autoencoder("repeat-content"))
    assert not is_untrained(load_autoencoder("bicubic-32x"))

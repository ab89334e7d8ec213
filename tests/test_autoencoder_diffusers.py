"""Autoencoders of diffusers: frame rules, scaling, strict loading, agreement with the library."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from reducio_latents.autoencoders import load_autoencoder
from reducio_latents.errors import ConfigError, GeometryError, WeightsError
from reducio_latents.vae.tiling import Tiling
from tests import tiny_models

pytest.importorskip("diffusers")

GEOMETRIES = {
    "wan": (4, 8, 9),
    "ltx": (8, 32, 9),
    "cogvideox": (4, 8, 9),
    "hunyuan": (4, 8, 9),
    "mochi": (6, 8, 7),
    "cosmos": (8, 8, 9),
}
"""temporal stride, spatial stride, frames that fit."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The video models, saved once."""
    root = tmp_path_factory.mktemp("vaes")
    for name in tiny_models.VIDEO_VAES:
        tiny_models.video_vae(name).save_pretrained(root / name)
    tiny_models.image_vae(shift_factor=0.1).save_pretrained(root / "image")
    return {path.name: path for path in root.iterdir()}


def video(frames: int, side: int = 64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(1, 3, frames, side, side, generator=generator) * 2 - 1


def library_model(folder: Path) -> Any:
    import diffusers

    name = json.loads((folder / "config.json").read_text())["_class_name"]
    return getattr(diffusers, name).from_pretrained(folder).eval()


@pytest.mark.parametrize("name", list(GEOMETRIES))
def test_a_video_model_gives_the_librarys_moments_and_pixels(
    folders: dict[str, Path], name: str
) -> None:
    temporal, spatial, frames = GEOMETRIES[name]
    clip = video(frames)
    ours, theirs = load_autoencoder(f"diffusers:{folders[name]}"), library_model(folders[name])
    posterior = ours.encode(clip)
    with torch.no_grad():
        wanted = theirs.encode(clip).latent_dist
        pixels = theirs.decode(wanted.mode()).sample
    torch.testing.assert_close(posterior.mean, wanted.mode(), atol=1e-5, rtol=1e-5)
    if hasattr(wanted, "logvar"):
        torch.testing.assert_close(posterior.logvar, wanted.logvar, atol=1e-5, rtol=1e-5)
    else:
        assert (posterior.logvar == -30).all()
    assert (ours.geometry.temporal_stride, ours.geometry.spatial_stride) == (temporal, spatial)
    decoded = ours.decode(ours.final_latents(posterior))
    torch.testing.assert_close(decoded, pixels, atol=1e-4, rtol=1e-4)
    assert decoded.shape == clip.shape
    assert not ours.needs_content


def test_cosmos_scales_each_latent_step_by_itself(folders: dict[str, Path]) -> None:
    cosmos, model = (
        load_autoencoder(f"diffusers:{folders['cosmos']}"),
        library_model(folders["cosmos"]),
    )
    posterior = cosmos.encode(video(17))
    mean, std = (
        torch.tensor(values).view(1, 16, -1, 1, 1)[:, :, :3]
        for values in (model.config.latents_mean, model.config.latents_std)
    )
    torch.testing.assert_close(cosmos.final_latents(posterior), (posterior.mean - mean) / std)
    cosmos.check_clip(121, 64, 64)
    with pytest.raises(GeometryError, match="at most 121 frames"):
        cosmos.check_clip(129, 64, 64)


def test_an_image_model_is_used_frame_by_frame(folders: dict[str, Path]) -> None:
    ours, theirs = (
        load_autoencoder(f"diffusers:{folders['image']}"),
        library_model(folders["image"]),
    )
    clips = torch.cat([video(3, seed=1), video(3, seed=2)])
    posterior = ours.encode(clips)
    assert posterior.mean.shape == (2, 4, 3, 8, 8)
    decoded = ours.decode(ours.final_latents(posterior))
    with torch.no_grad():
        for clip in range(2):
            for frame in range(3):
                image = clips[clip, :, frame][None]
                wanted = theirs.encode(image).latent_dist
                got = posterior.mean[clip, :, frame][None]
                torch.testing.assert_close(got, wanted.mean, atol=1e-5, rtol=1e-5)
                pixels = theirs.decode(wanted.mean).sample
                torch.testing.assert_close(
                    decoded[clip, :, frame][None], pixels, atol=1e-4, rtol=1e-4
                )


def test_tiles_are_cut_where_they_are_asked_for(folders: dict[str, Path]) -> None:
    import diffusers

    clip, tiling = video(5, side=128), Tiling(tile_px=64, overlap=0.25)
    whole = load_autoencoder(f"diffusers:{folders['wan']}")
    tiled = load_autoencoder(f"diffusers:{folders['wan']}", tiling=tiling)
    model = diffusers.AutoencoderKLWan.from_pretrained(folders["wan"]).eval()
    model.enable_tiling(80, 80, 64, 64)
    with torch.no_grad():
        wanted = model.encode(clip).latent_dist.mean
    torch.testing.assert_close(tiled.encode(clip).mean, wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(tiled.encode(clip).mean, whole.encode(clip).mean, atol=1e-3)
    assert tiled.config["tiling"] == {"tile_px": 64, "overlap": 0.25}
    with pytest.raises(ConfigError, match="cannot be tiled"):
        load_autoencoder(f"diffusers:{folders['cosmos']}", tiling=tiling)


def test_the_fingerprint_is_of_the_weights_not_of_the_place(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    first = load_autoencoder(f"diffusers:{folders['wan']}")
    library_model(folders["wan"]).save_pretrained(tmp_path / "copy", safe_serialization=False)
    copy = load_autoencoder(f"diffusers:{tmp_path / 'copy'}", parts="encoder")
    assert copy.fingerprint == first.fingerprint
    assert copy.config == first.config
    tiny_models.video_vae("wan", seed=1).save_pretrained(tmp_path / "other")
    assert load_autoencoder(f"diffusers:{tmp_path / 'other'}").fingerprint != first.fingerprint
    by_class = load_autoencoder("diffusers:AutoencoderKLWan", weights=tmp_path / "copy")
    assert by_class.fingerprint == first.fingerprint


def test_half_a_model_takes_half_the_weights(folders: dict[str, Path]) -> None:
    clip = video(5)
    whole = load_autoencoder(f"diffusers:{folders['wan']}")
    half: Any = load_autoencoder(f"diffusers:{folders['wan']}", parts="encoder")
    assert torch.equal(half.encode(clip).mean, whole.encode(clip).mean)
    assert half.model.decoder is None


def test_a_single_file_of_the_ldm_codebase_is_the_same_model(tmp_path: Path) -> None:
    model = tiny_models.image_vae()
    model.save_pretrained(tmp_path / "diffusers")
    single = tmp_path / "single"
    single.mkdir()
    (single / "config.json").write_bytes((tmp_path / "diffusers/config.json").read_bytes())
    ldm = {f"first_stage_model.{_ldm_key(k)}": _ldm_value(k, v) for k, v in _tensors(model)}
    torch.save({"state_dict": ldm | {"cond_stage_model.x": torch.zeros(1)}}, single / "vae.ckpt")
    plain = {k: v.contiguous() for k, v in _tensors(model)}
    save_file(plain, single / "vae.safetensors")
    expected = load_autoencoder(f"diffusers:{tmp_path / 'diffusers'}")
    for file in ("vae.ckpt", "vae.safetensors"):
        found = load_autoencoder(f"diffusers:{single / file}")
        assert found.fingerprint == expected.fingerprint
        assert torch.equal(found.encode(video(1)).mean, expected.encode(video(1)).mean)


def _tensors(model: Any) -> list[tuple[str, torch.Tensor]]:
    return list(model.state_dict().items())


def _ldm_key(key: str) -> str:
    """The other direction, written from how the LDM codebase names its modules."""
    match = re.match(r"decoder\.up_blocks\.(\d)\.(resnets|upsamplers)", key)
    if match:
        level = 3 - int(match[1])
        key = key.replace(f"up_blocks.{match[1]}.resnets", f"up.{level}.block")
        key = key.replace(f"up_blocks.{match[1]}.upsamplers.0", f"up.{level}.upsample")
    key = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    key = key.replace("mid_block.resnets.0", "mid.block_1").replace(
        "mid_block.resnets.1", "mid.block_2"
    )
    for theirs, ldm in (
        ("to_out.0", "proj_out"),
        ("group_norm", "norm"),
        ("to_q", "q"),
        ("to_k", "k"),
        ("to_v", "v"),
    ):
        key = key.replace(f"mid_block.attentions.0.{theirs}", f"mid.attn_1.{ldm}")
    return key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")


def _ldm_value(key: str, value: torch.Tensor) -> torch.Tensor:
    is_matrix = "attentions" in key and value.ndim == 2
    return value[:, :, None, None].clone() if is_matrix else value


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape"])
def test_weights_that_do_not_fit_in_every_key_are_refused(tmp_path: Path, damage: str) -> None:
    tiny_models.image_vae().save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    key = "encoder.conv_in.weight"
    if damage == "missing":
        del tensors[key]
    elif damage == "unexpected":
        tensors["encoder.extra.weight"] = torch.zeros(1)
    else:
        tensors[key] = torch.zeros(9, 3, 3, 3)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(WeightsError, match="another architecture") as refused:
        load_autoencoder(f"diffusers:{tmp_path}")
    assert "\n" not in str(refused.value)
    renamed = path.rename(tmp_path / "vae.safetensors")
    with pytest.raises(WeightsError, match="another architecture"):
        load_autoencoder(f"diffusers:{renamed}")


def test_bad_names_and_folders_are_one_clear_line(tmp_path: Path, folders: dict[str, Path]) -> None:
    empty, text, unknown = tmp_path / "empty", tmp_path / "text", tmp_path / "unknown"
    for folder in (empty, text, unknown):
        folder.mkdir()
    (text / "config.json").write_text("not json")
    (unknown / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((folders["wan"] / "config.json").read_bytes())
    cases = {
        "./nowhere": "no model at",
        str(tmp_path / "gone"): "no model at",
        "": "write diffusers:DIR",
        str(empty): "has no config.json",
        str(text): "cannot be read",
        str(unknown): "holds UNet2DConditionModel",
        str(bare): "no weights",
        "AutoencoderKLWan": "needs its weights",
    }
    for name, message in cases.items():
        with pytest.raises((ConfigError, WeightsError), match=message) as refused:
            load_autoencoder(f"diffusers:{name}")
        assert "\n" not in str(refused.value)
    with pytest.raises(ConfigError, match="not AutoencoderKLMochi"):
        load_autoencoder("diffusers:AutoencoderKLMochi", weights=folders["wan"])


def test_a_hub_name_without_a_network_says_which_folder_would_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"hf download acme/vae --local-dir DIR") as refused:
        load_autoencoder("diffusers:acme/vae@main")
    assert "outgoing traffic has been disabled" in str(refused.value)
    assert "\n" not in str(refused.value)

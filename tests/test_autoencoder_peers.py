"""Open-Sora 1.2 and OmniTokenizer have the published keys and sizes, and keep their promises."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from reducio_latents.autoencoders import load_autoencoder
from reducio_latents.autoencoders.network import NetworkAutoencoder
from reducio_latents.autoencoders.peers import omnitokenizer, open_sora
from reducio_latents.autoencoders.peers.omnitokenizer import (
    OmniTokenizerConfig,
    OmniTokenizerVAE,
    PositionGenerator,
    WindowAttention,
)
from reducio_latents.autoencoders.peers.open_sora import CausalConv3d, OpenSoraConfig, OpenSoraVAE
from reducio_latents.autoencoders.protocol import LoadOptions
from reducio_latents.errors import ConfigError, GeometryError, PixelError, WeightsError
from tests.forked import Python

SMALL_SORA = OpenSoraConfig(width=32, res_blocks=1, image_widths=(32,) * 4, image_layers=1)
SMALL_OMNI = OmniTokenizerConfig(
    dim=32,
    heads=2,
    head_dim=16,
    window=2,
    encoder_blocks="tw",
    decoder_blocks="t",
    temporal_blocks=1,
)
sora = partial(open_sora.load_open_sora, config=SMALL_SORA)
omni = partial(omnitokenizer.load_omnitokenizer, config=SMALL_OMNI)


def small(name: str, weights: Path | None = None, **options: object) -> NetworkAutoencoder:
    load = sora if name.startswith("open-sora") else omni
    return load(name, weights, LoadOptions(**options))  # type: ignore[arg-type]


NAMES = ("open-sora-1.2", "omnitokenizer")
FRAMES = {"open-sora-1.2": 16, "omnitokenizer": 17}
LATENTS = {"open-sora-1.2": (4, 4, 4, 4), "omnitokenizer": (8, 5, 4, 4)}


def video(name: str, batch: int = 1, value: float | None = None) -> Tensor:
    shape = (batch, 3, FRAMES[name], 32, 32)
    if value is not None:
        return torch.full(shape, value)
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("name", NAMES)
def test_what_a_model_does_not_take_is_named_before_it_is_computed(name: str) -> None:
    model = small(f"{name}:random")
    with pytest.raises(PixelError, match=r"uint8, but must be floating point in \[-1, 1\]"):
        model.encode(torch.zeros(1, 3, FRAMES[name], 32, 32, dtype=torch.uint8))
    with pytest.raises(GeometryError, match="Move the channel axis"):
        model.encode(torch.zeros(1, FRAMES[name], 3, 32, 32))
    with pytest.raises(GeometryError, match="with 5 channels were made by another model"):
        model.decode(torch.zeros(1, 5, 4, 4, 4))
    with pytest.raises(GeometryError, match=r"decodes \(B, ., t, h, w\)"):
        model.decode(torch.zeros(LATENTS[name]))


def test_the_published_sizes_have_the_published_number_of_weights() -> None:
    with torch.device("meta"):
        sora_net, omni_net = OpenSoraVAE(OpenSoraConfig()), OmniTokenizerVAE(OmniTokenizerConfig())
    count = [sum(p.numel() for p in net.parameters()) / 1e6 for net in (sora_net, omni_net)]
    assert count == pytest.approx([393.34, 53.71], abs=0.005)
    keys = {key: tuple(value.shape) for key, value in sora_net.state_dict().items()}
    assert keys["spatial_vae.module.encoder.conv_in.weight"] == (128, 3, 3, 3)
    assert keys["temporal_vae.encoder.conv_blocks.1.conv.weight"] == (256, 256, 3, 3, 3)
    assert keys["temporal_vae.decoder.block_res_blocks.0.0.conv3.conv.weight"] == (
        128,
        256,
        1,
        1,
        1,
    )
    assert keys["temporal_vae.decoder.conv_blocks.2.conv.weight"] == (1024, 512, 3, 3, 3)
    assert keys["scale"] == keys["shift"] == (1, 4, 1, 1, 1)
    keys = {key: tuple(value.shape) for key, value in omni_net.state_dict().items()}
    spatial = "encoder.enc_spatial_transformer.layers."
    assert keys[f"{spatial}0.0.dsconv.weight"] == (512, 1, 3, 3, 3)
    assert keys[f"{spatial}2.1.relative_position_bias_table"] == (225, 8)
    assert keys["decoder.dec_temporal_transformer.layers.3.1.to_kv.weight"] == (1024, 512)
    assert keys["decoder.to_pixels.0.weight"] == (768, 512)
    assert keys["pre_vq_conv.1.weight"] == (16, 512)


@pytest.mark.parametrize("name", NAMES)
def test_a_clip_goes_in_and_one_of_its_size_comes_back(name: str) -> None:
    model = small(f"{name}:random")
    posterior = model.encode(video(name, 2))
    assert posterior.mean.shape == posterior.logvar.shape == (2, *LATENTS[name])
    assert posterior.mean.shape[1:] == model.geometry.latent_shape(FRAMES[name], 32, 32)
    latents = model.final_latents(posterior)
    assert model.decode(latents).shape == video(name, 2).shape
    alone = model.encode(video(name, 2)[1:])
    torch.testing.assert_close(alone.mean, posterior.mean[1:], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_constant_video_makes_the_round_trip_and_stays_the_same_at_every_repetition(
    name: str,
) -> None:
    model = small(f"{name}:random")
    decoded = [
        model.decode(model.final_latents(model.encode(video(name, value=0.3)))) for _ in range(2)
    ]
    assert decoded[0].isfinite().all()
    assert decoded[0].shape == video(name).shape
    torch.testing.assert_close(decoded[0], decoded[1], atol=0, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_is_loaded_key_by_key_and_names_the_model(name: str, tmp_path: Path) -> None:
    made = small(f"{name}:random:5")
    path = tmp_path / "weights.ckpt"
    torch.save({"state_dict": made.model.state_dict()}, path)
    loaded = small(name, path)
    assert loaded.fingerprint == made.fingerprint
    assert loaded.fingerprint != small(f"{name}:random:6").fingerprint
    assert (made.config["random_weights"], loaded.config["random_weights"]) == (True, False)
    torch.testing.assert_close(
        loaded.encode(video(name)).mean, made.encode(video(name)).mean, atol=0, rtol=0
    )
    state = made.model.state_dict()
    dropped = next(key for key in state if "encoder" in key)
    torch.save({key: value for key, value in state.items() if key != dropped}, path)
    with pytest.raises(WeightsError, match="1 missing"):
        small(name, path)
    torch.save(state | {"decoder.extra": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match="1 unexpected"):
        small(name, path)


def test_what_only_training_needs_is_left_out_of_an_omnitokenizer(tmp_path: Path) -> None:
    made = small("omnitokenizer:random")
    path = tmp_path / "imagenet_k600_vae.ckpt"
    training = {"codebook.embeddings": torch.zeros(8, 2), "perceptual_model.lin": torch.zeros(1)}
    torch.save({"state_dict": made.model.state_dict() | training}, path)
    assert small("omnitokenizer", path).fingerprint == made.fingerprint


@pytest.mark.parametrize("name", NAMES)
def test_either_half_works_without_the_other(name: str) -> None:
    whole = small(f"{name}:random")
    encoder = small(f"{name}:random", parts="encoder")
    decoder = small(f"{name}:random", parts="decoder")
    posterior = encoder.encode(video(name))
    latents = whole.final_latents(posterior)
    torch.testing.assert_close(decoder.decode(latents), whole.decode(latents))
    assert encoder.fingerprint == decoder.fingerprint == whole.fingerprint
    half = sum(p.numel() for p in encoder.model.parameters())
    assert half < 0.7 * sum(p.numel() for p in whole.model.parameters())


@pytest.mark.parametrize(
    ("name", "size", "usable"),
    [
        ("open-sora-1.2", (17, 32, 32), "frames=16"),
        ("open-sora-1.2", (20, 32, 32), "16 at most"),
        ("open-sora-1.2", (16, 36, 32), "height=32"),
        ("omnitokenizer", (16, 32, 32), "13 or 17 frames"),
        ("omnitokenizer", (17, 32, 48), "square ones.*Use 32 px"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_one_that_would(
    name: str, size: tuple[int, int, int], usable: str
) -> None:
    with pytest.raises(GeometryError, match=usable):
        small(f"{name}:random").encode(torch.zeros(1, 3, *size))


@pytest.mark.parametrize("name", NAMES)
def test_names_are_read_strictly(name: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"needs its weights.*:random"):
        load_autoencoder(name)
    with pytest.raises(ConfigError, match="is not a model"):
        small(f"{name}:rnadom")
    with pytest.raises(ConfigError, match="takes no weights"):
        small(f"{name}:random", tmp_path / "file.ckpt")


@pytest.mark.parametrize(("kernel", "stride", "frames"), [(3, 1, 8), (3, 2, 4), (1, 1, 8)])
def test_open_soras_convolutions_see_no_later_frame(kernel: int, stride: int, frames: int) -> None:
    conv = CausalConv3d(2, 2, kernel, stride=stride)
    clip = torch.randn(1, 2, 8, 6, 6)
    changed = clip.clone()
    changed[:, :, 4:] = 0
    before, after = conv(clip), conv(changed)
    assert before.shape == (1, 2, frames, 6, 6)
    half = frames // 2
    torch.testing.assert_close(before[:, :, :half], after[:, :, :half], atol=0, rtol=0)
    assert not torch.equal(before[:, :, half:], after[:, :, half:])


def test_open_sora_turns_neighbouring_channels_into_neighbouring_frames() -> None:
    x = torch.arange(4.0).reshape(1, 4, 1, 1, 1).repeat(1, 1, 2, 1, 1)
    x[:, :, 1] += 10
    frames = open_sora._channels_to_time(x).flatten(2)
    assert frames.tolist() == [[[0, 1, 10, 11], [2, 3, 12, 13]]]


def test_open_soras_final_latents_are_shifted_and_scaled_as_published() -> None:
    model = small("open-sora-1.2:random")
    posterior = model.encode(video("open-sora-1.2"))
    shift = torch.tensor(open_sora.SHIFT)[:, None, None, None]
    scale = torch.tensor(open_sora.SCALE)[:, None, None, None]
    torch.testing.assert_close(model.final_latents(posterior), (posterior.mean - shift) / scale)


def test_omnitokenizers_patches_are_cut_and_pasted_without_loss() -> None:
    clip = torch.randn(2, 3, 8, 16, 24)
    patches = omnitokenizer._cut(clip, 4, 8)
    assert patches.shape == (2, 2, 2, 3, 3 * 4 * 64)
    torch.testing.assert_close(omnitokenizer._paste(patches, 4, 8), clip, atol=0, rtol=0)


def test_window_attention_keeps_to_its_windows() -> None:
    attention = WindowAttention(SMALL_OMNI)
    x = torch.randn(1, 16, 32)  # 4 x 4 tokens, windows of 2 x 2
    changed = x.clone()
    changed[:, 0] += 1
    different = (attention(x) != attention(changed)).any(-1)[0].reshape(4, 4)
    assert different.nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_the_position_generator_sees_a_frame_and_the_two_before_it() -> None:
    generator = PositionGenerator(2)
    x = torch.zeros(5 * 9, 1, 2).reshape(5, 9, 2)
    changed = x.clone()
    changed[1, 4] = 1
    different = (generator(x, (1, 5, 3, 3)) != generator(changed, (1, 5, 3, 3))).any(-1).any(-1)
    assert different.tolist() == [False, True, True, True, False]


def test_attention_is_the_softmax_of_scaled_cosines() -> None:
    attention = omnitokenizer.Attention(SMALL_OMNI, temporal=True)
    x = torch.randn(3, 5, 32)
    q = attention.to_q(attention.norm(x))
    k, v = attention.to_kv(x).chunk(2, dim=-1)
    heads = [t.reshape(3, 5, 2, 16).permute(0, 2, 1, 3) for t in (q, k, v)]
    cosine = F.normalize(heads[0], dim=-1) @ F.normalize(heads[1], dim=-1).mT
    allowed = torch.ones(5, 5).tril().bool()
    weights = (8 * cosine).masked_fill(~allowed, -torch.inf).softmax(-1)
    expected = attention.to_out((weights @ heads[2]).permute(0, 2, 1, 3).reshape(3, 5, 32))
    torch.testing.assert_close(attention(x), expected, atol=1e-5, rtol=1e-4)


def test_a_model_built_without_memory_spoils_none_that_is_loaded_later() -> None:
    program = """
import torch
from reducio_latents.autoencoders.peers.open_sora import OpenSoraConfig, OpenSoraVAE

with torch.device("meta"):  # as loading a file does; diffusers is imported in here
    OpenSoraVAE(OpenSoraConfig())
from diffusers.models.autoencoders import autoencoder_kl_cosmos

print({str(tensor.device) for tensor in autoencoder_kl_cosmos._WAVELETS.values()})
"""
    process = Python(["-c", program])
    printed, errors = process.communicate()
    assert printed.strip() == "{'cpu'}", errors

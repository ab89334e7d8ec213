"""A store's decoder: the store's own model, loaded when asked, in parts that fit, and no other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

from reducio_latents import LatentDataset, open_store
from reducio_latents.cli import main
from reducio_latents.dataset.batches import LatentBatch
from reducio_latents.errors import (
    ConfigError,
    GeometryError,
    LatentsError,
    PixelError,
    StoreError,
    VideoError,
    WeightsError,
)
from reducio_latents.store import decoder as module
from reducio_latents.store.decoder import LatentDecoder
from reducio_latents.video.pixels import to_uint8, to_unit
from tests.corpora import write_video
from tests.spot_check import SIDE, make_store, moving
from tests.test_encode_flow import encode
from tests.tiny_models import image_vae

CLIPS = 3
COLUMNS = ("motion", "content_image")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    videos = {f"{i}.mp4": moving(i) for i in range(CLIPS)}
    return make_store(tmp_path_factory.mktemp("decoder"), videos, model="reducio-random:8")[0]


@pytest.fixture(scope="module")
def batch(store: Path) -> LatentBatch:
    return LatentDataset(store, COLUMNS, batch_size=CLIPS, shuffle=False, latents="mean").batch(
        0, 0
    )


@pytest.fixture(scope="module")
def decoder(store: Path) -> LatentDecoder:
    return open_store(store).decoder(device="cpu")


@pytest.fixture(scope="module")
def frames(decoder: LatentDecoder, batch: LatentBatch) -> Tensor:
    return decoder.decode(batch["latents"], batch["content_image"])


def test_what_is_decoded_are_the_models_own_pixels(
    decoder: LatentDecoder, batch: LatentBatch, frames: Tensor
) -> None:
    assert (frames.dtype, frames.shape) == (torch.uint8, (CLIPS, 16, SIDE, SIDE, 3))
    image = to_unit(batch["content_image"][:, None].permute(0, 1, 3, 4, 2))[:, :, 0]
    video = decoder.load().decode(batch["latents"], image.contiguous())
    assert torch.equal(frames, to_uint8(video).permute(0, 2, 3, 4, 1))
    # Whatever type the sampler works in, and inside of a training step's autocast.
    with torch.autocast("cpu", torch.bfloat16):
        again = decoder.decode(batch["latents"].double().requires_grad_(), batch["content_image"])
    assert torch.equal(again, frames)


def test_clips_that_do_not_fit_together_are_decoded_in_parts(
    decoder: LatentDecoder, batch: LatentBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sizes, most = decoder.load(), [], CLIPS

    def full(latents: Tensor, content: Tensor) -> Tensor:
        sizes.append(len(latents))
        if len(latents) > most:
            raise torch.OutOfMemoryError("full")
        still: Tensor = content * latents.mean((1, 2, 3, 4)).tanh().view(-1, 1, 1, 1)
        return still[:, :, None].expand(-1, -1, 16, -1, -1)

    monkeypatch.setattr(model, "decode", full)
    monkeypatch.setattr(decoder, "_fits", {})
    whole = decoder.decode(batch["latents"], batch["content_image"])
    most = 1
    for _ in range(2):  # the second time it is known
        assert torch.equal(decoder.decode(batch["latents"], batch["content_image"]), whole)
    assert sizes == [3, 3, 1, 1, 1, 1, 1, 1]
    most = 0
    with pytest.raises(ConfigError, match=r"one clip of 16x64x64 does not fit in .* cpu"):
        decoder.decode(batch["latents"], batch["content_image"])
    sizes.clear()
    most = CLIPS
    monkeypatch.setattr(decoder, "_fits", {})
    monkeypatch.setattr(module, "PIXELS_AT_ONCE", 2 * 16 * SIDE * SIDE)
    assert torch.equal(decoder.decode(batch["latents"], batch["content_image"]), whole)
    assert sizes == [2, 1]


def test_nothing_is_loaded_until_pictures_are_asked_for(store: Path) -> None:
    code = f"""
import sys
from reducio_latents import LatentDataset, open_store

data = LatentDataset({str(store)!r}, {COLUMNS}, batch_size=2)
decoders = data.decoder(device="cpu"), open_store({str(store)!r}).decoder()
data.batch(0, 0)
rooms = {{name.split(".")[1] for name in sys.modules if name.startswith("reducio_latents.")}}
print(*rooms & {{"vae", "autoencoders", "video", "check", "train"}}, "av" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda z, c: (z[0], c), GeometryError, r"\(16, 4, 2, 2\).* Give a batch, of one clip"),
        (lambda z, c: (z[:0], c), GeometryError, r"latents are \(0, 16, 4, 2, 2\)"),
        (lambda z, c: (z[None], c), GeometryError, r"Join the clips of all samples"),
        (lambda z, c: (torch.cat([z, z], 1), c), GeometryError, "These are moments: .*sample_mome"),
        (lambda z, c: (z[:, :8], c), GeometryError, r"one of 16x64x64: \(16, 4, 2, 2\)"),
        (lambda z, c: (torch.cat([z, z], 3), c), GeometryError, r"latents are \(3, 16, 4, 4, 2\)"),
        (lambda z, c: (z.int(), c), PixelError, r"latents are torch.int32"),
        (lambda z, c: (z.numpy(), c), PixelError, r"latents are ndarray"),
        (lambda z, c: (z / 0, c), PixelError, r"not finite"),
        (lambda z, c: (z, None), ConfigError, r"content images: give decode their content_image"),
        (lambda z, c: (z, c / 255), PixelError, r"content_image is torch.float32; .* uint8"),
        (lambda z, c: (z, [b"RIFF"]), PixelError, r"content_image is list"),
        (lambda z, c: (z, c[:1]), GeometryError, r"is \(1, 3, 64, 64\); .* be \(3, 3, 64, 64\)"),
        (lambda z, c: (z, c[..., :32]), GeometryError, r"for these latents, of 16x64x64"),
        (lambda z, c: (z, c.movedim(1, -1)), GeometryError, r"Move the channels to the second"),
    ],
)
def test_what_cannot_be_decoded_is_refused_in_a_line(
    decoder: LatentDecoder, batch: LatentBatch, change: object, error: type, message: str
) -> None:
    with pytest.raises(error, match=message) as refused:
        decoder.decode(*change(batch["latents"], batch["content_image"]))  # type: ignore[operator]
    assert "\n" not in str(refused.value)


def test_clips_are_written_as_videos_and_one_frame_as_a_picture(
    decoder: LatentDecoder, frames: Tensor, tmp_path: Path
) -> None:
    decoder.write(tmp_path / "clip.mp4", frames[0])
    decoder.write(tmp_path / "all.MP4", frames)
    for name, size in (("clip.mp4", SIDE), ("all.MP4", 2 * SIDE)):
        with av.open(str(tmp_path / name)) as file:
            shown = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
            assert file.streams.video[0].average_rate == 16
        assert (len(shown), shown[0].shape) == (16, (size, size, 3))
    assert shown[0][SIDE + 8 :, SIDE + 8 :].max() < 8  # black, where the fourth clip would be
    decoder.write(tmp_path / "clip.webp", frames[0].numpy())
    with Image.open(tmp_path / "clip.webp") as picture:
        assert picture.n_frames == 16  # type: ignore[attr-defined]
    decoder.write(tmp_path / "still.png", frames[:, :1])
    with Image.open(tmp_path / "still.png") as picture:
        assert np.array_equal(np.asarray(picture)[:SIDE, SIDE:], frames[1, 0])
    for path, what, error, message in [
        ("a.png", frames[0], VideoError, r"a\.png cannot be written: name it \.mp4 or \.webp"),
        ("a.mp4", frames[0].float(), PixelError, "float32 .* takes uint8"),
        ("a.mp4", frames[0, 0], PixelError, r"\(64, 64, 3\)"),
        ("a.mp4", frames[:0], PixelError, "nothing to write"),
        ("still.png/a.mp4", frames[0], VideoError, "cannot be written"),
    ]:
        with pytest.raises(error, match=message):
            decoder.write(tmp_path / path, what)


def test_another_model_is_refused_and_so_is_a_store_that_cannot_be_decoded(
    store: Path, batch: LatentBatch, tmp_path: Path
) -> None:
    opened = open_store(store)
    other = LatentDecoder(opened, model="reducio-random:8:ft4:1", device="cpu")
    with pytest.raises(StoreError, match=r"made by another model .*weights_sha256"):
        other.decode(batch["latents"], batch["content_image"])
    for given, message in [
        ({"device": "tpu:9"}, "device 'tpu:9' cannot be used here"),
        ({"dtype": "half"}, "dtype is 'half'"),
        ({"dtype": torch.int8}, "dtype is torch.int8"),
    ]:
        with pytest.raises(ConfigError, match=message):
            opened.decoder(**given)  # type: ignore[arg-type]
    with pytest.raises(LatentsError, match="takes no weights"):
        opened.decoder(weights=tmp_path).load()
    opened.meta.columns["latents"] = opened.meta.columns.pop("motion")
    with pytest.raises(StoreError, match=r"has no column 'motion'.*cannot be decoded"):
        opened.decoder()


def test_a_store_remembers_the_folder_of_its_model(tmp_path: Path) -> None:
    folder = tmp_path / "vae"
    image_vae(scaling_factor=0.4).save_pretrained(folder)
    image_vae(seed=1, scaling_factor=0.4).save_pretrained(tmp_path / "other")
    write_video(tmp_path / "videos" / "a.mp4", 1.1, seed=1)
    store = tmp_path / "store"
    encode(tmp_path / "videos", store, model=f"diffusers:{folder}", columns=("motion",), workers=1)
    state = torch.random.get_rng_state()
    plain = LatentDataset(store, batch_size=1, latents="mean")
    normal = LatentDataset(store, batch_size=1, latents="mean", normalize="channel")
    latents, scaled = plain.batch(0, 0)["latents"], normal.batch(0, 0)["latents"]
    frames = plain.decoder(device="cpu").decode(latents)
    assert frames.float().std() > 1
    assert not torch.allclose(latents, scaled, atol=0.01)
    same = normal.decoder(device="cpu").decode(scaled)
    assert (same.int() - frames.int()).abs().max() <= 1
    assert torch.equal(torch.random.get_rng_state(), state)  # as a training run needs it

    folder.rename(tmp_path / "moved")
    with pytest.raises(WeightsError, match=rf"{folder}, which is no longer there.*--weights"):
        plain.decoder(device="cpu").decode(latents)
    ran = CliRunner().invoke(main, ["decode", str(store), "--out", str(tmp_path / "out")])
    assert ran.exit_code == 1
    assert "--weights" in ran.output
    with pytest.raises(StoreError, match="made by another model"):
        open_store(store).decoder(tmp_path / "other").decode(latents)
    found = open_store(store).decoder(weights=tmp_path / "moved", device="cpu").decode(latents)
    assert torch.equal(found, frames)
    named = open_store(store).decoder(f"diffusers:{tmp_path / 'moved'}", "cpu", "float32")
    assert torch.equal(named.decode(latents), frames)


def test_a_model_without_weights_of_its_own_leaves_no_trace(store: Path) -> None:
    assert b'"weights"' not in (store / "zarr.json").read_bytes()

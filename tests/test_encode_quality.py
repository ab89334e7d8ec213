"""Clips that are decoded while they are encoded: which, how well, and when a run stops for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from reducio_latents import load_autoencoder, open_store
from reducio_latents.autoencoders.protocol import Autoencoder
from reducio_latents.autoencoders.reducio import ReducioAutoencoder
from reducio_latents.core.gaussian import final_latents
from reducio_latents.core.images import decode_image
from reducio_latents.core.values import Posterior
from reducio_latents.encode import quality
from reducio_latents.encode.columns import MotionColumn
from reducio_latents.encode.gpu import BatchEncoder
from reducio_latents.encode.options import EncodeOptions
from reducio_latents.encode.quality import untiled
from reducio_latents.encode.registry import build_columns
from reducio_latents.errors import ConfigError, QualityError
from reducio_latents.metrics.psnr import psnr
from reducio_latents.store.commit import ShardKey
from reducio_latents.upkeep.verify import verify
from reducio_latents.vae.tiling import Tiling
from reducio_latents.video.pixels import to_unit
from tests.corpora import write_corpus, write_video
from tests.test_encode_flow import encode, files_of


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def checked(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("checked") / "store"
    report = encode(corpus, store, check_every=3)
    assert report.psnr is not None
    return store


def test_every_nth_row_of_a_bucket_is_checked_and_nothing_else_changes(
    corpus: Path, checked: Path, tmp_path: Path
) -> None:
    rows = pq.read_table(checked / "quality.parquet").to_pylist()
    assert [2 * row["shard"] + row["row"] for row in rows] == [0, 3]
    for row in rows:
        assert len(row["psnr_frames"]) == 16
        assert row["psnr"] == pytest.approx(np.mean(row["psnr_frames"]), abs=1e-3)
        assert row["psnr_whole"] is None  # 32 px is one tile
    encode(corpus, tmp_path / "store")
    plain, ours = files_of(tmp_path / "store"), files_of(checked)
    assert {n for n in ours if ours[n] != plain.get(n)} == {
        "quality.parquet",
        "commits/16x32x32/motion/000000.json",
        "commits/16x32x32/motion/000001.json",
    }
    assert verify(open_store(checked)).ok


def test_the_psnr_is_that_of_the_stored_numbers_decoded(checked: Path) -> None:
    store = open_store(checked)
    first = pq.read_table(checked / "quality.parquet").to_pylist()[0]
    key = ShardKey(first["bucket"], first["shard"])
    motion = store.read_row(key, first["row"], "motion")
    image = store.read_row(key, first["row"], "content_image")
    assert isinstance(motion, np.ndarray)
    assert isinstance(image, bytes)
    model = load_autoencoder("reducio-random:8")
    posterior = Posterior.of_moments(torch.from_numpy(motion.copy())[None].float())
    centre = to_unit(torch.from_numpy(decode_image(image))[None, None])[:, :, 0]
    latents = final_latents(posterior, None, model.final_rule)
    video = (model.decode(latents, centre)[0] + 1).div(2).clamp(0, 1)
    ours = psnr(video[:, 7][None], (centre + 1) / 2)
    assert float(ours) == pytest.approx(first["psnr_frames"][7], abs=1e-3)


def test_a_run_below_the_floor_stops_and_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "ENOUGH", 4)
    write_video(tmp_path / "corpus" / "v.mp4", 7.1, seed=1)
    settings = {"check_every": 1, "min_psnr": 90.0}
    with pytest.raises(QualityError, match="below the floor of 90 dB"):
        encode(tmp_path / "corpus", tmp_path / "store", **settings)
    kept = open_store(tmp_path / "store").index.entries
    assert kept
    assert not list((tmp_path / "store").glob("attempts/**/*.json"))
    assert encode(tmp_path / "corpus", tmp_path / "store", check_every=1).exit_code == 0
    assert len(pq.read_table(tmp_path / "store" / "quality.parquet")) == 7
    with pytest.raises(ConfigError, match="check_every"):
        EncodeOptions(min_psnr=30.0)


def test_a_store_of_few_clips_below_the_floor_is_whole_and_the_run_an_error(
    corpus: Path, checked: Path, tmp_path: Path
) -> None:
    for _ in range(2):  # nothing is left to be encoded the second time
        with pytest.raises(
            QualityError, match=r"the 2 clips .* PSNR of .* dB, below the floor of 90 dB"
        ):
            encode(corpus, tmp_path / "store", check_every=3, min_psnr=90.0)
    assert files_of(tmp_path / "store") == files_of(checked)


def test_the_decoder_is_loaded_only_for_clips_that_are_decoded() -> None:
    for every in (0, 5):
        options = EncodeOptions(
            model="reducio-random:8", columns=("motion",), check_every=every, device="cpu"
        )
        (motion,) = build_columns(options)
        assert isinstance(motion, MotionColumn)
        assert isinstance(motion.autoencoder, ReducioAutoencoder)
        names = [name for name, _ in motion.autoencoder.model.named_parameters()]
        assert any("decoder" in name for name in names) == (every > 0)


def test_tiles_are_compared_with_whole_frames_where_there_are_tiles() -> None:
    model = load_autoencoder("reducio-random:8", tiling=Tiling(tile_px=64, overlap=0.25))
    assert untiled(model, 64, 64) is None
    whole = untiled(model, 96, 64)
    assert whole is not None
    video = torch.rand(1, 3, 16, 96, 64) * 2 - 1
    expected = load_autoencoder("reducio-random:8", tiling=None).encode(video).mean
    torch.testing.assert_close(whole.encode(video).mean, expected)
    assert not torch.allclose(model.encode(video).mean, expected)


class Small:
    """An autoencoder on a device that holds `room` clips."""

    def __init__(self, room: int) -> None:
        self.model: Autoencoder = load_autoencoder("reducio-random:8")
        self.device, self.dtype = self.model.device, self.model.dtype
        self.room = room
        self.sizes: list[int] = []

    def encode(self, video: torch.Tensor) -> Posterior:
        self.sizes.append(len(video))
        if len(video) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.model.encode(video)


def test_a_batch_that_does_not_fit_is_halved_and_the_size_remembered() -> None:
    frames = torch.randint(0, 256, (7, 16, 32, 32, 3), dtype=torch.uint8)
    small = Small(room=2)
    encoder = BatchEncoder(small)  # type: ignore[arg-type]
    moments = encoder.launch(frames)()
    assert small.sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert encoder.batch_limit(frames.shape[1:]) == 1
    encoder.launch(frames[:2])()
    assert small.sizes[-2:] == [1, 1]
    whole = BatchEncoder(small.model).launch(frames)()
    np.testing.assert_allclose(moments, whole, rtol=2e-3, atol=2e-3)
    with pytest.raises(ConfigError, match="one clip of 16x32x32 does not fit"):
        BatchEncoder(Small(room=0)).launch(frames)  # type: ignore[arg-type]


def test_batches_are_filled_up_for_a_compiled_encoder_and_rows_stay_the_same() -> None:
    frames = torch.randint(0, 256, (3, 16, 32, 32, 3), dtype=torch.uint8)
    small = Small(room=8)
    padded = BatchEncoder(small, pad_to=4).launch(frames)()  # type: ignore[arg-type]
    assert small.sizes == [4]
    assert len(padded) == 3
    np.testing.assert_allclose(
        padded, BatchEncoder(small.model).launch(frames)(), rtol=2e-3, atol=2e-3
    )

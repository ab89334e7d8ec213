"""From a corpus to batches: which clips, cropped how, and what happens to those that fail."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from reducio_latents.core.clips import ClipSpec
from reducio_latents.core.geometry import Bucket
from reducio_latents.errors import ConfigError, StoreError, TrainingError
from reducio_latents.files.source import VideoSource
from reducio_latents.train.batch import TrainOrder
from reducio_latents.train.config import DataConfig
from reducio_latents.train.split import ClipTable, Split, forget_split, make_split
from reducio_latents.train.stream import BatchRequest, BatchStream, training_requests
from reducio_latents.video import get_backend
from reducio_latents.video.pixels import Augmentation, fit_frame
from tests.corpora import write_corpus, write_video


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def data(corpus: Path) -> DataConfig:
    return DataConfig(corpus=str(corpus), size_px=32, workers=1, ahead=2, validation_share=0.3)


@pytest.fixture(scope="module")
def split(data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Split:
    return make_split(tmp_path_factory.mktemp("run"), data)


def videos_of(table: ClipTable | None) -> set[str]:
    assert table is not None
    return {table.name(clip).video for clip in range(len(table))}


def test_whole_videos_are_set_apart_and_the_rest_are_accounted_for(split: Split) -> None:
    train, validation = videos_of(split.train), videos_of(split.validation)
    assert train | validation <= {"a.mp4", "b.mp4", "copy_of_b.mp4", "deep/c.mp4"}
    assert len(train | validation) == 3  # one of the two that have the same bytes
    assert not train & validation
    assert validation
    assert set(split.unusable) == {"short.mp4", "text.mp4"}


def test_a_run_keeps_its_plan_when_the_corpus_grows(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    for seed in (1, 2, 3):
        write_video(folder / f"{seed}.mp4", 1.1, seed=seed)
    data = DataConfig(corpus=str(folder), size_px=32, workers=1, validation_share=0.4)
    first = make_split(tmp_path / "run", data)
    write_video(folder / "0.mp4", 1.1, seed=9)
    again = make_split(tmp_path / "run", data)
    assert videos_of(again.train) == videos_of(first.train)
    assert videos_of(again.validation) == videos_of(first.validation)
    with pytest.raises(StoreError, match="made differently"):
        make_split(tmp_path / "run", replace(data, clip=ClipSpec(policy="centre")))


def test_a_video_of_the_training_corpus_is_not_validated_on_under_another_name(
    data: DataConfig, corpus: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    write_video(other / "new.mp4", 1.1, seed=9)
    (other / "renamed.mp4").write_bytes((corpus / "a.mp4").read_bytes())
    split = make_split(tmp_path / "run", replace(data, validation_corpus=str(other)))
    assert videos_of(split.validation) == {"new.mp4"}
    assert len(videos_of(split.train)) == 3
    (other / "new.mp4").unlink()
    with pytest.raises(ConfigError, match="and 1 are in the training corpus too"):
        make_split(tmp_path / "again", replace(data, validation_corpus=str(other)))


def test_a_split_without_clips_is_refused_with_the_reason_and_more_videos_help(
    tmp_path: Path,
) -> None:
    write_video(tmp_path / "corpus" / "short.mp4", 0.3)
    data = DataConfig(corpus=str(tmp_path / "corpus"), size_px=32, workers=1, validation_share=0.5)
    with pytest.raises(ConfigError, match=r"training split.*short\.mp4: .*shorter than a clip"):
        make_split(tmp_path / "run", data)
    for seed in (1, 2):
        write_video(tmp_path / "corpus" / f"{seed}.mp4", 1.1, seed=seed)
    split = make_split(tmp_path / "run", data)
    assert len(videos_of(split.train) | videos_of(split.validation)) == 2


def test_a_plan_that_is_forgotten_is_made_anew(tmp_path: Path) -> None:
    write_video(tmp_path / "corpus" / "1.mp4", 1.1, seed=1)
    data = DataConfig(corpus=str(tmp_path / "corpus"), size_px=32, workers=1, validation_share=0.0)
    make_split(tmp_path / "run", data)
    forget_split(tmp_path / "run")
    write_video(tmp_path / "corpus" / "2.mp4", 1.1, seed=2)
    assert videos_of(make_split(tmp_path / "run", data).train) == {"1.mp4", "2.mp4"}


def test_a_backend_that_does_not_exist_is_refused_before_anything_is_listed() -> None:
    with pytest.raises(ConfigError, match="choose one of pyav, decord"):
        DataConfig(corpus="nowhere", video_backend="ffmpeg")  # type: ignore[arg-type]


def test_a_run_without_a_corpus_says_how_to_name_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--set data\.corpus=FOLDER"):
        make_split(tmp_path, DataConfig())
    with pytest.raises(ConfigError, match=r"--set data\.validation_corpus=FOLDER"):
        make_split(tmp_path, DataConfig(), training=False)


def test_validation_pixels_are_the_ones_that_encoding_sees(split: Split, data: DataConfig) -> None:
    table = split.train
    assert table is not None
    (batch,) = BatchStream(table, data, [BatchRequest((0,))])
    (clip,) = get_backend("pyav").read_clips(
        table.source(0), [table.name(0).start_s], frames=16, rate_fps=16.0
    )
    assert not isinstance(clip, Exception)
    wanted = np.stack([fit_frame(f, Bucket(16, 32, 32), "bicubic") for f in clip.frames])
    assert np.array_equal(batch.frames_BTHWC[0].numpy(), wanted)
    assert batch.clips == (table.name(0),)


def test_batches_come_in_order_from_any_place_and_alike(split: Split, data: DataConfig) -> None:
    table = split.train
    assert table is not None

    def stream(numbers: range) -> BatchStream:
        order = TrainOrder(table.bucket_numbers, 1, seed=3)
        return BatchStream(table, replace(data, workers=2), training_requests(order, numbers, 3))

    whole = list(stream(range(6)))
    rest = list(stream(range(3, 6)))
    assert [batch.clips for batch in whole[3:]] == [batch.clips for batch in rest]
    assert [batch.seeds for batch in whole[3:]] == [batch.seeds for batch in rest]
    for one, other in zip(whole[3:], rest, strict=True):
        assert torch.equal(one.frames_BTHWC, other.frames_BTHWC)


def test_a_stream_may_be_left_before_its_end(split: Split, data: DataConfig) -> None:
    table = split.train
    assert table is not None
    endless = (BatchRequest((0,), (n,)) for n in iter(int, 1))
    batches = iter(BatchStream(table, data, endless))
    next(batches)
    assert isinstance(batches, Iterator)
    batches.close()


@pytest.fixture
def spoilt(tmp_path: Path) -> tuple[ClipTable, DataConfig]:
    """Three clips, of which one was cut off after it was planned."""
    for seed in (1, 2, 3):
        write_video(tmp_path / "corpus" / f"{seed}.mp4", 1.1, seed=seed)
    data = DataConfig(
        corpus=str(tmp_path / "corpus"), size_px=32, workers=1, validation_share=0, max_failed=0.4
    )
    table = make_split(tmp_path / "run", data).train
    assert table is not None
    path = tmp_path / "corpus" / "2.mp4"
    path.write_bytes(path.read_bytes()[:400])
    return table, data


def test_a_clip_that_fails_is_counted_and_the_next_one_takes_its_place(
    spoilt: tuple[ClipTable, DataConfig], caplog: pytest.LogCaptureFixture
) -> None:
    table, data = spoilt
    stream = BatchStream(
        table, data, [BatchRequest((0, 1, 2), (5, 6, 7)), BatchRequest((1,), (8,))]
    )
    first, second = stream
    assert [clip.video for clip in first.clips] == ["1.mp4", "3.mp4", "3.mp4"]
    assert [clip.video for clip in second.clips] == ["3.mp4"]
    assert list(stream.failed) == [1]
    assert "skipped 2.mp4 at 0.000 s: it is" in caplog.text  # and its name is not said again
    assert str(table.source(1)) not in caplog.text


def test_a_clip_that_fails_is_left_out_of_a_validation(
    spoilt: tuple[ClipTable, DataConfig],
) -> None:
    table, data = spoilt
    (batch,) = BatchStream(table, data, [BatchRequest((0, 1)), BatchRequest((1,))])
    assert [clip.video for clip in batch.clips] == ["1.mp4"]
    assert batch.frames_BTHWC.shape == (1, 16, 32, 32, 3)


def test_too_many_clips_that_fail_stop_the_run(spoilt: tuple[ClipTable, DataConfig]) -> None:
    table, data = spoilt
    stream = BatchStream(table, replace(data, max_failed=0.1), [BatchRequest((1,), (0,))])
    with pytest.raises(TrainingError, match=r"1 of 3 clips could not be read.*2\.mp4.*[^.]\. A "):
        list(stream)


def test_a_crop_is_the_named_part_of_the_frame() -> None:
    frame = np.zeros((64, 96, 3), np.uint8)
    frame[32:, 64:] = 200
    bucket = Bucket(16, 32, 32)
    corner = Augmentation(area=0.25, x=1.0, y=1.0, crop=True)
    assert corner.fit(frame, bucket, "bicubic").min() == 200
    other = replace(corner, x=0.0)
    assert other.fit(frame, bucket, "bicubic").max() == 0
    right = Augmentation().fit(frame, bucket, "bicubic")
    mirrored = Augmentation(mirror=True).fit(frame, bucket, "bicubic")
    assert np.array_equal(mirrored, right[:, ::-1])


def test_the_clips_of_a_validation_are_spread_over_videos(split: Split, data: DataConfig) -> None:
    table = split.train
    assert table is not None
    chosen = table.spread(2)
    assert len({table.name(clip).video for clip in chosen}) == 2
    assert table.spread(100) == list(range(len(table)))
    assert isinstance(table.source(0), VideoSource)

"""Sizes of any shape and length, as they are asked for; and pictures beside videos in one store."""

from __future__ import annotations

import tarfile
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from reducio_latents import LatentDataset, encode_corpus, load_autoencoder, open_store
from reducio_latents.cli import main
from reducio_latents.core.clips import ClipSpec
from reducio_latents.core.geometry import Bucket
from reducio_latents.core.images import decode_image
from reducio_latents.core.starts import clip_starts
from reducio_latents.corpus import list_corpus
from reducio_latents.encode import EncodeReport, Tally, plan_corpus
from reducio_latents.encode.options import EncodeOptions
from reducio_latents.errors import ConfigError, GeometryError, LatentsError
from reducio_latents.files import LocalFiles
from reducio_latents.store import Store
from reducio_latents.store.commit import ShardKey
from reducio_latents.upkeep.convert import convert_store
from reducio_latents.upkeep.verify import verify
from reducio_latents.video import is_still_name
from reducio_latents.video.pixels import fit_frame, to_unit
from reducio_latents.video.still import STILL_DURATION_S
from tests.object_storage import serving
from tests.test_encode_flow import files_of
from tests.tiny_models import image_vae, video_vae
from tests.videos import barcode, constant_rate, write_video

NAMED = ("16x256x256", "16x480x832", "1x480x832")


@pytest.mark.parametrize(
    ("settings", "buckets", "frames"),
    [
        ({}, ["16x256x256"], 16),
        ({"resolution": "480x832"}, ["16x480x832"], 16),
        ({"buckets": ",".join(NAMED)}, list(NAMED), 16),
        ({"buckets": NAMED[::-1]}, list(NAMED[::-1]), 16),
        ({"buckets": "17x480x840, 1x480x840"}, ["17x480x840", "1x480x840"], 17),
        ({"buckets": NAMED[2]}, [NAMED[2]], 1),
        ({"buckets": "81x64x64", "clip": ClipSpec(frames=81)}, ["81x64x64"], 81),
    ],
)
def test_sizes_are_a_resolution_or_names(
    settings: dict[str, Any], buckets: list[str], frames: int
) -> None:
    options = EncodeOptions(**settings)
    assert [bucket.name for bucket in options.bucket_list(32)] == buckets
    assert options.clip_spec.frames == frames


def test_aspect_buckets_of_a_resolution_have_its_area() -> None:
    found = EncodeOptions(resolution="480x832", buckets="aspect").bucket_list(32)
    assert "16x480x832" in [bucket.name for bucket in found]
    assert all(0.85 < b.height * b.width / (480 * 832) < 1.15 for b in found)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resolution": "480*832"}, "height x width, as 480x832"),
        ({"buckets": "sqare"}, "'sqare' is not a bucket.* Or write square"),
        ({"buckets": ("square", "1x32x32")}, "'square' is not a bucket"),
        ({"buckets": ""}, "'' is not a bucket"),
        ({"buckets": NAMED, "resolution": 512}, "resolution is 512, but buckets name their sizes"),
        ({"buckets": NAMED, "clip": ClipSpec(frames=17)}, "clip.frames is 17, but buckets name"),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises((ConfigError, GeometryError), match=message):
        EncodeOptions(**settings).bucket_list(32)


def test_a_resolution_without_aspect_buckets_is_told_the_nearest_with() -> None:
    with pytest.raises(LatentsError, match="Use 480x832"):
        EncodeOptions(resolution="470x830", buckets="aspect").bucket_list(32)


def test_the_command_line_takes_sizes_repeated_or_with_commas() -> None:
    for arguments in (
        ["--buckets", "16x32x32,1x32x32", "--buckets", "1x64x64"],
        ["--resolution", "32x64"],
    ):
        told = CliRunner().invoke(main, ["plan", "/nowhere", "/tmp/nothing", *arguments])
        assert "there is no such file or folder" in told.output, told.output
    told = CliRunner().invoke(main, ["plan", "/nowhere", "/tmp/nothing", "--resolution", "32y64"])
    assert "height x width, as 480x832" in told.output


BUCKETS = "16x32x32,16x32x64,4x32x32,1x32x64,1x64x32"
PICTURES = {"wide.png": barcode(7, 160, 80), "sub/tall.webp": barcode(9, 40, 80)}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos, four pictures of which one is broken, and text that is neither."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "sub").mkdir()
    write_video(folder / "long.mp4", constant_rate(40, 30.0))
    write_video(folder / "short.mp4", constant_rate(10, 30.0))
    for name, pixels in PICTURES.items():
        Image.fromarray(pixels).save(folder / name, lossless=True)
    (folder / "wide.txt").write_text("a wide picture")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(barcode(8, 160, 80)).save(folder / "turned.jpg", exif=exif)
    (folder / "broken.jpg").write_bytes(b"no picture at all")
    (folder / "notes.md").write_text("not listed")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("vae")
    image_vae().save_pretrained(folder)
    return f"diffusers:{folder}"


def encode(corpus: Path, store: Path, **settings: Any) -> EncodeReport:
    known: dict[str, Any] = {"workers": 1, "shard_rows": 4, "batch_size": 2}
    return encode_corpus(corpus, store, **known | settings)


@pytest.fixture(scope="module")
def stored(
    mixed: Path, model: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, EncodeReport]:
    store = tmp_path_factory.mktemp("stores") / "mixed.latents"
    return store, encode(mixed, store, model=model, buckets=BUCKETS)


def clips_of(opened: Store) -> dict[str, dict[str, Any]]:
    return {row["video"]: row for row in opened.plan.clips.to_pylist()}


def test_pictures_are_clips_of_one_frame_beside_videos(stored: tuple[Path, EncodeReport]) -> None:
    store, report = stored
    assert report.videos == Tally(found=6, encoded=5, skipped=0, failed=1)
    assert report.clips == Tally(found=5, encoded=5, skipped=0, failed=0)
    assert "is no JPEG" in next(iter(report.failed))
    assert {name: row["bucket"] for name, row in clips_of(open_store(store)).items()} == {
        "long.mp4": "16x32x32", "short.mp4": "4x32x32", "sub/tall.webp": "1x64x32",
        "turned.jpg": "1x64x32", "wide.png": "1x32x64",
    }  # fmt: skip
    assert clips_of(open_store(store))["wide.png"]["captions"] == ["a wide picture"]


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_encoded_as_the_model_encodes_it_alone(
    name: str, stored: tuple[Path, EncodeReport], model: str
) -> None:
    opened = open_store(stored[0])
    row = clips_of(opened)[name]
    key, bucket = ShardKey(row["bucket"], row["shard"]), Bucket.parse(row["bucket"])
    wanted = fit_frame(PICTURES[name], bucket, "bicubic")
    image = opened.read_row(key, row["row"], "content_image")
    assert isinstance(image, bytes)
    assert np.array_equal(decode_image(image), wanted)
    alone = load_autoencoder(model).encode(to_unit(torch.from_numpy(wanted)[None, None]))
    moments = opened.read_row(key, row["row"], "motion")
    assert np.abs(np.asarray(moments) - alone.moments[0].numpy()).max() < 2e-3
    assert np.asarray(opened.read_row(key, row["row"], "frame_times")).tolist() == [0.0]


def test_batches_of_a_mixed_store_are_of_one_size_each(stored: tuple[Path, EncodeReport]) -> None:
    seen: dict[str, int] = {}
    for batch in LatentDataset(stored[0], columns=("motion", "content_image"), batch_size=1):
        size = Bucket.parse(batch["bucket"])
        assert batch["latents"].shape == (1, 4, size.frames, size.height // 8, size.width // 8)
        assert batch["content_image"].shape == (1, 3, size.height, size.width)
        seen[size.name] = seen.get(size.name, 0) + 1
    assert seen == {"16x32x32": 1, "4x32x32": 1, "1x32x64": 1, "1x64x32": 2}


def test_a_mixed_store_resumes_is_proven_and_becomes_tars(
    stored: tuple[Path, EncodeReport], mixed: Path, model: str, tmp_path: Path
) -> None:
    store, _ = stored
    before = files_of(store)
    again = encode(mixed, store, model=model, buckets=BUCKETS.split(","))
    assert again.clips.encoded == 0
    assert files_of(store) == before
    assert verify(open_store(store)).ok
    convert_store(open_store(store), LocalFiles(tmp_path / "tars"), "webdataset")
    assert verify(open_store(tmp_path / "tars")).ok
    assert clips_of(open_store(store)) == clips_of(open_store(tmp_path / "tars"))


def test_decode_writes_clips_of_one_frame_as_pictures(
    stored: tuple[Path, EncodeReport], model: str, tmp_path: Path
) -> None:
    line = ["decode", stored[0], "--out", tmp_path, "--weights", model.partition(":")[2]]
    done = CliRunner().invoke(main, [*map(str, line), "--num", "9"])
    assert done.exit_code == 0, done.output
    assert "Wrote 2 videos, 3 pictures" in done.output
    assert done.output.count("PSNR") == 6  # each with its original, and the mean
    clip_id = clips_of(open_store(stored[0]))["wide.png"]["clip_id"]
    with Image.open(tmp_path / f"{clip_id}.png") as picture:
        assert picture.width > 2 * 64


@pytest.mark.parametrize("buckets", ["square", "16x32x32,1x32x32"])
def test_reducio_skips_pictures_and_says_so(
    buckets: str, mixed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked: dict[str, Any] = {"buckets": buckets, "resolution": 32 if buckets == "square" else 256}
    report = encode(mixed, tmp_path / "store", model="reducio-random:8", **asked)
    assert report.videos == Tally(found=6, encoded=1, skipped=5, failed=0)
    assert report.skipped["pictures, as reducio-random:8 takes no single frames"] == 4
    assert ("buckets of one frame are left out" in caplog.text) == (buckets != "square")
    videos = {row["video"]: row for row in open_store(tmp_path / "store").plan.videos.to_pylist()}
    assert "a picture: one frame, and clips have 16" in videos["broken.jpg"]["reason"]
    assert videos["broken.jpg"]["sha256"] is None  # its name tells: it is not even opened


def test_without_latents_reducio_is_not_asked_which_sizes_it_takes() -> None:
    asked: dict[str, Any] = {"columns": ("content_image", "caption"), "buckets": "1x50x50,7x50x50"}
    options = EncodeOptions(**asked)
    assert options.for_model() == options


def test_a_dry_run_refuses_what_the_run_would(mixed: Path) -> None:
    line = ["encode-corpus", str(mixed), "/nowhere/store", "--dry-run", "--resolution", "470x830"]
    told = CliRunner().invoke(main, line)
    assert told.exit_code == 1
    assert "The nearest that fits is 16x480x832" in told.output


def test_a_model_that_takes_pictures_says_which_bucket_they_want(mixed: Path) -> None:
    summary = plan_corpus(mixed, "/nowhere/store", buckets="16x32x32", workers=1)
    assert summary.counts.videos["found"] == 6
    assert sum(n for why, n in summary.reasons.items() if "add a bucket, as 1x32x32" in why) == 4


def test_sizes_that_a_model_does_not_take_are_refused_with_the_nearest(
    mixed: Path, tmp_path: Path
) -> None:
    video_vae("wan").save_pretrained(tmp_path / "wan")
    wan, store = f"diffusers:{tmp_path / 'wan'}", tmp_path / "store"
    for name, buckets, nearest in (
        (wan, "16x32x64,1x32x32", "16x32x64: .*17x32x64"),
        (wan, "1x30x64", "1x30x64: .*1x32x64"),
        ("reducio-random:8", "1x32x32", "1x32x32: .*16x32x32"),
        ("reducio-random:8", "16x480x830", "16x480x830: .*16x480x832"),
    ):
        with pytest.raises(GeometryError, match=nearest):
            encode(mixed, store, model=name, buckets=buckets)
    assert not store.exists()
    report = encode(mixed, store, model=wan, buckets="5x16x32,1x16x32", max_failed=0.5)
    assert report.videos == Tally(found=6, encoded=5, skipped=0, failed=1)
    assert {s.bucket for s in open_store(store).plan.shards()} == {"5x16x32", "1x16x32"}


def test_pictures_in_tables_and_tars_have_their_captions(
    mixed: Path, model: str, tmp_path: Path
) -> None:
    table = tmp_path / "pictures.csv"
    table.write_text("path,caption,aesthetic\nwide.png,of a table,5.5\nlong.mp4,a video,4.5\n")
    tar = tmp_path / "images-000.tar"
    with tarfile.open(tar, "w") as file:
        for name in ("wide.png", "wide.txt"):
            file.add(mixed / name, f"0001.{name.rpartition('.')[2]}")
    for corpus, settings, caption in (
        (table, {"root": str(mixed)}, "of a table"),
        (tar, {}, "a wide picture"),
    ):
        store = tmp_path / f"{corpus.stem}.latents"
        encode(corpus, store, model=model, buckets="16x32x32,1x32x32", **settings)
        clips = clips_of(open_store(store)).values()
        assert [c["captions"] for c in clips if c["bucket"] == "1x32x32"] == [[caption]]


def test_a_thumbnail_does_not_stand_for_its_video(mixed: Path, tmp_path: Path) -> None:
    """Nor make it ambiguous which file a table means that names videos without their endings."""
    for name in ("ab12.mp4", "ab12.jpg", "cd34.jpg"):
        source = "long.mp4" if name.endswith("mp4") else "turned.jpg"
        (tmp_path / name).write_bytes((mixed / source).read_bytes())
    (tmp_path / "list.csv").write_text("videoID,caption\nab12,a video\ncd34,a picture\n")
    found = {video.video: video for video in list_corpus(tmp_path / "list.csv")}
    assert sorted(found) == ["ab12.mp4", "cd34.jpg"]
    assert all(video.problem is None for video in found.values())
    (tmp_path / "images.jsonl").write_text('{"image": "cd34.jpg", "caption": "a picture"}\n')
    (picture,) = list_corpus(tmp_path / "images.jsonl")
    assert (picture.video, picture.captions) == ("cd34.jpg", ("a picture",))


@pytest.mark.parametrize("policy", ["all", "stride:0.5", "centre", "uniform:3", "random:3"])
@pytest.mark.parametrize("rate_fps", [0.1, 16.0, 24000 / 1001, 1000.0])
def test_a_picture_is_one_clip_of_one_frame_at_any_policy_and_rate(
    policy: str, rate_fps: float
) -> None:
    spec = ClipSpec(frames=1, rate_fps=rate_fps, policy=policy)
    assert clip_starts(STILL_DURATION_S, spec, "x.png") == [0.0]
    assert not clip_starts(STILL_DURATION_S, replace(spec, frames=2), "x.png")


def test_pictures_in_the_rows_of_a_parquet_file_and_at_addresses_are_clips(tmp_path: Path) -> None:
    """As `datasets` writes its feature Image, whose paths have no ending, or are missing."""
    data = []
    for number in range(3):
        Image.fromarray(barcode(number, 80, 40)).save(path := tmp_path / f"{number}.png")
        data.append(path.read_bytes())
    names = ["x/a.png", None, "b"]
    cells = [{"bytes": b, "path": path} for b, path in zip(data, names, strict=True)]
    table = pa.table({"image": cells, "label": [0, 1, 1], "url": ["https://x.org/a"] * 3})
    (tmp_path / "data").mkdir()
    pq.write_table(table, tmp_path / "data/t.parquet")
    buckets: dict[str, Any] = {"buckets": "1x32x64", "workers": 1, "device": "cpu"}
    buckets["columns"] = ("frame_times", "caption")
    report = encode_corpus(tmp_path / "data", tmp_path / "a", **buckets)
    assert report.clips == Tally(found=3, encoded=3)
    rows = open_store(tmp_path / "a").plan.clips.to_pylist()
    assert {row["video"]: row["label"] for row in rows} == {
        "t.parquet/a.png": 0, "t.parquet/1.image": 1, "t.parquet/b.image": 1
    }  # fmt: skip

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *_: object) -> None:
            return

    with serving(Handler) as place:
        lines = [f"http://{place}/0.png?w=3,one", f"http://{place}/9.png,none"]
        (tmp_path / "list.csv").write_text("\n".join(["url,caption", *lines]))
        report = encode_corpus(tmp_path / "list.csv", tmp_path / "b", **buckets)
    assert report.videos == Tally(found=2, encoded=1, failed=1)
    (row,) = open_store(tmp_path / "b").plan.clips.to_pylist()
    assert (row["captions"], row["bucket"]) == (["one"], "1x32x64")
    thumbnails = table.append_column("video", pa.array(["a.mp4"] * 3))
    pq.write_table(thumbnails.slice(0, 1), tmp_path / "thumbnails.parquet")
    assert [v.video for v in list_corpus(tmp_path / "thumbnails.parquet")] == ["a.mp4"]


def test_a_picture_is_told_by_its_name_also_in_an_address() -> None:
    assert is_still_name("https://host/a.JPG?size=9&name=x.mp4")
    assert is_still_name("a?b.png")
    assert not is_still_name("https://host/watch?v=a.jpg")
    assert not is_still_name("a.jpg.mp4")

"""A corpus goes in, a store comes out, and nothing is lost, done twice or mixed up."""

from __future__ import annotations

import json
import os
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
import zarr

from reducio_latents import LatentDataset, LatentTable, encode_corpus, load_autoencoder, open_store
from reducio_latents.cli.progress import Bars
from reducio_latents.core.geometry import Bucket
from reducio_latents.core.images import decode_image
from reducio_latents.encode import EncodeReport, Tally, batches, plan_corpus
from reducio_latents.encode.gpu import DeviceFit
from reducio_latents.encode.options import EncodeOptions
from reducio_latents.errors import ConfigError, CorpusError, StoreError
from reducio_latents.files import LocalFiles
from reducio_latents.files.source import VideoSource
from reducio_latents.store.commit import ShardKey
from reducio_latents.upkeep.convert import convert_store
from reducio_latents.upkeep.verify import verify
from reducio_latents.video import get_backend
from reducio_latents.video.pixels import to_unit
from reducio_latents.video.planes import fit_planes
from tests.corpora import write_corpus, write_video
from tests.stores import row_in

BUCKET = "16x32x32"


SMALL: dict[str, Any] = {
    "model": "reducio-random:8",
    "resolution": 32,
    "shard_rows": 2,
    "batch_size": 2,
    "workers": 2,
}


def encode(corpus: Path, store: Path, **settings: Any) -> EncodeReport:
    return encode_corpus(corpus, store, **{**SMALL, **settings})


def files_of(store: Path) -> dict[str, bytes]:
    """Return every file of a store, commits without their timings and checksum."""
    found = {}
    for path in sorted(p for p in store.rglob("*") if p.is_file()):
        name, data = path.relative_to(store).as_posix(), path.read_bytes()
        if name.startswith("commits/"):
            commit = json.loads(data)
            del commit["timings"], commit["crc32c"]
            data = json.dumps(commit).encode()
        found[name] = data
    return found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def encoded(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EncodeReport]:
    store = tmp_path_factory.mktemp("stores") / "sample.latents"
    return store, encode(corpus, store)


def test_every_video_and_clip_is_accounted_for(encoded: tuple[Path, EncodeReport]) -> None:
    store, report = encoded
    assert report.videos == Tally(found=6, encoded=3, skipped=2, failed=1)
    assert report.clips == Tally(found=5, encoded=4, skipped=1, failed=0)
    assert sum(report.failed.values()) == 1
    errors = pq.read_table(store / "errors.parquet").to_pylist()
    assert [(e["video"], e["clip_id"], e["stage"]) for e in errors] == [("text.mp4", None, "probe")]
    counts = open_store(store).meta.counts
    assert counts["clips"] == {"found": 5, "encoded": 4, "skipped": 1, "failed": 0}


def test_the_store_is_sound_and_says_what_made_it(encoded: tuple[Path, EncodeReport]) -> None:
    store, _ = encoded
    opened = open_store(store)
    report = verify(opened)
    assert report.ok, report.damage
    assert report.missing == {}
    model = load_autoencoder("reducio-random:8")
    assert opened.meta.columns["motion"].config["fingerprint"] == model.fingerprint


def test_a_clip_that_failed_because_another_corpus_lacks_its_video_is_made_by_its_own(
    corpus: Path, tmp_path: Path
) -> None:
    ours, theirs, store = tmp_path / "ours", tmp_path / "theirs", tmp_path / "store"
    for folder, names in [(ours, ["b.mp4", "deep/c.mp4"]), (theirs, ["b.mp4"])]:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(corpus / name, folder / name)

    def failed() -> dict[str, str]:
        rows = pq.read_table(store / "errors.parquet").to_pylist()
        return {row["video"]: row["reason"] for row in rows}

    plan_corpus(ours, store, write=True, **SMALL)  # as a run that is killed then
    encode(theirs, store)
    assert failed() == {"deep/c.mp4": "deep/c.mp4 is no longer in the corpus."}
    for folder in (ours, theirs):
        encode(folder, store)
        assert failed() == {}
    encode(ours, tmp_path / "alone")
    key = ShardKey("16x32x32", 0)
    alone, found = open_store(tmp_path / "alone"), open_store(store)
    for row in range(2):
        ours_now = found.read_row(key, row, "content_image")
        assert ours_now == alone.read_row(key, row, "content_image")
    assert verify(found).ok


def test_rows_are_what_the_encoder_makes_of_the_exact_frames(
    corpus: Path, encoded: tuple[Path, EncodeReport]
) -> None:
    store, _ = encoded
    opened = open_store(store)
    model = load_autoencoder("reducio-random:8")
    for shard in opened.plan.shards():
        key = ShardKey(shard.bucket, shard.shard)
        for clip in opened.plan.shard_clips(*key).to_pylist():
            source = VideoSource(str(corpus / clip["video"]))
            bucket = Bucket.parse(key.bucket)
            read = get_backend("pyav", as_planes=True).read_clips(
                source,
                [clip["start_s"]],
                frames=16,
                rate_fps=16.0,
                transform=partial(fit_planes, bucket=bucket, mode="bicubic"),
            )
            frames = next(iter(read))
            assert not isinstance(frames, Exception)
            pixels = np.stack(frames.frames)
            image = opened.read_row(key, clip["row"], "content_image")
            assert isinstance(image, bytes)
            np.testing.assert_array_equal(decode_image(image), pixels[7])
            times = opened.read_row(key, clip["row"], "frame_times")
            np.testing.assert_array_equal(times, frames.times_s)
            posterior = model.encode(to_unit(torch.from_numpy(pixels)[None]))
            moments = torch.cat([posterior.mean, posterior.logvar], 1)[0]
            row = opened.read_row(key, clip["row"], "motion")
            assert isinstance(row, np.ndarray)
            np.testing.assert_allclose(
                row.astype(np.float32), moments.numpy(), rtol=2e-3, atol=2e-3
            )


@pytest.mark.parametrize("whole_px", [1 << 30, 100])
def test_who_resizes_the_frames_changes_no_byte(
    whole_px: int,
    corpus: Path,
    encoded: tuple[Path, EncodeReport],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fitted: list[torch.Size] = []

    class Spy(DeviceFit):
        def __call__(self, frames: torch.Tensor, *how: Any) -> torch.Tensor:
            fitted.append(frames.shape)
            return super().__call__(frames, *how)

    monkeypatch.setattr(batches, "DeviceFit", Spy)
    monkeypatch.setattr(batches, "WHOLE_PX", whole_px)
    monkeypatch.setattr(EncodeOptions, "resizes_on_device", True)
    encode(corpus, tmp_path / "store")
    assert files_of(tmp_path / "store") == files_of(encoded[0])
    # Frames that are larger than is handed over whole have been resized by the workers.
    assert fitted == ([] if whole_px == 100 else [(16, 48 * 64 * 3 // 2)] * 4)


def test_straight_to_webdataset_is_what_converting_would_have_made(
    corpus: Path, encoded: tuple[Path, EncodeReport], tmp_path: Path
) -> None:
    encode(corpus, tmp_path / "tars", container="webdataset")
    convert_store(open_store(encoded[0]), LocalFiles(tmp_path / "converted"), "webdataset")
    converted, straight = files_of(tmp_path / "converted"), files_of(tmp_path / "tars")
    tars = {name for name in straight if name.endswith(".tar")}
    assert tars
    for name in {*tars, *(name for name in straight if name.startswith("commits/"))}:
        assert straight[name] == converted[name], name

    plan = {c["clip_id"]: c for c in open_store(encoded[0]).plan.clips.to_pylist()}
    seen = set()
    for sample in webdataset.WebDataset(
        sorted(map(str, tmp_path.glob("tars/*/*.tar"))), shardshuffle=False
    ).decode():
        clip = plan[sample["json"]["clip_id"]]
        assert sample["json"]["video"] == clip["video"]
        assert sample["json"]["start_s"] == clip["start_s"]
        seen.add(clip["clip_id"])
    options = {"batch_size": 1, "latents": "moments"}
    ours = LatentDataset(tmp_path / "tars", ("motion", "clip_id"), **options)  # type: ignore[arg-type]
    theirs = LatentDataset(encoded[0], ("motion", "clip_id"), **options)  # type: ignore[arg-type]
    for batch, other in zip(ours, theirs, strict=True):
        assert batch["clip_id"] == other["clip_id"]
        assert torch.equal(batch["motion"], other["motion"])
        seen.remove(batch["clip_id"][0])
    assert not seen


def test_plain_zarr_reads_the_same_numbers(encoded: tuple[Path, EncodeReport]) -> None:
    store, _ = encoded
    opened = open_store(store)
    group = zarr.open_group(store, mode="r")
    motion = group[f"{BUCKET}/motion"]
    captions = [row_in(group[f"{BUCKET}/caption"], row, 2) for row in range(4)]
    assert motion.shape == (4, 32, 4, 1, 1)
    for number in range(4):
        key, row = ShardKey(BUCKET, number // 2), number % 2
        np.testing.assert_array_equal(motion[number], opened.read_row(key, row, "motion"))
        assert captions[number] == opened.read_row(key, row, "caption")
    texts = {caption.decode() for caption in captions if caption is not None}
    assert texts == {"tab\there, emoji 🎬", ""}


def test_statistics_are_those_of_all_rows(encoded: tuple[Path, EncodeReport]) -> None:
    store, report = encoded
    motion = np.asarray(zarr.open_group(store, mode="r")[f"{BUCKET}/motion"][:], np.float64)
    mean = motion[:, :16]
    found = report.statistics["motion/all"]["mean"]
    np.testing.assert_allclose(found["mean"], mean.mean(axis=(0, 2, 3, 4)), atol=1e-12)
    np.testing.assert_allclose(found["std"], mean.std(axis=(0, 2, 3, 4)), atol=1e-12)
    final = torch.nn.functional.layer_norm(torch.tensor(mean), mean.shape[1:], eps=1e-5).numpy()
    found = report.statistics["motion/all"]["final"]
    np.testing.assert_allclose(found["mean"], final.mean(axis=(0, 2, 3, 4)), atol=1e-5)


def test_the_same_command_again_encodes_nothing_and_changes_no_byte(
    corpus: Path, encoded: tuple[Path, EncodeReport]
) -> None:
    store, _ = encoded
    before = files_of(store)
    report = encode(corpus, store)
    assert report.clips == Tally(found=5, encoded=0, skipped=5, failed=0)
    assert report.videos == Tally(found=6, encoded=0, skipped=5, failed=1)
    assert files_of(store) == before


def test_videos_that_come_later_are_added_and_nothing_moves(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    write_video(corpus / "m.mp4", 3.1, seed=1)
    store = tmp_path / "store"
    encode(corpus, store)
    rows = tuple(f"{BUCKET}/{name}/c/" for name in open_store(store).columns)
    before = {n: d for n, d in files_of(store).items() if n.startswith((*rows, "plan/"))}
    assert len(before) > len(rows)
    write_video(corpus / "a.mp4", 1.1, seed=2)  # sorts before what is there
    report = encode(corpus, store)
    assert report.clips == Tally(found=4, encoded=1, skipped=3, failed=0)
    after = files_of(store)
    assert {name: after[name] for name in before} == before
    assert verify(open_store(store)).ok


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"model": "reducio-random:8:ft4:1"}, "weights.sha256"),
        ({"model": "reducio-random:16"}, "width"),
        ({"model": "reducio-random:8:ft2"}, "temporal_stride"),
        ({"resolution": 64}, "buckets"),
        ({"shard_rows": 4}, "shard_rows"),
        ({"resize": "bilinear"}, "resize"),
        ({"image_codec": "png"}, "content_image"),
        ({"dtype": "bfloat16"}, "precision"),
    ],
)
def test_a_store_that_was_made_differently_is_refused_naming_what_differs(
    corpus: Path, encoded: tuple[Path, EncodeReport], settings: dict[str, Any], what: str
) -> None:
    store, _ = encoded
    before = files_of(store)
    with pytest.raises(StoreError, match=what):
        encode(corpus, store, **settings)
    assert files_of(store) == before


def test_a_place_that_holds_something_else_is_refused(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"notes\.txt"):
        encode(corpus, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_an_empty_folder_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match="empty"):
        encode(tmp_path / "empty", tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_failed_videos_are_taken_up_again_only_when_asked(tmp_path: Path) -> None:
    corpus, store = tmp_path / "corpus", tmp_path / "store"
    write_video(corpus / "a.mp4", 1.1, seed=1)
    (corpus / "b.mp4").write_bytes(b"")
    assert encode(corpus, store).videos.failed == 1
    write_video(corpus / "b.mp4", 1.1, seed=2)
    assert encode(corpus, store).videos.failed == 1
    report = encode(corpus, store, retry_failed=True)
    assert report.videos == Tally(found=2, encoded=1, skipped=1, failed=0)
    assert verify(open_store(store)).ok


def test_a_video_that_changes_after_planning_fails_and_the_others_do_not(tmp_path: Path) -> None:
    corpus, store = tmp_path / "corpus", tmp_path / "store"
    write_video(corpus / "a.mp4", 1.1, seed=1)
    write_video(corpus / "b.mp4", 1.1, seed=2)
    plan_corpus(corpus, store, write=True, resolution=32, shard_rows=2)
    write_video(corpus / "a.mp4", 2.1, seed=3)
    report = encode(corpus, store)
    assert report.clips == Tally(found=2, encoded=1, skipped=0, failed=1)
    assert any("changed since it was planned" in reason for reason in report.failed)
    assert report.exit_code == 3


@pytest.mark.parametrize("container", ["zarr", "webdataset"])
def test_a_video_that_was_replaced_by_one_of_its_size_fails_and_is_planned_anew(
    tmp_path: Path, container: str
) -> None:
    corpus, store = tmp_path / "corpus", tmp_path / "store"
    made = [write_video(tmp_path / f"{seed}.mp4", 2.1, seed=seed) for seed in (1, 2)]
    size = max(path.stat().st_size for path in made)
    old, new = (path.read_bytes().ljust(size, b"\0") for path in made)
    write_video(corpus / "b.mp4", 1.1, seed=3)
    (corpus / "a.mp4").write_bytes(old)
    plan_corpus(corpus, store, write=True, resolution=32, shard_rows=2)
    times = (corpus / "a.mp4").stat()
    (corpus / "a.mp4").write_bytes(new)
    os.utime(corpus / "a.mp4", ns=(times.st_atime_ns, times.st_mtime_ns))
    report = encode(corpus, store, container=container)
    assert report.clips == Tally(found=3, encoded=1, skipped=0, failed=2)
    assert "it has changed since it was planned: its hash differs." in report.failed
    report = encode(corpus, store, container=container)
    assert (report.clips.found, report.clips.encoded, report.clips.failed) == (5, 2, 2)
    opened = open_store(store)
    assert verify(opened).ok
    assert opened.plan.counts().videos["found"] == 2
    ids = opened.plan.clips["clip_id"].to_pylist()
    assert len(set(ids)) == len(ids) == 5
    before = files_of(store)
    assert encode(corpus, store, container=container).clips.encoded == 0
    assert files_of(store) == before
    fresh = tmp_path / "fresh"
    encode(corpus, fresh, container=container)
    motions = [
        [entry["motion"] for entry in LatentTable(place, ["motion"]) if entry["video"] == "a.mp4"]
        for place in (store, fresh)
    ]
    assert [len(found) for found in motions] == [2, 2]
    assert all(map(torch.equal, *motions))


def test_a_dry_run_writes_nothing(corpus: Path, tmp_path: Path) -> None:
    summary = plan_corpus(corpus, tmp_path / "store", resolution=32)
    assert summary.counts.clips["found"] == 5
    assert not (tmp_path / "store").exists()


def test_aspect_buckets_sort_videos_by_shape(corpus: Path, tmp_path: Path) -> None:
    report = encode(corpus, tmp_path / "store", resolution=64, buckets="aspect")
    assert report.clips.encoded == 4
    opened = open_store(tmp_path / "store")
    used = {shard.bucket for shard in opened.plan.shards()}
    assert used == {"16x64x64"} or all(Bucket.parse(b).width > 64 for b in used)
    assert verify(opened).ok


def test_unknown_settings_are_named() -> None:
    with pytest.raises(ConfigError, match="resoluton"):
        encode_corpus("x", "y", resoluton=3)
    with pytest.raises(ConfigError, match="did you mean 'motion'"):
        encode_corpus("x", "y", model="reducio-random:8", columns=("moton",))


def test_the_bar_says_how_long_the_encoder_waited(tmp_path: Path) -> None:
    write_video(tmp_path / "corpus" / "v.mp4", 1.1, seed=1)
    bars, shown = Bars(), []
    tell = bars.encoded

    def encoded(clips: int, failed: int) -> None:
        tell(clips, failed)
        shown.append(bars._shown())

    bars.encoded = encoded  # type: ignore[method-assign]
    encode(tmp_path / "corpus", tmp_path / "store", progress=bars)
    bars.close()
    assert re.fullmatch(r"\d+%", shown[-1]["wait for decode"])
    bars.spent("gpu busy", 1e9)
    assert bars._shown()["gpu busy"] == "100%"

"""Columns are independent: made in one go, one by one, killed in between, replaced."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from reducio_latents import encode_corpus, open_store
from reducio_latents.cli import main
from reducio_latents.conditioning.options import (
    ContentClipOptions,
    ContentLatentOptions,
    TextOptions,
)
from reducio_latents.core.images import decode_image
from reducio_latents.encode import EncodeOptions, EncodeReport, Tally, add_column
from reducio_latents.encode.progress import Progress
from reducio_latents.errors import ConfigError, CorpusError, GeometryError, StoreError
from reducio_latents.files.local import LocalFiles
from reducio_latents.store.commit import Commit, ShardKey, list_commits
from reducio_latents.store.quantize import dequantize
from reducio_latents.store.statistics import ChannelStatistics
from reducio_latents.store.text_rows import decode_text_row, empty_caption, text_row_lengths
from reducio_latents.upkeep.verify import verify
from reducio_latents.video.reading import ClipReader
from tests import tiny_models
from tests.corpora import write_video
from tests.forked import Python
from tests.test_encode_flow import files_of

pytest.importorskip("diffusers")

CONDITIONS = ("content_latent", "content_clip", "content_clip_pooled", "text")
FIRST = ("motion", "content_image", "caption")
BUCKET = "16x32x32"
CAPTIONS = {"a": "the red fox runs", "b": "the red fox runs", "c": "", "d": "a blue cat at night"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings that name small models."""
    root = tmp_path_factory.mktemp("models")
    tiny_models.image_vae().save_pretrained(root / "vae")
    tiny_models.clip_model().save_pretrained(root / "clip")
    tiny_models.save_text_encoder(root / "t5", dim=256)
    tiny_models.save_text_encoder(root / "other_t5", seed=1, dim=256)
    return {
        "content_latent": ContentLatentOptions(model=str(root / "vae"), dtype="float32"),
        "content_clip": ContentClipOptions(model=str(root / "clip"), dtype="float32"),
        "text": TextOptions(model=str(root / "t5"), dtype="float32"),
    }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of 2 + 1 + 1 + 1 clips, and one whose last clip cannot be decoded any more."""
    folder = tmp_path_factory.mktemp("corpus")
    for seed, (name, caption) in enumerate(CAPTIONS.items()):
        write_video(folder / f"{name}.mp4", 2.1 if name == "a" else 1.1, seed=seed)
        (folder / f"{name}.txt").write_text(caption)
    return folder


def settings(models: dict[str, Any], **more: Any) -> dict[str, Any]:
    known = {"resolution": 32, "shard_rows": 3, "batch_size": 2, "workers": 2, "device": "cpu"}
    return {**known, "model": "reducio-random:8", **models, **more}


def encode(corpus: Path, store: Path, models: dict[str, Any], **more: Any) -> EncodeReport:
    return encode_corpus(corpus, store, **settings(models, **more))


@pytest.fixture(scope="module")
def whole(corpus: Path, models: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with all columns, made in one go."""
    store = tmp_path_factory.mktemp("whole") / "store"
    encode(corpus, store, models, columns=(*FIRST, *CONDITIONS))
    return store


@pytest.fixture(scope="module")
def first(corpus: Path, models: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the first columns only."""
    store = tmp_path_factory.mktemp("first") / "store"
    encode(corpus, store, models, columns=FIRST)
    return store


def copy_of(store: Path, target: Path) -> Path:
    for path in (p for p in store.rglob("*") if p.is_file()):
        copy = target / path.relative_to(store)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    return target


@contextmanager
def no_video_opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a video was opened")

    with monkeypatch.context() as patch:
        patch.setattr(ClipReader, "__init__", refuse)
        yield


def test_new_captions_are_taken_for_their_clips_alone(
    corpus: Path, models: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    listed, store, fresh = copy_of(corpus, tmp_path / "corpus"), tmp_path / "a", tmp_path / "b"
    columns = ("motion", "caption", "text")
    encode(listed, store, models, columns=columns)
    before = files_of(store)
    (listed / "b.txt").write_text("the blue fox sleeps")
    report = encode(listed, store, models, columns=columns)
    assert (report.captions_changed, report.captions_updated, report.videos_gone) == (1, False, 0)
    assert files_of(store) == before
    report = encode(listed, store, models, columns=columns, update_captions=True)
    assert (report.captions_changed, report.captions_updated) == (1, True)
    assert report.clips == Tally(found=5, encoded=3, skipped=2)
    after = files_of(store)
    made = {name for name in before if after[name] != before[name] and "x32x32/" in name}
    assert {n.split("/")[1] for n in made if not n.startswith("commits/")} == {"caption", "text"}
    assert all("/c/0" in n or n.endswith("/000000.json") for n in made)
    encode(listed, fresh, models, columns=columns)
    expected = files_of(fresh)
    plan = ("plan/sha256-00000.txt", "plan/part-00000.parquet")
    assert [n for n in expected if after[n] != expected[n] and n not in plan] == []
    assert after.keys() == expected.keys()
    assert open_store(store).plan.clips.equals(open_store(fresh).plan.clips)
    assert verify(open_store(store)).ok
    # By a run without `text`, whose rows are then missing, not stale; and one video is gone.
    (listed / "b.txt").write_text("the fox is back")
    (listed / "d.mp4").unlink()
    report = encode(listed, store, models, columns=columns[:2], update_captions=True)
    assert (report.captions_changed, report.videos_gone) == (1, 1)
    assert "add-column" in caplog.text
    assert verify(open_store(store)).missing == {"text": 1}
    add_column(store, ["text"], **settings(models))
    assert verify(open_store(store)).missing == {}


def test_a_store_made_in_one_go_equals_one_made_column_by_column(
    corpus: Path,
    whole: Path,
    first: Path,
    models: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    by_add, by_encode = copy_of(first, tmp_path / "add"), copy_of(first, tmp_path / "encode")
    with no_video_opened(monkeypatch):
        for name in CONDITIONS:
            report = add_column(by_add, [name], **settings(models))
            assert (report.shards_left, report.exit_code) == (0, 0)
        for count in range(1, len(CONDITIONS) + 1):
            encode(corpus, by_encode, models, columns=(*FIRST, *CONDITIONS[:count]))
    expected = files_of(whole)
    assert files_of(by_add) == expected
    assert files_of(by_encode) == expected
    health = verify(open_store(by_add))
    assert health.ok, health.damage
    assert health.missing == {}


def test_columns_that_are_added_at_the_same_time_are_all_there_in_the_end(
    first: Path, whole: Path, models: dict[str, Any], tmp_path: Path
) -> None:
    store = copy_of(first, tmp_path / "store")

    class AddingMeanwhile(Progress):
        begun = False

        def planned(self, clips: int, done: int) -> None:
            if not self.begun:  # once the first column is described, before it is made
                self.begun = True
                add_column(store, [*CONDITIONS[1:]], **settings(models))

    add_column(store, [CONDITIONS[0]], progress=AddingMeanwhile(), **settings(models))
    assert files_of(store) == files_of(whole)


def test_rows_are_what_each_encoder_makes_of_the_stored_image_and_caption(
    whole: Path, models: dict[str, Any]
) -> None:
    import torch

    from reducio_latents.conditioning.images import ImageAutoencoder, ImageEncoder
    from reducio_latents.conditioning.text import TextEncoder

    store = open_store(whole)
    vae, clip, text = (
        ImageAutoencoder(models["content_latent"]),
        ImageEncoder(models["content_clip"]),
        TextEncoder(models["text"]),
    )
    seen = 0
    for shard in store.plan.shards():
        key = ShardKey(shard.bucket, shard.shard)
        for clip_row in store.plan.shard_clips(*key).to_pylist():
            row: Any = {n: store.read_row(key, clip_row["row"], n) for n in store.columns}
            pixels = torch.from_numpy(decode_image(row["content_image"])).permute(2, 0, 1)[None]
            pixels = pixels / 127.5 - 1
            mean, logvar = vae.encode(pixels)
            codes = clip.encode(pixels)
            wanted = {
                "content_latent": torch.cat([mean, logvar], 1)[0].numpy(),
                "content_clip": codes.tokens[0].numpy(),
                "content_clip_pooled": codes.pooled[0].numpy(),  # type: ignore[index]
            }
            for name, values in wanted.items():
                np.testing.assert_allclose(row[name], values, rtol=1e-3, atol=1e-3)
            vectors = text.encode([row["caption"].decode()])[0].vectors
            np.testing.assert_allclose(decode_text_row(row["text"])[0], vectors, atol=2e-3)
            seen += 1
    assert seen == 5


def test_equal_captions_are_stored_once_and_an_empty_one_is_the_empty_row(whole: Path) -> None:
    store = open_store(whole)
    commits = [
        Commit.read(store.files, key, n) for n, key in list_commits(store.files) if n == "text"
    ]
    places = {}
    for commit in commits:
        for clip, (start, size) in zip(
            store.plan.shard_clips(*commit.key).to_pylist(),
            store.ranges(commit).tolist(),
            strict=True,
        ):
            places[clip["clip_id"]] = (commit.shard, clip["video"], start, size)
    by_shard: dict[tuple[int, str], set[int]] = {}
    for shard, video, start, _ in places.values():
        by_shard.setdefault((shard, CAPTIONS[video[0]]), set()).add(start)
    assert all(len(starts) == 1 for starts in by_shard.values())
    stored = sum({(shard, start): size for shard, _, start, size in places.values()}.values())
    one_by_one = sum(size for *_, size in places.values())
    assert 0 < stored < one_by_one - 2000
    empty = empty_caption(store.meta.columns["text"])
    assert empty.shape == (1, 256)
    number = next(c for c in places if places[c][1] == "c.mp4")
    key = ShardKey(BUCKET, places[number][0])
    row = next(r for r in store.plan.shard_clips(*key).to_pylist() if r["clip_id"] == number)["row"]
    payload = store.read_row(key, row, "text")
    assert isinstance(payload, bytes)
    assert np.array_equal(decode_text_row(payload)[0], empty)


def test_statistics_are_those_of_all_rows_merged_exactly(whole: Path) -> None:
    store = open_store(whole)
    rows: dict[str, list[Any]] = {name: [] for name in CONDITIONS}
    for shard in store.plan.shards():
        for row in range(shard.rows):
            for name in CONDITIONS:
                rows[name].append(store.read_row(ShardKey(shard.bucket, shard.shard), row, name))
    values = {
        "content_latent": ("mean", np.stack(rows["content_latent"])[:, :4]),
        "content_clip": ("final", np.concatenate(rows["content_clip"])),
        "content_clip_pooled": ("final", np.stack(rows["content_clip_pooled"])),
        "text": ("final", np.concatenate([decode_text_row(r)[0] for r in rows["text"]])),
    }
    for name, (what, found) in values.items():
        expected = ChannelStatistics.of(found.astype(np.float64))
        for bucket in (BUCKET, "all"):
            summary = store.meta.statistics[f"{name}/{bucket}"][what]
            np.testing.assert_allclose(summary["mean"], expected.mean, atol=1e-9)
            np.testing.assert_allclose(summary["std"], expected.std, atol=1e-9)
    tokens = [text_row_lengths(r)[0][0] for r in rows["text"]]
    assert store.meta.statistics["text/all"]["tokens"]["mean"] == [pytest.approx(np.mean(tokens))]
    assert store.meta.statistics["text/all"]["truncated"]["mean"] == [0.0]


def test_replacing_a_column_leaves_all_others_byte_identical(
    whole: Path, models: dict[str, Any], tmp_path: Path
) -> None:
    store = copy_of(whole, tmp_path / "store")
    other = TextOptions(model=models["text"].model.replace("t5", "other_t5"), dtype="float32")
    with pytest.raises(StoreError, match="--replace text"):
        add_column(store, ["text"], **settings(models, text=other))
    assert files_of(store) == files_of(whole)
    add_column(store, replacing=["text"], **settings(models, text=other))
    before, after = files_of(whole), files_of(store)
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    assert {name.split("/")[2 if "commits" in name else 1] for name in changed if "/" in name} == {
        "text"
    }
    assert {name for name in changed if "/" not in name} <= {"zarr.json", "index.json"}
    assert verify(open_store(store)).ok
    add_column(store, replacing=["text"], **settings(models))
    assert files_of(store) == before


class KilledError(BaseException):
    """Stands for a kill: nothing in the package catches it."""


@contextmanager
def killed_at(operation: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Let file operations pass up to number `operation`, then none."""
    done = [0]

    def counting(method: Any) -> Any:
        def call(self: LocalFiles, *arguments: Any) -> Any:
            done[0] += 1
            if done[0] > operation:
                raise KilledError
            return method(self, *arguments)

        return call

    with monkeypatch.context() as patch:
        for name in ("write", "delete"):
            patch.setattr(LocalFiles, name, counting(getattr(LocalFiles, name)))
        yield done


def let_go_of_locks(store: Path) -> None:
    """Make the locks that a killed process has left those of a process that is gone."""
    for path in [*store.glob("*.lock"), *store.glob("writers/*.json")]:
        path.write_text(json.dumps({**json.loads(path.read_text()), "started": "0"}))


@pytest.mark.parametrize("action", ["add", "replace"])
def test_killed_before_any_write_or_delete_it_resumes_to_the_same_bytes(
    action: str,
    whole: Path,
    first: Path,
    models: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = TextOptions(model=models["text"].model.replace("t5", "other_t5"), dtype="float32")
    if action == "add":
        start, call = first, {"columns": ["content_clip", "text"], **settings(models)}
    else:
        start, call = whole, {"replacing": ["text"], **settings(models, text=other)}
    undisturbed = copy_of(start, tmp_path / "undisturbed")
    with killed_at(10**6, monkeypatch) as operations:
        add_column(undisturbed, **call)
    expected = files_of(undisturbed)
    assert operations[0] > 8
    for operation in range(action == "replace", operations[0], 2):
        store = copy_of(start, tmp_path / f"killed{operation}")
        with pytest.raises(KilledError), killed_at(operation, monkeypatch):
            add_column(store, **call)
        let_go_of_locks(store)
        add_column(store, **call)
        assert files_of(store) == expected, operation


def test_a_process_that_is_killed_in_the_middle_resumes_to_the_same_bytes(
    first: Path, models: dict[str, Any], tmp_path: Path
) -> None:
    undisturbed, store = (copy_of(first, tmp_path / name) for name in ("undisturbed", "store"))
    add_column(undisturbed, ["content_clip", "text"], **settings(models))
    program = (
        "import sys\n"
        "from reducio_latents.cli import main\n"
        f"main(['add-column', {str(store)!r}, 'content_clip', 'text', '--device', 'cpu',\n"
        f"      '--content-clip-model', {models['content_clip'].model!r}, '--batch-size', '2',\n"
        f"      '--content-clip-dtype', 'float32', '--text-dtype', 'float32',\n"
        f"      '--text-model', {models['text'].model!r}])\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = Python(["-c", program], environment)
    deadline = time.monotonic() + 600
    while process.poll() is None and not (store / "commits" / BUCKET / "text").is_dir():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    output = process.communicate()
    assert (store / "commits" / BUCKET / "text").is_dir(), output
    add_column(store, ["content_clip", "text"], **settings(models))
    assert files_of(store) == files_of(undisturbed)


def test_clips_whose_image_is_missing_fail_for_the_same_reason(
    corpus: Path, models: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "corpus"
    copy_of(corpus, folder)
    options = settings(models, columns=("content_image", "caption"))
    encode_corpus(folder, tmp_path / "planned", **{**options, "columns": ("caption",)})
    broken = folder / "a.mp4"
    size = broken.stat().st_size
    broken.write_bytes(broken.read_bytes()[: size // 3].ljust(size, b"\0"))
    by_add, at_once = (copy_of(tmp_path / "planned", tmp_path / name) for name in ("add", "once"))
    once = encode_corpus(
        folder, at_once, **{**options, "columns": ("content_image", "content_clip")}
    )
    encode_corpus(folder, by_add, **{**options, "columns": ("content_image",)})
    add_column(by_add, ["content_clip"], **settings(models))
    assert once.clips.failed >= 1
    assert files_of(by_add) == files_of(at_once)


def test_columns_that_need_frames_or_exact_images_are_made_from_the_videos(
    corpus: Path, whole: Path, models: dict[str, Any], tmp_path: Path
) -> None:
    lossy = tmp_path / "lossy"
    encode(corpus, lossy, models, columns=("content_image", "caption"), image_codec="jpeg")
    add_column(lossy, ["content_latent", "motion"], **settings(models))
    found, expected = open_store(lossy), open_store(whole)
    for name in ("content_latent", "motion"):
        for row in range(2):
            key = ShardKey(BUCKET, 0)
            ours, theirs = (s.read_row(key, row, name) for s in (found, expected))
            np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    moved = copy_of(lossy, tmp_path / "moved")
    with pytest.raises(CorpusError, match=r"videos are needed, because .*content_image"):
        add_column(moved, ["content_clip"], corpus=tmp_path / "gone", **settings(models))
    assert files_of(moved) == files_of(lossy)


def in_eight_bits(store: Path, target: Path, models: dict[str, Any], zstd: str) -> Path:
    """Copy a store and add vectors of 8 bits, those of one column compressed."""
    clip = ContentClipOptions(
        model=models["content_clip"].model, dtype="float32", quantization="int8"
    )
    text = TextOptions(model=models["text"].model, dtype="float32", values="int8")
    copy = copy_of(store, target)
    conditions = settings(models, content_clip=clip, text=text, zstd=(zstd,))
    add_column(copy, ["content_clip", "text"], **conditions)
    return copy


def test_eight_bits_halve_the_bytes_and_write_their_error_into_the_store(
    first: Path, whole: Path, models: dict[str, Any], tmp_path: Path
) -> None:
    small = in_eight_bits(first, tmp_path / "int8", models, zstd="text")
    packed, exact = open_store(small), open_store(whole)
    key = ShardKey(BUCKET, 0)
    for row in range(3):
        codes: Any = packed.read_row(key, row, "content_clip")
        tokens = np.asarray(exact.read_row(key, row, "content_clip"), np.float32)
        error = np.linalg.norm(dequantize(codes) - tokens) / np.linalg.norm(tokens)
        assert error < 0.01
        ours, theirs = (
            decode_text_row(store.read_row(key, row, "text"))[0]  # type: ignore[arg-type]
            for store in (packed, exact)
        )
        assert np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 0.01
    for name in ("content_clip", "text"):
        measured = packed.meta.statistics[f"{name}/all"]["int8_error"]["mean"][0]
        assert 0.001 < measured < 0.01
    assert packed.meta.columns["text"].compression == "zstd"
    assert verify(packed).ok
    sizes = [
        sum(int(store.ranges(commit)[:, 1].sum()) for commit in commits_of(folder, "text"))
        for store, folder in ((packed, small), (exact, whole))
    ]
    assert sizes[0] < 0.62 * sizes[1]


def test_readers_give_values_whatever_way_they_are_stored(
    first: Path, whole: Path, models: dict[str, Any], tmp_path: Path
) -> None:
    from reducio_latents import LatentDataset, LatentTable

    small = in_eight_bits(first, tmp_path / "int8", models, zstd="content_clip")
    columns = ["content_clip", "text"]
    tables = [LatentTable(store, columns=columns) for store in (small, whole)]
    datasets = [
        LatentDataset(store, columns=columns, batch_size=5, seed=3) for store in (small, whole)
    ]
    batches = [next(iter(dataset)) for dataset in datasets]
    for name, shape in (("content_clip", (16, 32)), ("text", (6, 256))):
        ours, theirs = (table[0][name].float() for table in tables)
        assert ours.shape == theirs.shape
        assert (ours - theirs).norm() / theirs.norm() < 0.01
        ours, theirs = (batch[name].float() for batch in batches)
        assert tuple(ours.shape) == (5, *shape)
        assert (ours - theirs).norm() / theirs.norm() < 0.01


def test_tars_take_columns_that_come_later_and_others_in_place_of_some(
    corpus: Path, whole: Path, models: dict[str, Any], tmp_path: Path
) -> None:
    store = tmp_path / "tars"
    encode(corpus, store, models, columns=("content_image", "caption"), container="webdataset")
    before = files_of(store)
    add_column(store, ["content_clip", "text"], **settings(models))
    assert all(files_of(store)[name] == before[name] for name in before if name.endswith(".tar"))
    other = TextOptions(model=models["text"].model.replace("t5", "other_t5"), dtype="float32")
    add_column(store, replacing=["text"], **settings(models, text=other))
    add_column(store, replacing=["text"], **settings(models))
    found, expected = open_store(store), open_store(whole)
    assert verify(found).ok
    for name in ("content_clip", "text"):
        for row in range(3):
            ours, theirs = (s.read_row(ShardKey(BUCKET, 0), row, name) for s in (found, expected))
            np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def commits_of(path: Path, column: str) -> list[Commit]:
    files = open_store(path).files
    return [Commit.read(files, key, name) for name, key in list_commits(files) if name == column]


def test_several_captions_of_a_clip_are_several_vectors(
    corpus: Path, models: dict[str, Any], tmp_path: Path
) -> None:
    table = tmp_path / "videos.jsonl"
    table.write_text(
        '{"path": "d.mp4", "caption": ["a cat", "the blue dog", "a cat"]}\n'
        '{"path": "c.mp4", "caption": []}\n'
    )
    store = tmp_path / "store"
    encode(table, store, models, columns=("caption", "text"), root=str(corpus))
    opened = open_store(store)
    rows = {
        clip["video"]: opened.read_row(ShardKey(BUCKET, 0), clip["row"], "text")
        for clip in opened.plan.shard_clips(BUCKET, 0).to_pylist()
    }
    several, none = (decode_text_row(rows[name]) for name in ("d.mp4", "c.mp4"))  # type: ignore[arg-type]
    assert [len(v) for v in several] == [3, 4, 3]
    assert np.array_equal(several[0], several[2])
    assert len(none) == 1
    assert np.array_equal(none[0], empty_caption(opened.meta.columns["text"]))


def test_a_video_model_of_diffusers_goes_the_same_way(corpus: Path, tmp_path: Path) -> None:
    from reducio_latents import LatentTable
    from reducio_latents.core.clips import ClipSpec

    tiny_models.video_vae("wan").save_pretrained(tmp_path / "wan")
    model = {"model": f"diffusers:{tmp_path / 'wan'}", "columns": ("motion", "content_image")}
    with pytest.raises(GeometryError, match="13 or 17 frames"):
        encode(corpus, tmp_path / "bad", model)
    store = tmp_path / "store"
    report = encode(corpus, store, model, clip=ClipSpec(frames=17))
    assert report.clips.encoded == 5
    column = open_store(store).meta.columns["motion"]
    assert column.row_shapes["17x32x32"] == (8, 5, 4, 4)
    assert column.final is not None
    assert column.final["shift"] == [0.1, -0.2, 0.3, 0.0]
    assert column.encoder == "diffusers:AutoencoderKLWan"
    assert tuple(LatentTable(store, columns=["motion"])[0]["motion"].shape)[1:] == (5, 4, 4)
    out = tmp_path / "checks"
    decode = [str(store), "--weights", str(tmp_path / "wan"), "--num", "1", "--out", str(out)]
    result = CliRunner().invoke(main, ["decode", *decode, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert list(out.rglob("*.mp4"))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({}, ConfigError, "name at least one column"),
        ({"columns": ["content_clop"]}, ConfigError, "did you mean 'content_clip'"),
        ({"columns": ["text"], "zstd": ("txt",)}, ConfigError, "no column 'txt'"),
        (
            {"columns": ["text"], "text": TextOptions(model="./nowhere")},
            ConfigError,
            "no model at './nowhere'",
        ),
    ],
)
def test_a_bad_request_changes_nothing(
    call: dict[str, Any],
    error: type[Exception],
    message: str,
    first: Path,
    models: dict[str, Any],
    tmp_path: Path,
) -> None:
    store = copy_of(first, tmp_path / "store")
    with pytest.raises(error, match=message):
        add_column(store, **settings(models, **call))
    assert files_of(store) == files_of(first)


def test_zstd_is_refused_where_stock_readers_would_not_see_through_it(
    corpus: Path, models: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="zarr container only"):
        encode(corpus, tmp_path / "s", models, container="webdataset", zstd=("motion",))
    assert EncodeOptions().zstd == ()

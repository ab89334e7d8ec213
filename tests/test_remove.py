"""A takedown: clips leave a store for good, with all that says what they showed, and stay out."""

from __future__ import annotations

import io
import json
import shutil
import threading
import uuid
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from reducio_latents import encode_corpus
from reducio_latents.cli import main
from reducio_latents.dataset import LatentDataset, LatentTable
from reducio_latents.encode import EncodeReport, Tally, plan_corpus
from reducio_latents.encode.prepare import Planned, take_captions
from reducio_latents.errors import ConfigError, LatentsError, StoreError
from reducio_latents.files import Files, LocalFiles, open_files
from reducio_latents.store import Store, open_store
from reducio_latents.store.commit import ClipQuality, Commit, ShardKey, list_commits
from reducio_latents.store.plan import read_plan
from reducio_latents.store.turns import ALONE, alone, at_work
from reducio_latents.store.whole import sum_up
from reducio_latents.store.writer import StoreWriter
from reducio_latents.upkeep.convert import convert_store
from reducio_latents.upkeep.remove import RemoveReport, remove_clips
from reducio_latents.upkeep.verify import verify
from tests import latent_stores
from tests.corpora import write_video
from tests.latent_stores import StoreSpec
from tests.object_storage import BUCKET as PLACE
from tests.object_storage import FaultyProxy, s3, s3_server
from tests.stores import KilledError, MemoryFiles, put_commit

__all__ = ["s3", "s3_server"]

Container = Literal["zarr", "webdataset"]
CONTAINERS: tuple[Container, ...] = ("zarr", "webdataset")
COLUMNS = ("motion", "content_image", "caption", "text")
SECRET = "the words of video 1, which nobody may read"
NAME, TWIN = "folder/00001.mp4", "folder/00003.mp4"
CHANGES = ("write", "create", "swap", "delete")


def make_store(folder: Path, container: Container, **changes: Any) -> Store:
    """Write 5 videos of 3 clips into shards of 4; video 3 has the bytes of video 1."""
    spec = StoreSpec(
        videos=5,
        clips_per_video=3,
        shard_rows=4,
        columns=COLUMNS,
        container=container,
        duplicates={3: 1},
        captions=lambda video: (SECRET,) if video in (1, 3) else (f"video {video}", "another"),
        failed=frozenset({4}),
    )
    latent_stores.write_store(folder, replace(spec, **changes))
    files = LocalFiles(folder)
    for number, row in ((0, 3), (1, 1)):  # clips 3 and 5: of video 1
        commit = Commit.read(files, ShardKey("16x32x32", number), "motion")
        ids = open_store(folder).plan.shard_clips("16x32x32", number)["clip_id"].to_pylist()
        found = (ClipQuality(row=r, clip_id=ids[r], psnr=30, psnr_frames=(30,)) for r in (0, row))
        put_commit(files, replace(commit, quality=tuple(found)))
    plan = read_plan(files)
    assert plan is not None
    sum_up(StoreWriter(files, open_store(folder).meta), plan)
    return open_store(folder)


def secrets_of(store: Store, video: str) -> list[bytes]:
    """Return every row of a video's clips, as it is stored, and its caption."""
    found = [SECRET.encode()]
    for column, key in list_commits(store.files):
        commit = store.commit(key, column)
        videos = store.plan.shard_clips(*key)["video"].to_pylist()
        for row, (start, size) in enumerate(store.ranges(commit).tolist()):
            if videos[row] == video and start >= 0:
                found.append(store.files.read_range(commit.file, start, size))
    assert len(found) > 4
    return found


def require_gone(files: dict[str, bytes], secrets: Sequence[bytes]) -> None:
    """Search every byte of some files, and every cell of tables."""
    for path, data in files.items():
        if path.endswith(".parquet"):
            data += repr(pq.read_table(io.BytesIO(data)).to_pylist()).encode()
        assert not [secret for secret in secrets if secret in data], path


def bytes_of(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


class KilledFiles:
    """Files whose process is killed at its n-th change."""

    def __init__(self, files: Files, number: int) -> None:
        self._files, self._left = files, number

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._files, name)
        if name not in CHANGES:
            return found

        def change(*args: Any) -> Any:
            self._left -= 1
            if self._left <= 0:
                raise KilledError
            return found(*args)

        return change


def remove_in(
    files: Files, monkeypatch: pytest.MonkeyPatch, kill_at: int = 10**6
) -> RemoveReport | None:
    """Remove a video; None if that was killed at the n-th change of a file."""
    with monkeypatch.context() as patch:
        patch.setattr(
            "reducio_latents.upkeep.remove.open_files", lambda _: KilledFiles(files, kill_at)
        )
        try:
            return remove_clips("store", [NAME])
        except KilledError:
            return None


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_removal_that_is_killed_anywhere_resumes_clean(
    tmp_path: Path, container: Container, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_store(tmp_path, container, columns=("motion", "caption"))
    begun, whole, told = bytes_of(tmp_path), MemoryFiles(), False
    with pytest.raises(AssertionError):
        require_gone(begun, secrets_of(open_store(tmp_path), NAME))
    whole.data = dict(begun)
    report = remove_in(whole, monkeypatch)
    assert report is not None
    assert (report.clips, report.shards) == (6, 2)
    for number in count(1, 1 if container == "zarr" else 2):
        files = MemoryFiles()
        files.data = dict(begun)
        if remove_in(files, monkeypatch, kill_at=number) is not None:
            assert number > 12
            break
        if ALONE in files.data:  # whose holder is dead
            files.data[ALONE] = json.dumps({**json.loads(files.data[ALONE]), "pid": 0}).encode()
        told |= any("was removed" in damage.what for damage in verify(Store(files)).damage)
        remove_in(files, monkeypatch)
        assert files.data == whole.data, number
    assert told


def test_new_captions_that_are_killed_anywhere_while_they_are_taken_resume_clean(
    tmp_path: Path,
) -> None:
    store = make_store(tmp_path, "zarr", columns=("motion", "caption"))
    begun, plan = bytes_of(tmp_path), store.plan.clips.select(["clip_id", "captions"]).to_pylist()
    new = {row["clip_id"]: ("other",) for row in plan if SECRET in row["captions"]}

    def take(files: Files, kill_at: int = 10**6) -> bool:
        """Return whether it was not killed."""
        found = read_plan(files)
        assert found is not None
        said = {row["clip_id"]: tuple(row["captions"]) for row in found.clips.to_pylist()}
        changed = {clip: texts for clip, texts in new.items() if said[clip] != texts}
        planned = Planned(lambda _: None, found, captions=changed)
        writer = StoreWriter(KilledFiles(files, kill_at), store.meta)
        try:
            if changed:
                take_captions(writer, planned, ["caption"], "run")
        except KilledError:
            return False
        return True

    whole, sums = MemoryFiles(), "plan/sha256-00000.txt"
    whole.data = dict(begun)
    assert take(whole)
    taken = pq.read_table(io.BytesIO(whole.data["plan/part-00000.parquet"]))["captions"]
    assert taken.to_pylist().count(["other"]) == len(new) == 6
    gone = {path for path in begun if path not in whole.data and path.startswith("commits/")}
    assert gone == {f"commits/16x32x32/caption/{number:06d}.json" for number in (0, 1)}
    for number in count(1):
        files = MemoryFiles()
        files.data = dict(begun)
        if take(files, number):
            assert number > 5
            break
        if ALONE in files.data:  # whose holder is dead
            files.data[ALONE] = json.dumps({**json.loads(files.data[ALONE]), "pid": 0}).encode()
        take(files)
        if ALONE in files.data:  # killed at its last step but one: old checksums stay beside new
            del files.data[ALONE]
            files.data[sums] = whole.data[sums]
        assert files.data == whole.data, number


def test_a_removal_from_a_corpus_that_is_only_planned(tmp_path: Path) -> None:
    for seed, name in enumerate("abc"):
        write_video(tmp_path / f"corpus/{name}.mp4", 1.1, seed=seed)
        (tmp_path / f"corpus/{name}.txt").write_text(f"what {name} shows")
    plan_corpus(tmp_path / "corpus", tmp_path / "s", write=True, resolution=32, shard_rows=2)
    before = bytes_of(tmp_path / "s")
    assert remove_clips(tmp_path / "s", ["b.mp4"], dry_run=True).clips == 1
    assert bytes_of(tmp_path / "s") == before
    assert remove_clips(tmp_path / "s", ["b.mp4"]).clips == 1
    require_gone(bytes_of(tmp_path / "s"), [b"what b shows"])
    report = encode(tmp_path / "corpus", tmp_path / "s")
    assert report.clips == Tally(found=3, encoded=2, skipped=1)
    assert verify(open_store(tmp_path / "s")).ok
    (tmp_path / "none").mkdir()
    with pytest.raises(StoreError):
        remove_clips(tmp_path / "none", ["b.mp4"])


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_removal_leaves_a_sound_store_of_the_others(tmp_path: Path, container: Container) -> None:
    folder = tmp_path / "store"
    old = make_store(folder, container)
    kept = {c: list(LatentTable(old, [c])) for c in COLUMNS}
    kept = {c: [e for e in rows if e["video"] not in (NAME, TWIN)] for c, rows in kept.items()}
    gone = old.plan.clips.to_pylist()[3]["clip_id"]
    # What is left of runs that were killed: a file half-written, and rows that nothing speaks of.
    (folder / ".partial").mkdir(exist_ok=True)
    (folder / ".partial" / "half").write_bytes(SECRET.encode())
    key, secrets = ShardKey("16x32x32", 1), secrets_of(old, NAME)
    StoreWriter(old.files, old.meta).drop_commit(key, "caption")
    foreseen = remove_clips(folder, [NAME], dry_run=True)
    assert open_store(folder).plan.removed == {}
    report = remove_clips(folder, [NAME])
    assert report.videos == foreseen.videos == {NAME: 3, TWIN: 3}
    require_gone(bytes_of(folder), secrets)
    store = open_store(folder)
    health = verify(store)
    assert (health.damage, health.missing) == ([], {"caption": 1})
    assert store.meta.counts["clips"] == {"found": 15, "encoded": 7, "skipped": 8, "failed": 0}
    assert store.meta.counts["videos"]["failed"] == 0
    statuses = {row["video"]: row["status"] for row in store.plan.videos.to_pylist()}
    assert (statuses[NAME], statuses[TWIN]) == ("removed", "removed")
    for column, entries in kept.items():
        table = LatentTable(store, [column])
        found = list(table)
        assert [e["clip_id"] for e in found] == [
            e["clip_id"] for e in entries if column != "caption" or e["clip_id"] in table
        ]
    table = LatentTable(store, ["motion"])
    with pytest.raises(KeyError, match="was removed"):
        table[gone]
    dataset = LatentDataset(store, columns=("motion", "clip_id"), batch_size=1, latents="moments")
    seen = {clip for batch in dataset for clip in batch["clip_id"]}
    assert seen == {entry["clip_id"] for entry in kept["motion"]}
    assert remove_clips(folder, [NAME]).before == 6


def test_single_clips_go_and_the_rest_of_their_video_stays(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    ids = make_store(folder, "zarr").plan.clips["clip_id"].to_pylist()
    (tmp_path / "ids.txt").write_text(f"{ids[0]}\n\n{ids[7]}\n")
    pq.write_table(pa.table({"clip_id": ids[8:9]}), tmp_path / "ids.parquet")
    assert remove_clips(folder, clip_ids=tmp_path / "ids.txt").clips == 2
    assert remove_clips(folder, clip_ids=tmp_path / "ids.parquet").clips == 1
    store = open_store(folder)
    assert verify(store).ok
    assert {r["status"] for r in store.plan.videos.to_pylist()} == {"planned", "duplicate"}
    left = set(LatentTable(store, ["motion"]).clip_ids)
    assert left.isdisjoint([ids[0], *ids[7:9]])
    assert {ids[1], ids[6]} < left
    remove_clips(folder, clip_ids=ids[6:7])
    found = {r["video"]: r["status"] for r in open_store(folder).plan.videos.to_pylist()}
    assert [name for name, status in found.items() if status == "removed"] == ["folder/00002.mp4"]


def test_what_is_not_there_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    make_store(folder, "zarr")
    before = bytes_of(folder)
    (tmp_path / "empty.txt").write_text("\n")
    for given, why in (
        ({"clip_ids": tmp_path / "empty.txt"}, r"empty\.txt names no clip"),
        ({"videos": ["folder/0001.mp4"]}, "did you mean 'folder/00001.mp4'"),
        ({"videos": [NAME], "clip_ids": ["x"]}, "1 clips are not in the plan, such as x"),
        ({"clip_ids": tmp_path / "none.txt"}, "is no list of clip ids"),
        ({}, "name the videos or the clips"),
    ):
        with pytest.raises(ConfigError, match=why):
            remove_clips(folder, **given)
    assert bytes_of(folder) == before


def test_the_command_says_what_would_go_and_then_removes_it(tmp_path: Path) -> None:
    folder = str(tmp_path / "store")
    make_store(tmp_path / "store", "zarr")
    before = bytes_of(tmp_path)
    asked = CliRunner().invoke(main, ["remove", folder, "--video", NAME, "--dry-run"])
    assert (asked.exit_code, bytes_of(tmp_path)) == (0, before)
    assert f"would go: {TWIN} (3 clips)" in asked.output
    assert "6 clips of 2 videos would be removed; 8 files" in asked.output
    done = CliRunner().invoke(main, ["remove", folder, "--video", NAME])
    assert "6 clips of 2 videos were removed" in done.output
    status = CliRunner().invoke(main, ["status", folder]).output.splitlines()[1].split()
    assert status[2:7] == ["3/3", "9", "0", "3", "0"]  # done, failed, removed, left
    assert CliRunner().invoke(main, ["remove", folder]).exit_code == 2


def encode(corpus: Path, store: Path, **changes: Any) -> EncodeReport:
    settings = {"columns": ("frame_times", "caption"), "resolution": 32, "shard_rows": 2}
    return encode_corpus(corpus, store, **{**settings, "workers": 1, "device": "cpu", **changes})


def test_what_was_removed_is_not_made_again(tmp_path: Path) -> None:
    corpus, store, other = tmp_path / "corpus", tmp_path / "store", tmp_path / "tars"
    for seed, name in enumerate("abc"):
        write_video(corpus / f"{name}.mp4", 1.1, seed=seed)
        (corpus / f"{name}.txt").write_text(f"what {name} shows")
    encode(corpus, store)
    plan_corpus(corpus, other, write=True, resolution=32, shard_rows=2)
    first, whole = open_store(store).plan.clips["clip_id"].to_pylist(), bytes_of(store)
    remove_clips(store, ["a.mp4"])
    removed = bytes_of(store)
    report = encode(corpus, store)
    assert (report.exit_code, report.videos_gone, report.captions_changed) == (0, 0, 0)
    assert report.clips == Tally(found=3, encoded=0, skipped=3)
    assert report.skipped["clips that were removed"] == 1
    assert bytes_of(store) == removed
    # Nor if all that failed is tried again, nor under another name.
    shutil.copy(corpus / "a.mp4", corpus / "z.mp4")
    report = encode(corpus, store, retry_failed=True, update_captions=True)
    assert report.videos == Tally(found=4, encoded=0, skipped=4)
    assert report.clips.found == 3
    assert verify(open_store(store)).ok
    # Nor a clip that was removed before it was made, whose place stays empty.
    encode(corpus, other, container="webdataset")
    (corpus / "z.mp4").unlink()
    lost = tmp_path / "planned"
    plan_corpus(corpus, lost, write=True, resolution=32, shard_rows=2)
    (lost / "zarr.json").write_bytes(whole["zarr.json"])
    remove_clips(lost, clip_ids=first[:1])
    (corpus / "a.mp4").unlink()
    report = encode(corpus, lost)
    assert (report.exit_code, report.clips) == (0, Tally(found=3, encoded=2, skipped=1))
    assert LatentTable(lost).clip_ids == first[1:]
    # And a store that is made of it lacks it, too.
    target = LocalFiles(tmp_path / "converted")
    convert_store(open_store(store), target, "webdataset")
    assert verify(Store(target)).ok
    assert LatentTable(Store(target)).clip_ids == first[1:]
    require_gone(bytes_of(target.root), [b"what a shows"])


def test_no_one_removes_while_a_run_is_at_work(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    files = make_store(folder, "zarr").files
    before = bytes_of(folder)
    with at_work(files, "encoding"):
        [shown] = files.list("writers")
        dead = json.dumps({**json.loads(files.read(shown)), "pid": 0}).encode()
        with pytest.raises(StoreError, match="in use: encoding"):
            remove_clips(folder, [NAME])
    assert bytes_of(folder) == before
    entered = threading.Event()

    def work() -> None:
        with at_work(files, "encoding"):
            entered.set()

    worker = threading.Thread(target=work)
    with alone(files, "removing clips"):
        with pytest.raises(StoreError, match="in use: removing clips"), alone(files, "removing"):
            pass
        worker.start()
        assert not entered.wait(0.3)
    worker.join()
    assert entered.is_set()
    # One that was killed is no longer at work.
    files.write("writers/dead-1.json", dead)
    remove_clips(folder, [NAME])
    assert not list(files.list("writers"))
    # Nothing stays of a run that found nothing to do where nothing was.
    with pytest.raises(LatentsError):
        encode(tmp_path / "nothing", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_removal_on_object_storage_and_in_a_cache(
    tmp_path: Path, s3: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDUCIO_CACHE", str(tmp_path / "cache"))
    url = f"s3://{PLACE}/{uuid.uuid4().hex}"
    make_store(tmp_path / "store", "webdataset", columns=("motion", "caption"))
    files = open_files(url)
    for path, data in bytes_of(tmp_path / "store").items():
        files.write(path, data)
    secrets = secrets_of(open_store(url), NAME)

    def clips() -> dict[str, bytes]:
        dataset = LatentDataset(
            url, ("motion", "clip_id"), batch_size=1, latents="moments", shuffle=False
        )
        return {b["clip_id"][0]: b["motion"].numpy().tobytes() for b in dataset}

    before = clips()
    remove_clips(url, [NAME])
    require_gone({path: files.read(path) for path in files.list("")}, secrets)
    after = clips()
    assert len(after) == 9
    assert all(before[clip] == row for clip, row in after.items())
    assert verify(open_store(url)).ok

"""Stores on the Hub, a stub of it: what is uploaded, what is not, and that it reads back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner, Result
from PIL import Image

from reducio_latents import LatentDataset
from reducio_latents.cli import main
from reducio_latents.errors import ConfigError, StoreError
from reducio_latents.files import LocalFiles, open_files
from reducio_latents.store import Store, open_store
from reducio_latents.store.commit import ClipQuality, Commit, Failure, ShardKey
from reducio_latents.store.meta import StoreMeta
from reducio_latents.store.plan import edit_part
from reducio_latents.store.reports import Reports
from reducio_latents.upkeep.publish import publish_store
from reducio_latents.upkeep.remove import remove_clips
from reducio_latents.upkeep.verify import verify
from tests.hub_stub import HubStub, serving
from tests.latent_stores import StoreSpec, write_store
from tests.stores import put_commit

constants = pytest.importorskip("huggingface_hub.constants")
hf_file_system = pytest.importorskip("huggingface_hub.hf_file_system")

URL, REPOSITORY = "hf://datasets/me/clips", "datasets/me/clips"
SECRET = "/home/somebody/secret"
"""A folder of this machine, of which nothing may be published."""
SPEC = StoreSpec(
    videos=5, clips_per_video=3, shard_rows=8, columns=("motion", "content_image", "caption"),
    failed=frozenset({1}), captions=lambda video: (f"a fox | <b>{video}</b>",),
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose every file names folders of this machine, and what a run leaves."""
    path = tmp_path_factory.mktemp("made") / "clips.latents"
    files = LocalFiles(path)
    store = write_store(path, SPEC)
    key = ShardKey("16x32x32", 0)
    commit = store.commit(key, "motion")
    [failure] = commit.failed
    failed = (replace(failure, reason=f"{SECRET}/videos/1.mp4: cut off at 3 s"),)
    quality = tuple(
        ClipQuality(row=row, clip_id=clip, psnr=30.0 + row, psnr_frames=(30.0 + row,))
        for row, clip in enumerate(store.plan.shard_clips(*key)["clip_id"].to_pylist())
        if row != failure.row
    )
    put_commit(files, replace(commit, failed=failed, quality=quality))

    def secrets(videos: pa.Table) -> pa.Table:
        at = videos.schema.get_field_index("url")
        urls = [f"{SECRET}/videos/{n}.mp4" for n in range(len(videos))]
        return videos.set_column(at, videos.schema.field(at), pa.array(urls))

    edit_part(files, 0, {"videos": secrets})

    def described(meta: StoreMeta | None) -> StoreMeta:
        assert meta is not None
        columns = dict(meta.columns)
        columns["motion"] = replace(columns["motion"], weights=f"{SECRET}/vae.safetensors")
        counts = {"clips": {"found": 15, "encoded": 14, "skipped": 0, "failed": 1}}
        return replace(
            meta, columns=columns, counts=counts, versions={"pyarrow": "1"},
            corpus=f"{SECRET}/videos", root=SECRET,
        )  # fmt: skip

    StoreMeta.update(files, described)
    reports = Reports()
    for name, shard in store.index.entries:
        reports.add(Commit.read(files, shard, name))
    for name, data in reports.files(Store(files).plan).items():
        files.write(name, data)
    (path / "runs").mkdir()
    (path / "runs" / "rank.json").write_text(SECRET)
    (path / "drop.lock").write_text(SECRET)
    (path / "notes.txt").write_text("of nobody else's business")
    return path


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "clips.latents")
    return tmp_path / "clips.latents"


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStub]:
    with serving({}) as stub:
        monkeypatch.setattr(constants, "ENDPOINT", stub.url)
        template = stub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("HF_TOKEN", "hf_mine")
        monkeypatch.setenv("REDUCIO_CACHE", str(tmp_path / "cache"))
        hf_file_system.HfFileSystem.clear_instance_cache()
        yield stub
        hf_file_system.HfFileSystem.clear_instance_cache()


def publish(*words: object) -> Result:
    return CliRunner().invoke(main, ["publish", *map(str, words)])


def errors_of(result: Result) -> list[str]:
    lines = result.output.splitlines()
    return [line.partition("Error: ")[2] for line in lines if "Error: " in line]


def contents(folder: Path) -> dict[str, bytes]:
    files = LocalFiles(folder)
    return {name: files.read(name) for name in files.list("")}


def front_matter(card: str) -> Any:
    return yaml.safe_load(card.split("---\n")[1])


def test_what_is_uploaded_is_the_store_and_reads_back(
    stub: HubStub, store: Path, tmp_path: Path
) -> None:
    before = contents(store)
    result = publish(store, URL, "--licence", "cc-by-4.0")
    assert result.exit_code == 0, result.output
    assert "14 pictures in the preview" in result.output
    assert "uploaded to https://huggingface.co/datasets/me/clips" in result.output
    assert contents(store) == before
    assert [path.name for path in tmp_path.iterdir() if path.name != "hub"] == ["clips.latents"]
    assert stub.commits[-1] == ["README.md", "zarr.json"]

    names = ("motion", "caption", "clip_id")
    near = LatentDataset(str(store), columns=names, batch_size=7, seed=3)
    far = LatentDataset(URL, columns=names, batch_size=7, seed=3)
    batches = [*zip(near, far, strict=True)]
    assert len(batches) == 2
    for ours, theirs in batches:
        assert ours["clip_id"] == theirs["clip_id"]
        assert ours["caption"] == theirs["caption"]
        assert np.array_equal(ours["latents"], theirs["latents"])
    assert verify(Store(open_files(URL))).ok

    fetched = tmp_path / "fetched"
    for name, data in stub.repositories[REPOSITORY].items():
        (fetched / name).parent.mkdir(parents=True, exist_ok=True)
        (fetched / name).write_bytes(data)
    (fetched / ".cache" / "huggingface").mkdir(parents=True)
    (fetched / ".cache" / "huggingface" / "CACHEDIR.TAG").write_text("its client's")
    report = verify(open_store(fetched))
    assert (report.ok, report.missing) == (True, {}), report.damage


def test_nothing_of_this_machine_is_published(stub: HubStub, store: Path) -> None:
    assert publish(store, URL).exit_code == 0
    files = stub.repositories[REPOSITORY]
    assert not {name for name in files if name.startswith(("runs", "drop.lock", "notes"))}
    for name, data in files.items():
        assert b"somebody" not in data, name
        if name.endswith(".parquet"):
            table = pq.read_table(pa.BufferReader(data))
            assert "somebody" not in str(table.to_pylist()) + str(table.schema), name
    published = Store(open_files(URL))
    assert (published.meta.corpus, published.meta.root) == ("videos", None)
    assert published.meta.columns["motion"].weights == "vae.safetensors"
    commit = published.commit(ShardKey("16x32x32", 0), "motion")
    assert [failure.reason for failure in commit.failed] == ["1.mp4: cut off at 3 s"]
    assert published.plan.videos["url"].to_pylist()[:2] == ["0.mp4", "1.mp4"]
    assert b"it_is_kept" not in files["zarr.json"]
    assert published.meta.columns.keys() == open_store(store).meta.columns.keys()


def test_the_card_and_the_preview_are_as_the_hub_takes_them(stub: HubStub, store: Path) -> None:
    result = publish(store, URL, "--license", "cc-by-4.0", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "nothing was uploaded" in result.output
    assert not stub.asked
    folder = store.with_name("clips.latents.publish") / "files"
    text = (folder / "README.md").read_text()
    front = front_matter(text)
    assert front["license"] == "cc-by-4.0"
    assert front["size_categories"] == ["n<1K"]
    [config] = front["configs"]
    assert config["default"] is True
    [data] = config["data_files"]
    motion = open_store(store).meta.columns["motion"]
    for said in (
        motion.encoder, motion.fingerprint, '"rule": "layer_norm"', "14 encoded", "| cc-by-4.0 |",
        "36.70 (95%) dB", f'LatentDataset("{URL}", columns=["motion", "caption"]',
    ):  # fmt: skip
        assert said in text
    code = text.split("```python\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line]) <= 5
    compile(code, "card", "exec")

    preview = folder / data["path"]
    table = pq.read_table(preview)
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert [*features] == table.column_names
    assert features["image"] == {"_type": "Image"}
    assert table.schema.field("image").type == pa.struct(
        [("bytes", pa.binary()), ("path", pa.string())]
    )
    assert table["caption"][0].as_py() == "a fox | <b>0</b>"
    assert len(table) == 14
    for row in table.to_pylist():
        (preview.parent / "x.webp").write_bytes(row["image"]["bytes"])
        with Image.open(preview.parent / "x.webp") as image:
            assert (image.format, image.size) == ("WEBP", (32, 32))


def test_an_upload_that_broke_off_goes_on(stub: HubStub, store: Path) -> None:
    stub.refused_commits = {1}  # of the description, which goes last
    broken = publish(store, URL)
    assert broken.exit_code == 1
    assert "is not uploaded yet" in errors_of(broken)[0]
    folder = store.with_name("clips.latents.publish") / "files"
    (folder / "junk").write_text("of a run that was killed")
    (folder / "index.json").write_text("half of i")
    with pytest.raises(StoreError, match="is not a latent store"):
        open_store(URL)
    hf_file_system.HfFileSystem.clear_instance_cache()
    assert publish(store, URL).exit_code == 0
    assert [len(names) for names in stub.commits[1:]] == [2, 2]  # the rest was there
    assert "junk" not in stub.repositories[REPOSITORY]
    again = len(stub.commits)
    assert publish(store, URL).exit_code == 0
    assert len(stub.commits) == again
    assert verify(Store(open_files(URL))).ok


def test_a_store_is_published_by_one_at_a_time(tmp_path: Path) -> None:
    source = write_store(tmp_path / "a.latents", SPEC)
    seen: list[str] = []

    def again(what: str, _: int) -> None:
        if not seen:
            seen.append(what)
            with pytest.raises(StoreError, match=r"is in use: publishing"):
                publish_store(source, URL, dry_run=True)

    report = publish_store(source, URL, dry_run=True, progress=again)
    assert seen
    assert verify(open_store(report.folder)).ok


def test_a_store_without_pictures_is_shown_by_its_captions(stub: HubStub, tmp_path: Path) -> None:
    source = write_store(tmp_path / "a.latents", replace(SPEC, columns=("motion",)))
    report = publish_store(source, URL, dry_run=True)
    table = pq.read_table(report.folder / "preview" / "clips.parquet")
    assert report.pictures == 0
    assert "image" not in table.column_names
    assert table["caption"][0].as_py() == "a fox | <b>0</b>"
    assert "license" not in front_matter((report.folder / "README.md").read_text())


def test_a_takedown_reaches_the_next_upload(stub: HubStub, store: Path) -> None:
    assert publish(store, URL).exit_code == 0
    stub.repositories[REPOSITORY] |= {"LICENSE": b"mine", "16x32x32/old/c/0/0": b"gone since"}
    (store / "drop.lock").unlink()
    remove_clips(store, ["folder/00002.mp4"])
    result = publish(store, URL)
    assert result.exit_code == 0, result.output
    assert "1 file of an earlier upload deleted there" in result.output
    hf_file_system.HfFileSystem.clear_instance_cache()
    published = Store(open_files(URL))
    assert verify(published).ok
    assert sum(map(len, published.plan.removed.values())) == 3
    assert stub.repositories[REPOSITORY]["LICENSE"] == b"mine"
    data = stub.repositories[REPOSITORY]["preview/clips.parquet"]
    assert "folder/00002.mp4" not in pq.read_table(pa.BufferReader(data))["video"].to_pylist()


def test_without_a_token_there_is_one_line(
    stub: HubStub, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    stub.writers = {"hf_writer"}
    refused = publish(store, URL)
    monkeypatch.delenv("HF_TOKEN")
    asked = len(stub.asked)
    missing = publish(store, URL)
    for result, said in ((refused, "the Hub refuses this token"), (missing, "needs a token")):
        assert result.exit_code == 1
        [line] = errors_of(result)
        assert said in line
        assert "`hf auth login`, or set HF_TOKEN" in line
    assert len(stub.asked) == asked
    assert publish(store, URL, "--dry-run").exit_code == 0


def test_names_of_videos_lose_the_folder_of_this_machine(stub: HubStub, tmp_path: Path) -> None:
    source = write_store(tmp_path / "a.latents", SPEC)
    files = LocalFiles(tmp_path / "a.latents")

    def absolute(table: pa.Table) -> pa.Table:
        at = table.schema.get_field_index("video")
        names = [f"{SECRET}/{name}" for name in table["video"].to_pylist()]
        return table.set_column(at, table.schema.field(at), pa.array(names))

    edit_part(files, 0, {"part": absolute, "videos": absolute})
    for name, key in source.index.entries:
        commit = Commit.read(files, key, name)
        named = tuple(replace(f, video=f"{SECRET}/{f.video}") for f in commit.failed)
        put_commit(files, replace(commit, failed=named))
    report = publish_store(open_store(tmp_path / "a.latents"), URL, dry_run=True)
    staged = open_store(report.folder)
    assert staged.plan.clips["video"][0].as_py() == "00000.mp4"
    failed: list[Failure] = [
        f for e in staged.index.entries.values() for f in staged.commit(e.key, e.column).failed
    ]
    assert {failure.video for failure in failed} == {"00000.mp4"}


def test_what_cannot_be_published_is_refused(stub: HubStub, store: Path) -> None:
    opened = open_store(store)
    for url in ("hf://me/clips", "hf://datasets/clips", "s3://a/b", "hf://datasets/a/b@main"):
        with pytest.raises(ConfigError, match="write hf://datasets/USER/NAME"):
            publish_store(opened, url)
    with pytest.raises(ConfigError, match="such as cc-by"):
        publish_store(opened, URL, licence="mine: all\nmine")
    folder = store.with_name("clips.latents.publish")
    folder.mkdir()
    (folder / "mine.txt").write_text("not to be touched")
    with pytest.raises(StoreError, match="in the way"):
        publish_store(opened, URL)
    shutil.rmtree(folder)
    path = store / opened.commit(ShardKey("16x32x32", 0), "motion").file
    whole = path.read_bytes()
    path.write_bytes(b"!" + whole[1:])
    with pytest.raises(StoreError, match=r"rows do not match their checksums.*mend it before"):
        publish_store(opened, URL)
    path.unlink()
    with pytest.raises(StoreError, match="is missing"):
        publish_store(opened, URL)
    assert not stub.commits

"""Tars: videos are addressed where they lie; texts beside them are read; damage is told."""

from __future__ import annotations

import io
import json
import random
import tarfile
from pathlib import Path

import fsspec
import pytest
import webdataset

from reducio_latents.corpus import CorpusVideo, corpus_root, list_corpus
from reducio_latents.errors import ConfigError, CorpusError
from reducio_latents.files.source import join_url, open_source

Member = tuple[str, bytes]


def tar(path: Path, members: list[Member], *, form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def sample(key: str, size: int = 3000, **values: object) -> list[Member]:
    """Make a sample as video2dataset writes it."""
    meta = {"key": key, "status": "success", "caption": f"caption {key}", **values}
    return [
        (f"{key}.json", json.dumps(meta).encode()),
        (f"{key}.mp4", random.Random(key).randbytes(size)),
        (f"{key}.txt", f"caption {key}".encode()),
    ]


def read(video: CorpusVideo) -> bytes:
    with open_source(video.source) as file:
        return file.read()


def test_videos_are_addressed_in_their_tars_as_webdataset_reads_them(tmp_path: Path) -> None:
    for shard in range(2):
        members = [m for i in range(3) for m in sample(f"{shard:05d}{i:04d}", 500 + i, fps=24.0)]
        tar(tmp_path / f"{shard:05d}.tar", members)
    (tmp_path / "00000_stats.json").write_text("{}")
    videos = list_corpus(tmp_path)
    urls = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [video.video for video in videos] == [
        f"{Path(s['__url__']).name}/{s['__key__']}.mp4" for s in theirs
    ]
    for video, other in zip(videos, theirs, strict=True):
        assert read(video) == other["mp4"]
        assert video.captions == (other["txt"].decode(),)
        assert video.extra == {"key": other["__key__"], "status": "success", "fps": 24.0}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_format_and_long_names_are_read(tmp_path: Path, form: int) -> None:
    name = "/".join(["folder-é" * 5] * 2) + "/video.mp4"
    path = tar(tmp_path / "a.tar", [(name, b"one"), ("./b.mp4", b"two")], form=form)
    videos = list_corpus(path)
    assert {video.video: read(video) for video in videos} == {
        f"a.tar/{name}": b"one",
        "a.tar/b.mp4": b"two",
    }


def test_a_sample_is_what_stands_before_the_first_dot(tmp_path: Path) -> None:
    members = [
        ("x.left.mp4", b"l"),
        ("x.right.mp4", b"r"),
        ("x.txt", b" both "),
        ("x.seg.json", b"not ours"),
        ("._x.mp4", b"finder"),
        ("y.mp4", b"y"),
    ]
    videos = list_corpus(tar(tmp_path / "a.tar", members))
    assert [(v.video, v.captions) for v in videos] == [
        ("a.tar/x.left.mp4", ("both",)),
        ("a.tar/x.right.mp4", ("both",)),
        ("a.tar/y.mp4", ()),
    ]


def test_without_a_text_the_json_says_the_caption(tmp_path: Path) -> None:
    meta = {"text": "from json", "label": "a label", "tags": ["x"], "n": 3}
    path = tar(tmp_path / "a.tar", [("x.mp4", b"x"), ("x.json", json.dumps(meta).encode())])
    (video,) = list_corpus(path)
    assert video.captions == ("from json",)
    assert video.extra == {"label": "a label", "tags": '["x"]', "n": 3}
    (video,) = list_corpus(path, caption_column="label")
    assert video.captions == ("a label",)
    assert video.extra["text"] == "from json"


def test_a_caption_in_the_json_that_differs_from_the_text_is_carried(tmp_path: Path) -> None:
    members = [("x.mp4", b"x"), ("x.txt", b"short"), ("x.json", b'{"caption": "long"}')]
    (video,) = list_corpus(tar(tmp_path / "a.tar", members))
    assert (video.captions, dict(video.extra)) == (("short",), {"caption": "long"})


def test_folders_globs_and_braces_of_tars_are_listed(tmp_path: Path) -> None:
    for shard in range(12):
        tar(tmp_path / f"{shard:05d}.tar", [(f"{shard}.mp4", b"x")])
    assert len(list_corpus(tmp_path)) == 12
    assert len(list_corpus(tmp_path / "0000*.tar")) == 10
    videos = list_corpus(f"{tmp_path}/{{00008..00012}}.tar")
    assert [v.video for v in videos if v.problem is None] == [
        "00008.tar/8.mp4", "00009.tar/9.mp4", "00010.tar/10.mp4", "00011.tar/11.mp4"
    ]  # fmt: skip
    assert [(v.video, v.problem) for v in videos if v.problem] == [
        ("00012.tar", "there is no such file")
    ]
    assert [v.video for v in list_corpus(tmp_path / "00003.tar")] == ["00003.tar/3.mp4"]


def test_tars_and_files_may_stand_side_by_side(tmp_path: Path) -> None:
    tar(tmp_path / "x/a.tar", [("b.mp4", b"in the tar")])
    (tmp_path / "x/c.mp4").write_bytes(b"beside")
    assert [read(v) for v in list_corpus(tmp_path)] == [b"in the tar", b"beside"]


def test_a_moved_tar_is_found_by_its_address(tmp_path: Path) -> None:
    tar(tmp_path / "here/x/a.tar", [("f/b.mp4", b"x")])
    (before,) = list_corpus(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    (after,) = list_corpus(tmp_path / "there")
    assert before.address == after.address == "x/a.tar"
    assert join_url(corpus_root(tmp_path / "there"), before.address) == after.source.url


def test_remote_tars_are_read_in_place(tmp_path: Path) -> None:
    data = tar(tmp_path / "a.tar", sample("x") + sample("y")).read_bytes()
    fs = fsspec.filesystem("memory")
    fs.pipe("/shards/a.tar", data)
    try:
        videos = list_corpus("memory://shards/{a,b}.tar")
        assert [v.video for v in videos] == ["a.tar/x.mp4", "a.tar/y.mp4", "b.tar"]
        assert read(videos[1]) == random.Random("y").randbytes(3000)
        assert "no such file" in str(videos[2].problem)
    finally:
        fs.rm("/shards", recursive=True)


def test_wherever_a_tar_is_cut_what_it_lacks_is_told_and_the_rest_is_whole(tmp_path: Path) -> None:
    whole = tar(tmp_path / "whole.tar", sample("a") + sample("b") + sample("c")).read_bytes()
    expected = {f"cut.tar/{k}.mp4": random.Random(k).randbytes(3000) for k in "abc"}
    content, second = len(whole.rstrip(b"\0")), whole.index(b"b.json")
    rng = random.Random(1)
    for size in [0, 100, 512, *(rng.randrange(content) for _ in range(60))]:
        path = tmp_path / "cut.tar"
        path.write_bytes(whole[:size])
        try:
            videos = list_corpus(path)
        except CorpusError:  # not even the first sample is sure to be whole
            assert size < second + 512
            continue
        for video in videos:
            if video.problem is None:
                assert read(video) == expected[video.video]
                assert len(video.captions) == 1 or size % 512 == 0
        assert size % 512 == 0 or any("damaged" in str(video.problem) for video in videos)


def test_a_damaged_header_does_not_end_the_archive_quietly(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", sample("a") + sample("b") + sample("c"))
    with tarfile.open(path) as archive:
        offset = archive.getmember("c.json").offset
    data = bytearray(path.read_bytes())
    data[offset + 150] ^= 0xFF
    path.write_bytes(data)
    found = {video.video: video.problem for video in list_corpus(path)}
    assert found.keys() == {"a.tar", "a.tar/a.mp4", "a.tar/b.mp4"}
    assert found["a.tar"] == f"the tar is damaged: no header at byte {offset}"
    assert found["a.tar/a.mp4"] is None
    assert "damaged" in str(found["a.tar/b.mp4"])  # its text may have been lost


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar.zst"])
def test_a_compressed_tar_is_told_not_skipped(tmp_path: Path, name: str) -> None:
    (tmp_path / "b.mp4").write_bytes(b"x")
    (tmp_path / name).write_bytes(b"\x1f\x8b")
    found = {video.video: video.problem for video in list_corpus(tmp_path)}
    assert found["b.mp4"] is None
    assert "compressed" in str(found[name])


def test_links_in_a_tar_are_told_not_followed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind in (("a.mp4", tarfile.SYMTYPE), ("b.mp4", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "../../etc/passwd"
            archive.addfile(info)
        info = tarfile.TarInfo("c.mp4")
        info.size = 1
        archive.addfile(info, io.BytesIO(b"c"))
    problems = [video.problem for video in list_corpus(tmp_path)]
    assert problems[2] is None
    assert all("link" in str(problem) for problem in problems[:2])


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (("x.json", b"{"), r"a\.tar/x\.json is not JSON"),
        (("x.json", b"[1]"), r"a\.tar/x\.json is not a JSON object"),
        (("x.json", b'{"caption": 5}'), r"caption must be text"),
        (("x.mp4", b"again"), r"a\.tar/x\.mp4 twice"),
    ],
)
def test_a_bad_member_is_an_error_that_names_it(
    tmp_path: Path, member: Member, message: str
) -> None:
    tar(tmp_path / "a.tar", [("x.mp4", b"x"), member])
    with pytest.raises(CorpusError, match=message):
        list_corpus(tmp_path)


def test_members_with_dots_in_their_names_keep_what_stands_beside_them(tmp_path: Path) -> None:
    members = [
        ("a/my.clip.v1.mp4", b"1"), ("a/my.clip.v1.txt", b"one"),
        ("a/my.clip.v2.mp4", b"2"), ("a/my.clip.v2.json", b'{"text": "two", "n": 2}'),
        ("a/my.clip.v3.mp4", b"3"), ("a/my.clip.v3.caption.txt", b"three"),
        ("b.c/x.mp4", b"4"), ("b.c/x.caption", b"four"), ("y.mp4", b"5"), ("y.txt", b"caf\xe9"),
    ]  # fmt: skip
    found = list_corpus(tar(tmp_path / "a.tar", members))
    captions = [video.captions for video in found]
    assert captions == [("one",), ("two",), ("three",), ("four",), ()]
    assert found[1].extra == {"n": 2}
    labels = [video.extra.get("label") for video in list_corpus(tmp_path, label="folder")]
    assert labels == ["a", "a", "a", "b.c", None]


def test_an_option_for_tables_is_refused_for_tars(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="path_column is for tables"):
        list_corpus(tar(tmp_path / "a.tar", sample("a")), path_column="x")

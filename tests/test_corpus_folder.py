"""Folders and patterns: everything that is a video is listed, once, by name, in one order."""

from __future__ import annotations

import errno
import os
import random
import socket
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import fsspec
import pytest

from reducio_latents.corpus import CorpusVideo, corpus_root, list_corpus
from reducio_latents.corpus.entry import is_video_name
from reducio_latents.corpus.trees import MAX_TEXT_BYTES
from reducio_latents.errors import ConfigError, CorpusError, VideoError
from reducio_latents.files import open_files
from reducio_latents.files.source import VideoSource, join_url, open_source
from tests.object_storage import BUCKET, FaultyProxy, s3, s3_server, serving

__all__ = ["s3", "s3_server"]  # fixtures


def fill(root: Path, *names: str) -> Path:
    """Write files whose content is their name."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name, encoding="utf-8")
    return root


def names(videos: list[CorpusVideo]) -> list[str]:
    return [video.video for video in videos]


@pytest.fixture
def memory() -> Iterator[str]:
    """Give an empty folder on fsspec's in-memory file system."""
    fs = fsspec.filesystem("memory")
    fs.rm("/", recursive=True) if fs.ls("/") else None
    yield "memory://corpus"
    fs.rm("/", recursive=True) if fs.ls("/") else None


def test_a_folder_is_searched_through_and_listed_in_order_of_name(tmp_path: Path) -> None:
    fill(tmp_path, "b.mp4", "a/z.MKV", "a/y/x.webm", "a.mp4", "readme.md", "table.csv", "é.mov")
    videos = list_corpus(tmp_path)
    assert names(videos) == ["a.mp4", "a/y/x.webm", "a/z.MKV", "b.mp4", "é.mov"]
    assert names(videos) == sorted(names(videos), key=str.encode)
    for video in videos:
        with open_source(video.source) as file:
            assert file.read().decode() == video.video


def test_endings_of_videos_are_those_of_containers_and_bare_streams() -> None:
    for ending in [
        "264",
        "265",
        "hevc",
        "dv",
        "ivf",
        "obu",
        "m4v",
        "mxf",
        "apng",
        "gif",
        "y4m",
        "MOV",
        "m2ts",
    ]:
        assert is_video_name(f"folder/clip.v2.{ending}"), ending
    assert not any(map(is_video_name, ("a.txt", "a.json", "a.wav", "mp4", "a.mp4.part")))


def test_the_order_does_not_depend_on_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, *(f"{folder}/{name}.mp4" for folder in "abc" for name in range(20)))
    expected = list_corpus(tmp_path)
    scandir = os.scandir
    rng = random.Random(0)

    class Shuffled:
        def __init__(self, path: str) -> None:
            with scandir(path) as entries:
                self.entries = list(entries)
            rng.shuffle(self.entries)

        def __enter__(self) -> list[os.DirEntry[str]]:
            return self.entries

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(os, "scandir", Shuffled)
    assert list_corpus(tmp_path) == expected


def test_hidden_names_are_skipped_but_not_a_hidden_corpus(tmp_path: Path) -> None:
    root = fill(tmp_path / ".cache", "a.mp4", ".b.mp4", "._a.mp4", ".trash/c.mp4")
    assert names(list_corpus(root)) == ["a.mp4"]


def test_symbolic_links_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    fill(tmp_path, "corpus/a/b/one.mp4", "elsewhere/two.mp4")
    corpus = tmp_path / "corpus"
    (corpus / "a" / "b" / "up").symlink_to(corpus, target_is_directory=True)
    (corpus / "a" / "self").symlink_to(corpus / "a", target_is_directory=True)
    (corpus / "far").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (corpus / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    (corpus / "me.mp4").symlink_to("me.mp4")
    videos = list_corpus(corpus)
    assert names(videos) == ["a/b/one.mp4", "far/two.mp4", "gone.mp4", "me.mp4"]
    problems = {video.video: video.problem for video in videos}
    assert problems["gone.mp4"] is None  # it fails when it is probed
    assert "symbolic links" in str(problems["me.mp4"])


def test_a_text_beside_a_video_is_its_caption(tmp_path: Path) -> None:
    fill(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    (tmp_path / "a.txt").write_bytes("\ufeffa cat\tand a \N{CAT FACE}\r\n".encode())
    (tmp_path / "b.txt").write_text("\n")
    captions = [video.captions for video in list_corpus(tmp_path)]
    assert captions == [("a cat\tand a \N{CAT FACE}",), (), ()]


def test_captions_in_another_encoding_cost_themselves_and_are_named_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, "a.mp4", "b.mp4", "c.mp4", "c.txt")
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "b.txt").write_bytes("thé".encode("latin-1"))
    assert [video.captions for video in list_corpus(tmp_path)] == [(), (), ("c.txt",)]
    (line,) = caplog.messages
    assert "2 texts beside videos are left out, not UTF-8:" in line
    assert "a.txt (byte 0xe9 at 3)" in line
    assert "b.txt (byte 0xe9 at 2)" in line


def test_json_beside_a_video_is_read_and_all_that_is_wrong_is_named_at_once(
    tmp_path: Path,
) -> None:
    fill(tmp_path, "0.mp4", "a.mp4", "b.mp4", "b.txt", "c.mp4")
    (tmp_path / "a.json").write_text('{"caption": "a cat", "fps": 24, "tags": ["x"]}')
    (tmp_path / "b.json").write_text('{"title": "b", "caption": "N/A"}')
    _, a, b, _ = list_corpus(tmp_path)
    assert (a.captions, a.extra) == (("a cat",), {"fps": 24, "tags": '["x"]'})
    assert (b.captions, b.extra) == (("b.txt",), {"title": "b", "caption": "N/A"})
    (a,) = list_corpus(tmp_path / "a.mp4", caption_column="tags")
    assert a.captions == ("x",)
    (tmp_path / "0.json").write_text("{")
    (tmp_path / "c.json").write_bytes(b'{"caption": "caf\xe9"}')
    with pytest.raises(CorpusError, match=r"0\.json is not JSON.* 1 more .*c\.json is not UTF-8"):
        list_corpus(tmp_path)


def test_the_folder_of_a_video_is_its_class(tmp_path: Path) -> None:
    fill(tmp_path, "UCF/Archery/v_1.avi", "UCF/Archery/v_1.txt", "UCF/Handstand/v_2.avi", "v_3.avi")
    found = [(v.captions, dict(v.extra)) for v in list_corpus(tmp_path, label="folder")]
    assert found == [
        (("UCF/Archery/v_1.txt",), {"label": "Archery"}),
        (("Handstand",), {"label": "Handstand"}),
        ((), {}),
    ]
    # Its lists have names in other case than its files, and maybe the number of the class.
    names = tmp_path / "trainlist01.txt"
    names.write_text("HandStand/v_2.avi 36\nArchery/v_1.avi\nArchery/v_9.avi 3\n")
    listed = [
        (v.video, v.captions, dict(v.extra))
        for v in list_corpus(names, root=tmp_path / "UCF", label="folder")
    ]
    assert listed == [
        ("Archery/v_1.avi", ("Archery",), {"label": "Archery"}),
        ("Archery/v_9.avi", ("Archery",), {"label": "Archery", "column_2": 3}),
        ("Handstand/v_2.avi", ("Handstand",), {"label": "Handstand", "column_2": 36}),
    ]
    with pytest.raises(ConfigError, match=r"label is 'name'; choose one of none, folder"):
        list_corpus(tmp_path, label="name")


def test_a_folder_that_cannot_be_listed_is_counted_not_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, "open/a.mp4", "shut/b.mp4", "shut/c.mp4")
    deny(monkeypatch, tmp_path / "shut")
    ours, theirs = list_corpus(tmp_path)
    assert ours.video == "open/a.mp4"
    assert theirs.video == "shut/"
    assert theirs.problem == "the folder cannot be listed: Permission denied"


def test_a_corpus_without_permission_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, "a.mp4")
    deny(monkeypatch, tmp_path)
    with pytest.raises(CorpusError, match="cannot be listed: Permission denied"):
        list_corpus(tmp_path)


def deny(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Refuse to list a folder, as to a user who is not root, for whom modes mean something."""
    scandir = os.scandir

    def refuse(path: str) -> object:
        if Path(path) == folder:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)


def test_what_is_no_file_or_has_no_utf8_name_is_listed_with_the_reason(tmp_path: Path) -> None:
    fill(tmp_path, "a.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    with socket.socket(socket.AF_UNIX) as server:  # not a video by its name: not listed
        server.bind(os.path.relpath(tmp_path / "s.sock"))
    raw = os.fsencode(tmp_path)
    Path(os.fsdecode(raw + b"/caf\xe9.mp4")).write_bytes(b"x")
    Path(os.fsdecode(raw + b"/d\xff")).mkdir()
    found = {video.video: video.problem for video in list_corpus(tmp_path)}
    assert found.keys() == {"a.mp4", "pipe.mp4", r"caf\xe9.mp4", r"d\xff/"}
    assert "pipe" in str(found["pipe.mp4"])
    assert "not UTF-8" in str(found[r"caf\xe9.mp4"])
    assert "not UTF-8" in str(found[r"d\xff/"])
    for name in found:
        name.encode()


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.mp4", ["a.mp4", "b.mp4"]),
        ("*", ["a.mp4", "b.mp4", "c.mkv"]),
        ("**", ["a.mp4", "b.mp4", "c.mkv", "x/1/d.mp4", "x/2/e.mp4", "y/1/f.mp4"]),
        ("**/[de].mp4", ["x/1/d.mp4", "x/2/e.mp4"]),
        ("**/?.mkv", ["c.mkv"]),
        ("[!a].mp4", ["b.mp4"]),
        ("{a,c}.*", ["a.mp4", "c.mkv"]),
        ("{x,y}/1/*.mp4", ["x/1/d.mp4", "y/1/f.mp4"]),
        ("x/{1..2}/*", ["1/d.mp4", "2/e.mp4"]),
        ("{x,y}", ["x/1/d.mp4", "x/2/e.mp4", "y/1/f.mp4"]),
        ("{a,lost}.mp4", ["a.mp4", "lost.mp4"]),
        ("{a.mp4,*.mp4}", ["a.mp4", "b.mp4"]),
    ],
)
def test_patterns_match_as_in_a_shell(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    fill(tmp_path, "a.mp4", "b.mp4", "c.mkv", "d.txt", "x/1/d.mp4", "x/2/e.mp4", "y/1/f.mp4")
    assert names(list_corpus(tmp_path / pattern)) == expected


def test_a_name_with_pattern_characters_is_taken_at_its_word_first(tmp_path: Path) -> None:
    fill(tmp_path, "set[1]/a.mp4", "set1/b.mp4")
    assert names(list_corpus(tmp_path / "set[1]")) == ["a.mp4"]


def test_captions_are_found_beside_what_a_pattern_matches(tmp_path: Path) -> None:
    fill(tmp_path, "a.mp4", "a.txt", "x/b.mp4", "x/b.txt")
    assert [v.captions for v in list_corpus(tmp_path / "**/*.mp4")] == [("a.txt",), ("x/b.txt",)]
    assert [v.captions for v in list_corpus(tmp_path / "{a,c}.mp4")] == [("a.txt",), ()]
    assert [v.captions for v in list_corpus(tmp_path / "a.mp4")] == [("a.txt",)]


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ("missing", "there is no such file or folder"),
        ("empty", "holds no video"),
        ("*.webm", "holds no video"),
        ("notes.docx", "neither a folder, a table"),
        ("{3..1}.mp4", "not a usable range"),
        ("[z-a].mp4", "not a glob pattern"),
        ("{1..9999999}.mp4", "not a usable range"),
    ],
)
def test_a_corpus_that_is_none_is_one_clear_error(
    tmp_path: Path, corpus: str, message: str
) -> None:
    fill(tmp_path, "notes.docx", "a.mp4", "empty/readme.md")
    with pytest.raises(CorpusError, match=message):
        list_corpus(tmp_path / corpus)


@pytest.mark.parametrize("option", ["path_column", "root", "caption_column"])
def test_an_option_that_means_nothing_for_a_folder_is_refused(tmp_path: Path, option: str) -> None:
    fill(tmp_path, "a.mp4")
    with pytest.raises(ConfigError, match=option):
        list_corpus(tmp_path, **{option: "x"})


def test_a_moved_corpus_is_the_same_corpus(tmp_path: Path) -> None:
    fill(tmp_path / "here", "a.mp4", "x/b.mp4")
    before = list_corpus(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    after = list_corpus(tmp_path / "there")
    root = corpus_root(tmp_path / "there")
    for old, new in zip(before, after, strict=True):
        assert (old.video, old.address) == (new.video, new.address)
        assert join_url(root, old.address) == new.source.url


def test_a_file_url_is_a_local_path(tmp_path: Path) -> None:
    fill(tmp_path, "a.mp4")
    assert list_corpus(f"file://{tmp_path}") == list_corpus(tmp_path)


def test_a_relative_corpus_has_absolute_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, "videos/a.mp4")
    monkeypatch.chdir(tmp_path)
    assert list_corpus("videos") == list_corpus(tmp_path / "videos")


def test_a_remote_folder_is_listed_like_a_local_one(tmp_path: Path, memory: str) -> None:
    wanted = ["b.mp4", "a/z.mkv", "a/z.txt", ".hidden.mp4", ".d/x.mp4", "notes.md"]
    fill(tmp_path, *wanted)
    for name in wanted:
        fsspec.filesystem("memory").pipe(f"/corpus/{name}", name.encode())
    ours, theirs = list_corpus(memory), list_corpus(tmp_path)
    assert [(v.video, v.captions, v.address) for v in ours] == [
        (v.video, v.captions, v.address) for v in theirs
    ]
    assert names(list_corpus(f"{memory}/*.mp4")) == ["b.mp4"]
    assert names(list_corpus(f"{memory}/**/*.m{{p4,kv}}")) == ["a/z.mkv", "b.mp4"]
    with open_source(ours[0].source) as file:
        assert file.read() == b"a/z.mkv"


def test_of_remote_json_beside_a_video_no_more_is_read_than_it_may_have(
    memory: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    system = fsspec.filesystem("memory")
    for name, data in {"a.mp4": b"1", "a.json": b" " * (3 << 20), "b.json": b"{}"}.items():
        system.pipe(f"/corpus/{name}", data)
    read: list[int] = []
    cat_file = type(system).cat_file

    def spied(*args: object, **more: object) -> bytes:
        data: bytes = cat_file(*args, **more)
        read.append(len(data))
        return data

    monkeypatch.setattr(type(system), "cat_file", spied)
    assert [video.captions for video in list_corpus(memory)] == [()]
    assert "larger than 1 MiB" in caplog.text
    assert max(read) == MAX_TEXT_BYTES + 1


def test_a_remote_corpus_that_cannot_be_had_is_one_clear_error(memory: str) -> None:
    with pytest.raises(CorpusError, match="there is no such file or folder"):
        list_corpus(memory)
    with pytest.raises(CorpusError, match="cannot be read: Protocol not known"):
        list_corpus("nosuchscheme://bucket/videos")


def test_a_corpus_in_a_bucket_needs_what_a_store_in_a_bucket_needs(
    tmp_path: Path, s3: FaultyProxy
) -> None:
    files = open_files(f"s3://{BUCKET}/corpus")
    for name in ("a.mp4", "b/c.mp4"):
        files.write(name, name.encode())
    files.write("list.csv", b"path,caption\na.mp4,first\n")
    s3.fail(["503", "reset"])
    videos = list_corpus(f"s3://{BUCKET}/corpus")
    assert names(videos) == ["a.mp4", "b/c.mp4"]
    for video in videos:
        with open_source(video.source) as file:
            assert file.read().decode() == video.video
            file.seek(2)
            assert file.read(2).decode() == video.video[2:4]
    assert names(list_corpus(f"s3://{BUCKET}/corpus/list.csv")) == ["a.mp4"]
    with pytest.raises(VideoError, match="there is no such file"):
        open_source(VideoSource(f"s3://{BUCKET}/corpus/gone.mp4"))
    with pytest.raises(CorpusError, match="there is no such bucket") as raised:
        list_corpus("s3://absent/corpus")
    assert "\n" not in str(raised.value)


def test_ten_thousand_small_files_are_listed_in_a_second_of_cpu(tmp_path: Path) -> None:
    for folder in range(20):
        (tmp_path / f"{folder:02d}").mkdir()
        for name in range(500):
            os.close(os.open(tmp_path / f"{folder:02d}/{name}.mp4", os.O_CREAT))
    start = time.process_time()
    assert len(list_corpus(tmp_path)) == 10_000
    assert time.process_time() - start < 1.0


def test_listing_looks_at_folders_and_not_at_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, *(f"{folder}/{name}.mp4" for folder in "ab" for name in range(50)))
    looked_at = []
    stat = Path.stat

    def count(self: Path, **options: bool) -> os.stat_result:
        looked_at.append(self)
        return stat(self, **options)

    monkeypatch.setattr(Path, "stat", count)
    assert len(list_corpus(tmp_path)) == 100
    assert len(looked_at) < 10


def test_a_name_that_no_file_can_have_is_one_clear_error(tmp_path: Path) -> None:
    for function in (list_corpus, corpus_root):
        with pytest.raises(CorpusError, match="cannot be listed: File name too long"):
            function(tmp_path / ("x" * 300))


def test_whatever_ffmpeg_reads_by_its_ending_is_a_video(tmp_path: Path) -> None:
    known = (
        "264 265 266 h264 h265 hevc vvc av1 obu ivf dv m1v m2v m4v mpg vob ts m2ts mts mxf gxf avi "
        "mkv webm mp4 mov 3gp flv f4v wmv asf ogv rm y4m mjpeg vc1 nut gif"
    )
    endings = known.split()
    listed = list_corpus(fill(tmp_path, *(f"a.{ending}" for ending in endings), "a.txt"))
    assert len(listed) == len(endings)


def test_a_table_of_a_web_server_that_gives_no_parts_is_one_line(tmp_path: Path) -> None:
    row = '{"video": "a.mp4", "caption": "%s"}\n' % ("x" * 1000)
    (tmp_path / "t.jsonl").write_text(row * 3000)

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *_: object) -> None:
            return

    with serving(Handler) as place, pytest.raises(CorpusError, match="no parts of files") as error:
        list_corpus(f"http://{place}/t.jsonl")
    assert "t.jsonl cannot be listed" in str(error.value)

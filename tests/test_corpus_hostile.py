"""What lies in a corpus and is no video, and what names hold: refused at once, never obeyed."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import socket
import stat
import tarfile
from pathlib import Path
from unittest.mock import Mock

import pytest

from reducio_latents.core.text import without_secrets
from reducio_latents.corpus import CorpusVideo, list_corpus, trees
from reducio_latents.corpus.trees import MAX_TEXT_BYTES
from reducio_latents.encode.engines.orders import Order
from reducio_latents.errors import ConfigError, CorpusError, VideoError
from reducio_latents.files import open_files
from reducio_latents.files.source import VideoSource, open_source, public_url

SIGNED = "https://cdn.org/a%20b.mp4?v=7&X-Amz-Signature=f00d&X-Amz-Credential=me"
SECRETS = ("f00d", "pw", "hush")


def make(path: Path, kind: str) -> Path:
    """Make what is no file, or a link to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    elif kind == "pipe behind a link":
        os.mkfifo(path.with_name("there"))
        path.symlink_to("there")
    else:
        path.symlink_to(kind)
        assert stat.S_ISCHR(path.stat().st_mode)
    return path


STRANGE = ["pipe", "socket", "pipe behind a link", "/dev/zero", "/dev/urandom", "/dev/null"]


def entry(listing: list[CorpusVideo], name: str) -> CorpusVideo:
    return next(video for video in listing if video.video == name)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "good.mp4").write_bytes(b"a video, for all that a listing knows")
    return folder


@pytest.mark.parametrize("kind", STRANGE)
def test_what_is_no_file_is_listed_with_its_problem_and_never_opened(
    corpus: Path, kind: str
) -> None:
    for name in ("x.mp4", "y.tar"):
        path = make(corpus / name, kind)
        found = entry(list_corpus(corpus), name)
        assert found.problem is not None
        assert found.problem.endswith(", not a file")
        with pytest.raises(VideoError, match=r"it is a \w+, not a file\.$"):
            open_source(found.source)
        path.unlink()
        (corpus / "there").unlink(missing_ok=True)


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("named", ["folder", "one by one"])
def test_a_caption_that_is_no_file_costs_that_caption(
    corpus: Path, kind: str, named: str, caplog: pytest.LogCaptureFixture
) -> None:
    make(corpus / "good.txt", kind)
    (corpus / "other.mp4").write_bytes(b"1")
    (corpus / "other.txt").write_text("a cat")
    listing = list_corpus(corpus if named == "folder" else corpus / "{good,other}.mp4")
    assert [(v.video, v.captions) for v in listing] == [("good.mp4", ()), ("other.mp4", ("a cat",))]
    if named == "folder":
        assert "1 texts beside videos are left out" in caplog.text
        assert "good.txt" in caplog.text


@pytest.mark.parametrize("why", ["No such file", "Permission denied"])
def test_a_caption_that_may_not_be_read_costs_that_caption(
    corpus: Path, why: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why == "No such file":
        (corpus / "good.txt").symlink_to("gone")
    else:  # root may read everything
        refusal = PermissionError(errno.EACCES, why)
        (corpus / "good.txt").write_text("a dog")
        monkeypatch.setattr(trees, "open_regular", Mock(side_effect=refusal))
    assert [(v.video, v.captions) for v in list_corpus(corpus)] == [("good.mp4", ())]
    assert "1 texts beside videos are left out" in caplog.text
    assert f"it cannot be read: {why}" in caplog.text


def test_a_caption_of_a_gigabyte_is_not_read(
    corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (corpus / "good.txt").open("wb") as file:
        file.truncate(1 << 30)
    (corpus / "edge.mp4").write_bytes(b"1")
    (corpus / "edge.txt").write_text("x" * MAX_TEXT_BYTES)
    listing = list_corpus(corpus)
    assert entry(listing, "good.mp4").captions == ()
    assert len(entry(listing, "edge.mp4").captions[0]) == MAX_TEXT_BYTES
    assert "1 texts beside videos are left out" in caplog.text
    assert "larger than 1 MiB" in caplog.text


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl", "x.parquet", "x.tar", "x.mp4"])
@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "socket"])
def test_a_corpus_that_is_no_file_is_refused_at_once(corpus: Path, name: str, kind: str) -> None:
    with pytest.raises(CorpusError, match=r"it is a (pipe|device|socket), not a file") as caught:
        list_corpus(make(corpus / name, kind))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("address", ["file:///dev/zero", "/dev/zero", "file:///proc/self/fd"])
def test_a_table_that_names_a_device_costs_that_video(corpus: Path, address: str) -> None:
    table = corpus / "videos.csv"
    table.write_text(f"path\n{address}\ngood.mp4\n")
    for video in list_corpus(table):
        if video.video == address:
            with pytest.raises(VideoError, match=r"it is a (device|folder), not a file"):
                open_source(video.source)
        else:
            open_source(video.source).close()


def test_links_in_circles_end(corpus: Path) -> None:
    for name in ("a", "b"):
        (corpus / name).mkdir()
        (corpus / name / "v.mp4").write_bytes(b"1")
    (corpus / "a" / "up").symlink_to("..")
    (corpus / "a" / "over").symlink_to("../b")
    (corpus / "b" / "over").symlink_to("../a")
    (corpus / "self.mp4").symlink_to("self.mp4")
    listing = list_corpus(corpus)
    assert len(listing) < 20
    assert "cannot be followed" in str(entry(listing, "self.mp4").problem)


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_keys_with_dots_keep_their_captions(corpus: Path) -> None:
    tar = write_tar(
        corpus / "t.tar",
        {
            "my.clip.v2.mp4": b"2",
            "my.clip.v2.txt": b"of v2",
            "my.clip.v2.json": b'{"score": 2}',
            "my.clip.v3.mp4": b"3",
            "my.clip.v3.TXT": b"of v3",
            "d.x/plain.mp4": b"4",
            "d.x/plain.txt": b"of plain",
            "two.left.mp4": b"5",
            "two.txt": b"of both",
            "my.clip.v9.txt": b"\xff of no video",
            "my.notes.json": b"[" * 1000,
        },
    )
    found = {v.video.removeprefix("t.tar/"): (v.captions, dict(v.extra)) for v in list_corpus(tar)}
    assert found == {
        "my.clip.v2.mp4": (("of v2",), {"score": 2}),
        "my.clip.v3.mp4": (("of v3",), {}),
        "d.x/plain.mp4": (("of plain",), {}),
        "two.left.mp4": (("of both",), {}),
    }


def test_side_files_in_a_tar_are_bounded(corpus: Path, caplog: pytest.LogCaptureFixture) -> None:
    tar = write_tar(
        corpus / "t.tar",
        {"a.mp4": b"1", "a.txt": b"x" * (MAX_TEXT_BYTES + 1), "b.mp4": b"2", "b.txt": b"fine"},
    )
    assert [v.captions for v in list_corpus(tar)] == [(), ("fine",)]
    assert "1 texts beside videos are left out" in caplog.text
    deep = write_tar(corpus / "d.tar", {"a.mp4": b"1", "a.json": b'{"x":' + b"[" * 200_000})
    with pytest.raises(CorpusError, match="is not JSON: it nests deeper"):
        list_corpus(deep)


def test_a_member_of_negative_size_ends_the_tar(corpus: Path) -> None:
    tar = write_tar(corpus / "t.tar", {"a.mp4": b"1" * 600, "b.mp4": b"2" * 600})
    data = bytearray(tar.read_bytes())
    header = data[1536:2048]
    assert header.startswith(b"b.mp4")
    header[124:136] = b"\xff" * 12  # -1 in base 256
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[1536:2048] = header
    tar.write_bytes(data)
    with pytest.raises(CorpusError, match=r"damaged: 'b\.mp4' has a negative size"):
        list_corpus(tar)


@pytest.mark.parametrize(
    ("url", "public"),
    [
        (SIGNED, "https://cdn.org/a%20b.mp4?v=7"),
        ("https://me:pw@host:8080/v.mp4", "https://host:8080/v.mp4"),
        ("ftp://me:p@w@host/v.mp4", "ftp://host/v.mp4"),
        ("https://a.blob.core.windows.net/c/x.mp4?sv=1&se=2&sp=r&sig=f00d", None),
        ("https://storage.googleapis.com/b/x?X-Goog-Signature=f00d&X-Goog-Date=1", None),
        ("https://host/x?access%5Ftoken=hush&author=7", "https://host/x?author=7"),
        ("https://host/watch?v=1&list=2", "https://host/watch?v=1&list=2"),
        ("s3://bucket/a?b.mp4", "s3://bucket/a?b.mp4"),
        ("/home/me:pw@x/v.mp4?sig=1", "/home/me:pw@x/v.mp4?sig=1"),
    ],
)
def test_a_public_url_has_no_password_and_no_signature(url: str, public: str | None) -> None:
    assert public_url(url) == (public or url.partition("?")[0])
    assert public_url(public_url(url)) == public_url(url)


def test_what_is_stored_of_signed_urls_is_what_they_name(corpus: Path) -> None:
    table = corpus / "videos.csv"
    table.write_text(f"path,caption\n{SIGNED},a cat\nhttps://me:pw@host/b.mp4,a dog\n")
    listing = list_corpus(table)
    assert [video.source.url for video in listing] == [SIGNED, "https://me:pw@host/b.mp4"]
    for video in listing:
        stored = f"{video.video} {video.address} {video.source}"
        assert not any(secret in stored for secret in SECRETS)
    again = table.with_name("again.csv")
    again.write_text(table.read_text().replace("f00d", "beef"))
    assert [v.video for v in list_corpus(again)] == [v.video for v in listing]


def test_an_order_to_the_other_ranks_holds_no_secret() -> None:
    moved = {"a": VideoSource(SIGNED), "b": None}
    order = Order.of("https://me:pw@host/videos", {}, moved)
    assert order.signed
    assert not any(secret in str(order) for secret in SECRETS)
    assert not Order.of("/videos", {}, {"a": VideoSource("/elsewhere/a")}).signed


@pytest.mark.parametrize(
    "url",
    ["https://me:pw@nowhere.invalid/x.mp4?sig=f00d", "weird://me:pw@h/x", "weird://me:x/pw@h/x"],
)
def test_errors_about_urls_hold_no_secret(url: str) -> None:
    said = []
    for attempt in (lambda: open_source(VideoSource(url)), lambda: list_corpus(url)):
        with pytest.raises((ConfigError, CorpusError, VideoError)) as caught:
            attempt()
        said.append(str(caught.value))
    assert not any(secret in text or "\n" in text for text in said for secret in SECRETS), said


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at s3://AKIA:f00d/f00d@bucket/x: no", "at s3://bucket/x: no"),
        ("at https://me:f00d@f00d@host/x", "at https://host/x"),
        ("url: /x?X-Amz-Signature=f00d&v=1 (reset)", "url: /x?X-Amz-Signature=...&v=1 (reset)"),
        ("url='/x?token=f00d'", "url='/x?token=...'"),
        ("https://h/x#access_token=f00d", "https://h/x#access_token=..."),
        ("Authorization: Bearer f00df00d", "Authorization: Bearer ..."),
        ("hf_" + "f00d" * 8 + " is no token", "... is no token"),
        ("hf://datasets/o/n@rev/x", "hf://datasets/o/n@rev/x"),
        ("https://host:80/@me/x", "https://host:80/@me/x"),
        ("text_max_tokens=5", "text_max_tokens=5"),
    ],
)
def test_secrets_are_left_out_wherever_they_stand(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


@pytest.mark.parametrize("url", ["s3://AKIA:f0/0d@bucket/x", "https://h/x#token=f0/0d"])
def test_a_store_is_not_opened_by_a_url_with_secrets(url: str) -> None:
    with pytest.raises(ConfigError, match="credentials in it") as caught:
        open_files(url)
    assert "0d" not in str(caught.value)


def test_names_with_escapes_are_written_out_in_errors(tmp_path: Path) -> None:
    folder = tmp_path / "\x1b]0;owned\x07"
    folder.mkdir()
    table = folder / "x.csv"
    table.write_text("path,n\na\x1b[2J,1\na\x1b[2J,2\n")
    for corpus in (folder, folder / "nothing", table):
        with pytest.raises(CorpusError) as caught:
            list_corpus(corpus)
        assert "\x1b" not in str(caught.value)
        assert "\\x1b" in str(caught.value)
    (folder / "x.jsonl").write_text(json.dumps({"path": "x"})[:-1])
    with pytest.raises(CorpusError) as caught:
        list_corpus(folder / "x.jsonl")
    assert "\x1b" not in str(caught.value)


@pytest.fixture(autouse=True)
def _no_log_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)

"""Videos in WebDataset tars, as video2dataset writes them: x.mp4, x.txt, x.json side by side.

Only headers and the small members are read; a video stays in its tar and is addressed by offset.
"""

from __future__ import annotations

import posixpath
import tarfile
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from reducio_latents.core.parsing import parse_json
from reducio_latents.corpus.entry import (
    CAPTION_NAMES,
    CorpusVideo,
    as_captions,
    as_extra,
    is_utf8,
    is_video_name,
    match_name,
    storable,
)
from reducio_latents.corpus.texts import not_utf8, warn_of_lost_captions
from reducio_latents.corpus.trees import MAX_TEXT_BYTES, TOO_LARGE, Tree
from reducio_latents.errors import CorpusError
from reducio_latents.files.source import VideoSource, join_url, public_url

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def is_tar_name(name: str) -> bool:
    return name.lower().endswith((".tar", *COMPRESSED))


@dataclass(slots=True)
class _Sample:
    """The members of one key: what WebDataset would hand out together."""

    videos: list[tuple[str, tarfile.TarInfo]] = field(default_factory=list)
    """Each with the middle of its name, between key and ending: `clip.v2` of my.clip.v2.mp4."""
    texts: dict[tuple[str, str], tuple[str, bytes]] = field(default_factory=dict)
    """(middle, `txt` or `json`) -> name and contents."""
    problem: str | None = None

    def text(self, middle: str, ending: str) -> tuple[str, bytes] | None:
        """Return the text beside a video, or else the one of the whole sample."""
        return self.texts.get((middle, ending)) or self.texts.get(("", ending))


def list_tar(tree: Tree, name: str, caption_key: str | None) -> list[CorpusVideo]:
    """Return the videos in one tar, and an entry with the problem if the tar is damaged.

    The caption is the .txt member, else the JSON member's `caption_key` (or one of
    CAPTION_NAMES); the rest of the JSON is `extra`. Raise CorpusError for texts that are not UTF-8
    and JSON that cannot be read.
    """
    url = join_url(tree.root, name)
    if name.lower().endswith(COMPRESSED):
        why = "a compressed tar cannot be read from the middle. Unpack the compression"
        return [CorpusVideo(storable(name), VideoSource(url), problem=why)]
    samples: dict[str, _Sample] = {}
    large: list[str] = []
    try:
        with tree.open(name) as file:
            problem = _read_members(file, samples, large)
    except FileNotFoundError:
        problem = "there is no such file"
    except CorpusError:
        raise
    except (OSError, tarfile.TarError) as err:
        problem = f"it cannot be read as a tar: {getattr(err, 'strerror', None) or err}"
    warn_of_lost_captions(url, large, TOO_LARGE)
    videos = [
        _entry(name, url, middle, member, sample, caption_key)
        for sample in samples.values()
        for middle, member in sample.videos
    ]
    if problem is not None:
        videos.append(CorpusVideo(storable(name), VideoSource(url), problem=problem))
    return videos


def _read_members(file: BinaryIO, samples: dict[str, _Sample], large: list[str]) -> str | None:
    """Sort the members into samples; return what is wrong with the tar, if anything is.

    Samples before a damage are whole and are kept; of the last one, members may be missing.
    """
    problem = None
    with tarfile.open(fileobj=file, mode="r:") as tar:
        try:
            for member in tar:
                if member.size < 0:  # tarfile would go backwards, and round and round
                    raise tarfile.ReadError(f"{member.name!r} has a negative size")
                _sort_in(tar, member, samples, large)
            # tarfile takes a header that it cannot read for the end of the archive.
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                problem = f"the tar is damaged: no header at byte {tar.offset}"
        except tarfile.ReadError as err:
            problem = f"the tar is damaged: {err}"
    if problem is not None and samples:
        samples[next(reversed(samples))].problem = problem
    return problem


def _sort_in(
    tar: tarfile.TarFile, member: tarfile.TarInfo, samples: dict[str, _Sample], large: list[str]
) -> None:
    from webdataset.tariterators import base_plus_ext

    key, extension = base_plus_ext(posixpath.normpath(member.name))
    if member.isdir() or key is None:  # hidden files, such as the ._x that macOS adds
        return
    middle, _, ending = extension.lower().rpartition(".")
    if is_video_name(member.name):
        samples.setdefault(key, _Sample()).videos.append((middle, member))
    elif member.isreg() and ending in ("txt", "json"):
        if member.size > MAX_TEXT_BYTES:
            large.append(storable(member.name))
            return
        stream = tar.extractfile(member)
        data = stream.read() if stream is not None else b""
        if len(data) < member.size:
            raise tarfile.ReadError("unexpected end of data")
        texts = samples.setdefault(key, _Sample()).texts
        texts[middle, ending] = (storable(member.name), data)


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        raise not_utf8(where, err) from err


def _read_json(text: str, where: str) -> dict[str, Any]:
    try:
        values = parse_json(text)
    except ValueError as err:
        raise CorpusError(f"{where} is not JSON: {err}. Correct or remove it.") from err
    if not isinstance(values, dict):
        raise CorpusError(f"{where} is not a JSON object. Correct or remove it.")
    return values


def _entry(
    name: str,
    url: str,
    middle: str,
    member: tarfile.TarInfo,
    sample: _Sample,
    caption_key: str | None,
) -> CorpusVideo:
    path = f"{name}/{posixpath.normpath(member.name)}"
    source = VideoSource(url, member.offset_data, member.size)
    where = f"{public_url(url)}/{storable(member.name)}"
    captions: tuple[str, ...] = ()
    values: dict[str, Any] = {}
    if beside := sample.text(middle, "json"):
        at = f"{public_url(url)}/{beside[0]}"
        values = _read_json(_decoded(beside[1], at), at)
    if beside := sample.text(middle, "txt"):
        caption = _decoded(beside[1], f"{public_url(url)}/{beside[0]}").strip()
        captions = (caption,) if caption else ()
    key = caption_key or match_name(CAPTION_NAMES, list(values))
    if key in values and (not captions or (values[key],) == captions):
        captions = captions or as_captions(values[key], where=where)
        del values[key]
    problem = sample.problem
    if not is_utf8(path):
        problem = "its name is not UTF-8. Rename it"
    elif not member.isreg() or member.issparse():
        problem = "it is a link or a sparse file in its tar. Store it as a plain file"
    return CorpusVideo(storable(path), source, captions, as_extra(values, where=where), problem)

"""Videos in WebDataset tars, as video2dataset writes them: x.mp4, x.txt, x.json side by side.

Only headers and the small members are read; a video stays in its tar and is addressed by offset.
"""

from __future__ import annotations

import json
import posixpath
import tarfile
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from reducio_latents.corpus.entry import (
    CAPTION_NAMES,
    CorpusVideo,
    as_captions,
    as_extra,
    is_utf8,
    is_video_name,
    match_name,
    printable,
)
from reducio_latents.corpus.texts import not_utf8
from reducio_latents.corpus.trees import Tree
from reducio_latents.errors import CorpusError
from reducio_latents.files.source import VideoSource, join_url

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
MAX_TEXT_BYTES = 1 << 26
"""Larger .txt and .json members are refused: they are no caption, whatever they are."""


def is_tar_name(name: str) -> bool:
    return name.lower().endswith((".tar", *COMPRESSED))


@dataclass(slots=True)
class _Sample:
    """The members of one key: what WebDataset would hand out together."""

    videos: list[tarfile.TarInfo] = field(default_factory=list)
    caption: str | None = None
    values: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


def list_tar(tree: Tree, name: str, caption_key: str | None) -> list[CorpusVideo]:
    """Return the videos in one tar, and an entry with the problem if the tar is damaged.

    The caption is the .txt member, else the JSON member's `caption_key` (or one of
    CAPTION_NAMES); the rest of the JSON is `extra`. Raise CorpusError for texts that are not UTF-8
    and JSON that is none.
    """
    url = join_url(tree.root, name)
    if name.lower().endswith(COMPRESSED):
        why = "a compressed tar cannot be read from the middle. Unpack the compression"
        return [CorpusVideo(printable(name), VideoSource(url), problem=why)]
    samples: dict[str, _Sample] = {}
    try:
        with tree.open(name) as file:
            problem = _read_members(file, url, samples)
    except FileNotFoundError:
        problem = "there is no such file"
    except CorpusError:
        raise
    except (OSError, tarfile.TarError) as err:
        problem = f"it cannot be read as a tar: {getattr(err, 'strerror', None) or err}"
    videos = [
        _entry(name, url, member, sample, caption_key)
        for sample in samples.values()
        for member in sample.videos
    ]
    if problem is not None:
        videos.append(CorpusVideo(printable(name), VideoSource(url), problem=problem))
    return videos


def _read_members(file: BinaryIO, url: str, samples: dict[str, _Sample]) -> str | None:
    """Sort the members into samples; return what is wrong with the tar, if anything is.

    Samples before a damage are whole and are kept; of the last one, members may be missing.
    """
    problem = None
    with tarfile.open(fileobj=file, mode="r:") as tar:
        try:
            for member in tar:
                _sort_in(tar, member, url, samples)
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
    tar: tarfile.TarFile, member: tarfile.TarInfo, url: str, samples: dict[str, _Sample]
) -> None:
    folder, base = posixpath.split(posixpath.normpath(member.name))
    stem, _, ending = base.partition(".")  # as WebDataset does: the key ends at the first dot
    if member.isdir() or not stem:  # hidden files, such as the ._x that macOS adds
        return
    key, ending = posixpath.join(folder, stem), ending.lower()
    if is_video_name(base):
        samples.setdefault(key, _Sample()).videos.append(member)
    elif member.isreg() and ending in ("txt", "json"):
        sample = samples.setdefault(key, _Sample())
        text = _read_text(tar, member, f"{url}/{printable(member.name)}")
        if ending == "txt":
            sample.caption = text.strip()
        else:
            sample.values = _read_json(text, f"{url}/{printable(member.name)}")


def _read_text(tar: tarfile.TarFile, member: tarfile.TarInfo, where: str) -> str:
    if member.size > MAX_TEXT_BYTES:
        raise CorpusError(f"{where} has {member.size:,} bytes, too many for a text. Remove it.")
    stream = tar.extractfile(member)
    data = stream.read() if stream is not None else b""
    if len(data) < member.size:
        raise tarfile.ReadError("unexpected end of data")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        raise not_utf8(where, err) from err


def _read_json(text: str, where: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise CorpusError(f"{where} is not JSON: {err}. Correct or remove it.") from err
    if not isinstance(values, dict):
        raise CorpusError(f"{where} is not a JSON object. Correct or remove it.")
    return values


def _entry(
    name: str, url: str, member: tarfile.TarInfo, sample: _Sample, caption_key: str | None
) -> CorpusVideo:
    path = f"{name}/{posixpath.normpath(member.name)}"
    source = VideoSource(url, member.offset_data, member.size)
    where = f"{url}/{printable(member.name)}"
    values = dict(sample.values)
    key = caption_key or match_name(CAPTION_NAMES, list(values))
    captions: tuple[str, ...] = (sample.caption,) if sample.caption else ()
    if key in values and (not captions or values[key] == sample.caption):
        captions = captions or as_captions(values[key], where=where)
        del values[key]
    problem = sample.problem
    if not is_utf8(path):
        problem = "its name is not UTF-8. Rename it"
    elif not member.isreg() or member.issparse():
        problem = "it is a link or a sparse file in its tar. Store it as a plain file"
    return CorpusVideo(printable(path), source, captions, as_extra(values, where=where), problem)

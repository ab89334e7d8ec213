"""Videos in WebDataset tars, as video2dataset writes them: x.mp4, x.txt, x.json side by side.

Only headers and the small members are read; a video stays in its tar and is addressed by offset.
"""

from __future__ import annotations

import posixpath
import tarfile
from dataclasses import dataclass, field
from typing import BinaryIO

from reducio_latents.corpus.entry import (
    CAPTION_NAMES,
    CorpusVideo,
    is_utf8,
    is_video_name,
    storable,
)
from reducio_latents.corpus.texts import SIDE_FILES, SideFiles
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
    """(middle, `.txt` or `.json`) -> name and contents."""
    problem: str | None = None

    def text(self, middle: str, ending: str, url: str) -> tuple[str, bytes] | None:
        """Return the text beside a video, or else the one of the whole sample, with its address."""
        found = self.texts.get((middle, ending)) or self.texts.get(("", ending))
        return found and (f"{public_url(url)}/{found[0]}", found[1])


def list_tar(tree: Tree, name: str, side: SideFiles) -> list[CorpusVideo]:
    """Return the videos in one tar, and an entry with the problem if the tar is damaged.

    What stands beside them is read by `side`, which keeps what was wrong with it.
    """
    url = join_url(tree.root, name)
    if name.lower().endswith(COMPRESSED):
        why = "a compressed tar cannot be read from the middle. Unpack the compression"
        return [CorpusVideo(storable(name), VideoSource(url), problem=why)]
    samples: dict[str, _Sample] = {}
    try:
        with tree.open(name) as file:
            problem = _read_members(file, samples, url, side)
    except FileNotFoundError:
        problem = "there is no such file"
    except CorpusError:
        raise
    except (OSError, tarfile.TarError) as err:
        problem = f"it cannot be read as a tar: {getattr(err, 'strerror', None) or err}"
    videos = [
        _entry(name, url, middle, member, sample, side)
        for sample in samples.values()
        for middle, member in sample.videos
    ]
    if problem is not None:
        videos.append(CorpusVideo(storable(name), VideoSource(url), problem=problem))
    return videos


def _read_members(
    file: BinaryIO, samples: dict[str, _Sample], url: str, side: SideFiles
) -> str | None:
    """Sort the members into samples; return what is wrong with the tar, if anything is.

    Samples before a damage are whole and are kept; of the last one, members may be missing.
    """
    problem = None
    with tarfile.open(fileobj=file, mode="r:") as tar:
        try:
            for member in tar:
                if member.size < 0:  # tarfile would go backwards, and round and round
                    raise tarfile.ReadError(f"{member.name!r} has a negative size")
                _sort_in(tar, member, samples, url, side)
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
    tar: tarfile.TarFile,
    member: tarfile.TarInfo,
    samples: dict[str, _Sample],
    url: str,
    side: SideFiles,
) -> None:
    from webdataset.tariterators import base_plus_ext

    key, extension = base_plus_ext(posixpath.normpath(member.name))
    if member.isdir() or key is None:  # hidden files, such as the ._x that macOS adds
        return
    middle, _, ending = extension.lower().rpartition(".")
    if ending == "txt":  # x.caption and x.caption.txt are texts too
        before, _, last = middle.rpartition(".")
        middle = before if last in CAPTION_NAMES else middle
    ending = ".txt" if ending in CAPTION_NAMES else f".{ending}"
    if is_video_name(member.name):
        samples.setdefault(key, _Sample()).videos.append((middle, member))
    elif member.isreg() and ending in SIDE_FILES:
        if member.size > MAX_TEXT_BYTES:
            side.leave_out(f"{public_url(url)}/{storable(member.name)}", TOO_LARGE)
            return
        stream = tar.extractfile(member)
        data = stream.read() if stream is not None else b""
        if len(data) < member.size:
            raise tarfile.ReadError("unexpected end of data")
        texts = samples.setdefault(key, _Sample()).texts
        texts[middle, ending] = (storable(member.name), data)


def _entry(
    name: str, url: str, middle: str, member: tarfile.TarInfo, sample: _Sample, side: SideFiles
) -> CorpusVideo:
    path = f"{name}/{posixpath.normpath(member.name)}"
    source = VideoSource(url, member.offset_data, member.size)
    said = side.read(*(sample.text(middle, ending, url) for ending in SIDE_FILES))
    problem = sample.problem
    if not is_utf8(path):
        problem = "its name is not UTF-8. Rename it"
    elif not member.isreg() or member.issparse():
        problem = "it is a link or a sparse file in its tar. Store it as a plain file"
    return CorpusVideo(storable(path), source, said.captions, said.extra, problem, said.spans)

"""One video of a corpus, and how what came with it is read: names, texts, values."""

from __future__ import annotations

import json
import math
import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reducio_latents.core.clips import TimeSpan
from reducio_latents.core.config import Scalar
from reducio_latents.errors import CorpusError
from reducio_latents.files.source import VideoSource, public_url
from reducio_latents.video import is_still_name

# fmt: off
VIDEO_EXTENSIONS = frozenset({
    ".264", ".265", ".266", ".3g2", ".3gp", ".3gpp", ".apng", ".asf", ".av1", ".avc", ".avi",
    ".dif", ".divx", ".dv", ".f4v", ".flv", ".gif", ".gxf", ".h263", ".h264", ".h265", ".h266",
    ".hevc", ".ivf", ".m1v", ".m2t", ".m2ts", ".m2v", ".m4v", ".mj2", ".mjpeg", ".mjpg", ".mk3d",
    ".mkv", ".mod", ".mov", ".mp4", ".mpe", ".mpeg", ".mpg", ".mpv", ".mts", ".mxf", ".nut", ".obu",
    ".ogm", ".ogv", ".qt", ".rm", ".rmvb", ".swf", ".tod", ".tp", ".trp", ".ts", ".vc1", ".vob",
    ".vvc", ".webm", ".wm", ".wmv", ".wtv", ".y4m", ".yuv",
})
# fmt: on
"""What makes a file in a folder or a tar a video. A table may name anything."""

CAPTION_NAMES = (
    *("caption", "captions", "cap", "text", "prompt", "description", "txt"),
    *("sentence", "sentences", "encap", "densecaption", "longcaption", "shortcaption"),
)
"""Names of a column or JSON key that holds captions, the likeliest first; case does not matter."""
NO_CAPTION = {"", "nan", "n/a", "#n/a", "<na>", "null", "none"}
"""What tables write where there is no caption; case does not matter."""
MAX_CAPTION = 1 << 20
"""Characters. A larger text is no caption, whatever it is; nor are as many in one cell."""
LOST = "larger than 1 MiB or not UTF-8"


# fmt: off
PATH_NAMES = (
    "path", "video", "videopath", "videofile", "file", "filepath", "filename", "location",
    "mediapath", "contentloc", "sourcevideo", "videos", "media", "cliplocation", "clippath",
)
URL_NAMES = ("url", "videourl", "uri", "contenturl", "videouri")
ID_NAMES = ("videoid", "youtubeid", "ytid", "videouid", "vid", "videoname", "clipid")
IMAGE_NAMES = ("image", "imagepath", "imagefile", "img")
# fmt: on
"""Names of a column that holds paths, addresses or the names of files without their endings, the
likeliest first; case, spaces and marks do not matter."""
REVERSED = "a span ends before it begins"
BEYOND = "a span begins after the video's end"


@dataclass(frozen=True, slots=True)
class CorpusSpan:
    """A part of a video, and what the corpus says of it and of no other part."""

    start: float = 0.0
    end: float | None = None
    """None: the video's end."""
    captions: tuple[str, ...] = ()
    extra: Mapping[str, Scalar] = field(default_factory=dict)
    in_frames: bool = False
    """Whether start and end are counted in frames of the video's own rate, else in seconds."""
    from_s: float = 0.0
    """What they are counted from, in seconds: for windows of a clip, its start."""
    problem: str | None = None
    """Why it is of no use, if that is known: the same words for all that have the same problem."""

    def within(self, duration_s: float, rate_fps: float) -> TimeSpan | str:
        """Return the part of a video of this length and rate, or why it has none."""
        if self.problem is not None:
            return self.problem
        step = 1 / rate_fps if self.in_frames and rate_fps > 0 else 1.0
        start_s = self.from_s + self.start * step
        end_s = duration_s if self.end is None else self.from_s + self.end * step
        if self.end is not None and end_s <= start_s:
            return REVERSED
        if start_s >= duration_s:
            return BEYOND
        return TimeSpan(start_s, min(end_s, duration_s))


@dataclass(frozen=True, slots=True)
class CorpusVideo:
    """One video as it was listed. Listing opens no video, so it may prove missing or broken."""

    video: str
    """Identity: the path below the corpus, the path as a table gives it, or `name.tar/member`."""
    source: VideoSource
    """Where its bytes are; a local path is absolute."""
    captions: tuple[str, ...] = ()
    extra: Mapping[str, Scalar] = field(default_factory=dict)
    """What else the table, or the JSON member beside it, said of it; nested values as JSON text."""
    problem: str | None = None
    """Why it is known already that it cannot be read. A folder that could not be listed is an entry
    of this kind, named `folder/`: it counts as found and failed instead of vanishing."""
    spans: Sequence[CorpusSpan] = ()
    """Its parts, if the corpus lists any; clips lie inside them. Each has captions of its own, and
    what else it carries goes before the video's. Empty: the whole video is one span."""

    @property
    def address(self) -> str:
        """The source's URL relative to the corpus' root if it is below it, else as it is.

        `join_url(corpus_root(corpus), address)` is the URL again, wherever the corpus was moved.
        """
        url = public_url(self.source.url)  # the listing of each run brings its own access
        if self.source.offset is None:
            return self.video if url.endswith(f"/{self.video}") else url
        tars = (m.end(1) for m in re.finditer(r"(?=([^/])/)", self.video))
        names = (self.video[:end] for end in tars)
        return next((name for name in names if url.endswith(f"/{name}")), url)


def extension(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


def is_video_name(name: str) -> bool:
    """Whether a file of a folder or a tar is a video by its name, or a picture."""
    return extension(name) in VIDEO_EXTENSIONS or is_still_name(name)


def is_utf8(text: str) -> bool:
    """Whether the text has UTF-8 bytes: file names and JSON escapes may hold lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def storable(text: str) -> str:
    r"""Write bytes that are not UTF-8 as \xff, so that the text can be stored."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def as_captions(value: Any, *, where: str, lost: list[str]) -> tuple[str, ...]:
    """Return a text or a list of texts as captions; nothing and empty texts are no captions.

    Where they are `LOST`, `where` is added to what is `lost`.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ()
    texts = value if isinstance(value, list | tuple) else [value]
    for text in texts:
        if not isinstance(text, str | None):
            raise CorpusError(
                f"{where}: a caption must be text, got {text!r}. Name the column that holds the "
                "captions (--caption-column)."
            )
    some = [text for text in texts if text]
    if not all(map(is_utf8, some)) or len(texts) + sum(map(len, some)) - 1 > MAX_CAPTION:
        lost.append(where)
        return ()
    return tuple(text for text in texts if text and text.strip().lower() not in NO_CAPTION)


def as_scalar(value: Any, *, where: str) -> Scalar | None:
    """Return a JSON value, date or decimal as what a Parquet column can hold; None for nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**63 else str(value)
    if isinstance(value, list | dict):
        value = json.dumps(value, ensure_ascii=False, default=str)
    text = str(value)
    return text if is_utf8(text) else text.encode("utf-8", "backslashreplace").decode()


def as_extra(raw: Mapping[str, Any], *, where: str) -> dict[str, Scalar]:
    scalars = {key: as_scalar(value, where=where) for key, value in raw.items()}
    return {key: value for key, value in scalars.items() if value is not None}


def match_name(names: tuple[str, ...], among: list[str]) -> str | None:
    """Return the member of `among` that is, but for case, spaces and marks, the first possible one
    of `names`."""
    squash = {squashed(name): name for name in reversed(among)}
    return next((squash[name] for name in names if name in squash), None)


def squashed(name: str) -> str:
    """Return a name as it is compared: `Start_timestamp`, `start timestamp`: `starttimestamp`."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def file_columns(names: list[str]) -> list[str]:
    """Return the columns that may say which file a row is of, the likeliest first."""
    kinds = (PATH_NAMES, URL_NAMES, ID_NAMES, IMAGE_NAMES)  # an image may be a video's thumbnail
    found = (match_name(kind, names) for kind in kinds)
    return [name for name in found if name is not None]

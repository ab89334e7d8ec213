"""Published sets of videos that autoencoders are compared on, as people have them on disk."""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

from reducio_latents.core.choices import ProtocolName
from reducio_latents.errors import CorpusError

PresetName = Literal["pexels-1k", "ucf-101", "mcl-jcv", "davis", "tokenbench", "xiph"]

DAVIS_FPS = 24
DAVIS_SIZES = ("Full-Resolution", "1080p", "480p")
"""Folders of DAVIS' JPEGImages, the best first."""
_DAVIS_LIST = "ImageSets/2017/val.txt"
_FRAME = re.compile(r"\d+\.jpe?g", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """How a set is measured on. The defaults of `SampleSpec` are the other settings."""

    layout: str
    """What it looks like on disk."""
    names: str = ""
    """Pattern that every video's name matches."""
    videos: int | None = None
    """How many are drawn by the seed; None: all."""
    protocol: ProtocolName = "standard"


PRESETS: dict[PresetName, Preset] = {
    # The paper does not say which 1,000 videos: here a seed draws them, and the clip is the middle.
    "pexels-1k": Preset(layout="any corpus", videos=1000, protocol="paper"),
    "ucf-101": Preset(layout="any corpus", protocol="paper"),
    "mcl-jcv": Preset(
        layout="30 files videoSRC01... to videoSRC30..., .mp4, .y4m, or .yuv with size and rate in "
        "its name, as videoSRC01_1920x1080_30.yuv",
        names=r"(?i)videosrc\d\d",
    ),
    "davis": Preset(
        layout="JPEGImages/480p/SEQUENCE/00000.jpg (or 1080p, Full-Resolution), of which the "
        f"sequences in {_DAVIS_LIST} count where it is there; or a folder of sequences"
    ),
    "tokenbench": Preset(layout="a folder of .mp4 files", names=r"(?i)\.mp4$"),
    "xiph": Preset(layout="a folder of .y4m files", names=r"(?i)\.y4m$"),
}


def require_layout(preset: PresetName | None, corpus: str | Path, videos: Sequence[str]) -> None:
    """Raise CorpusError for a video that the preset's set does not have."""
    if preset is None:
        return
    strange = [name for name in videos if not re.search(PRESETS[preset].names, name)]
    if strange:
        raise CorpusError(
            f"{corpus} holds {strange[0]}, which is not of {preset}: that is "
            f"{PRESETS[preset].layout}. Name that folder, or leave --preset out."
        )


@contextmanager
def as_videos(preset: PresetName | None, corpus: str | Path) -> Iterator[str | Path]:
    """Give a corpus whose videos are files: sequences of JPEG files are put, as they are, into
    one Matroska file each, which goes at the end."""
    if preset != "davis":
        yield corpus
        return
    sequences = _sequences(Path(corpus))
    with tempfile.TemporaryDirectory(prefix="reducio-latents-") as folder:
        for sequence in sequences:
            _pack(sequence, Path(folder) / f"{sequence.name}.mkv")
        yield folder


def _sequences(root: Path) -> list[Path]:
    sizes = (root / "JPEGImages" / size for size in DAVIS_SIZES)
    folder = next((size for size in sizes if size.is_dir()), root)
    found = sorted(path for path in folder.glob("*/") if _frames(path))
    chosen = root / _DAVIS_LIST
    if chosen.is_file():
        wanted = chosen.read_text().split()
        missing = sorted(set(wanted) - {path.name for path in found})
        if missing:
            raise CorpusError(
                f"{folder} has no sequence {missing[0]}, which {chosen} names; unpack all of DAVIS."
            )
        found = [path for path in found if path.name in wanted]
    if not found:
        raise CorpusError(
            f"{root} holds no sequence of JPEG files; davis is {PRESETS['davis'].layout}."
        )
    return found


def _frames(sequence: Path) -> list[Path]:
    return sorted(path for path in sequence.iterdir() if _FRAME.fullmatch(path.name))


def _pack(sequence: Path, out: Path) -> None:
    import av
    from PIL import Image

    with av.open(str(out), "w") as container:
        stream = container.add_stream("mjpeg", rate=DAVIS_FPS)
        for number, path in enumerate(_frames(sequence)):
            data = path.read_bytes()
            if number == 0:
                with Image.open(io.BytesIO(data)) as first:
                    stream.width, stream.height = first.size
                stream.pix_fmt = "yuvj420p"
            packet = av.Packet(data)
            packet.stream = stream
            packet.time_base = Fraction(1, DAVIS_FPS)
            packet.pts = packet.dts = number
            packet.is_keyframe = True
            container.mux(packet)

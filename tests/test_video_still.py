"""Pictures are shown as a browser shows them, and what is no picture, or too large, says so."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps

from reducio_latents.errors import VideoError
from reducio_latents.files.source import VideoSource
from reducio_latents.video import ClipFrames, backend_for
from reducio_latents.video.still import StillBackend
from tests.videos import barcode, read_number

PICTURE = np.dstack([barcode(5), barcode(9)[..., 0] // 2, barcode(3)[..., 0]])[:, :, [0, 3, 4]]


def read(path: Path, *, frames: int = 1) -> NDArray[np.uint8]:
    backend = backend_for(path.name, "pyav")
    (found,) = backend.read_clips(VideoSource(str(path)), [0.0], frames=frames, rate_fps=16.0)
    if isinstance(found, VideoError):
        raise found
    assert found.times_s == (0.0,)
    info = backend.probe(VideoSource(str(path)))
    assert (info.height, info.width) == found.frames[0].shape[:2]
    return found.frames[0]


def save(path: Path, image: Image.Image, **settings: Any) -> Path:
    image.save(path, **settings)
    return path


@pytest.mark.parametrize("ending", ["png", "webp", "bmp", "tiff", "jpg", "avif", "PNG", "jpeg"])
def test_each_kind_is_read_as_it_was_saved(ending: str, tmp_path: Path) -> None:
    lossy = ending in ("jpg", "jpeg", "avif")
    settings: dict[str, Any] = {"lossless": True} if ending == "webp" else {}
    if lossy:
        settings = {"quality": 100, "subsampling": "4:4:4"}
    path = save(tmp_path / f"p.{ending}", Image.fromarray(PICTURE), **settings)
    off = np.abs(read(path).astype(int) - PICTURE)
    assert off.max() <= (12 if lossy else 0)


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_picture_is_turned_as_its_exif_says(turn: int, tmp_path: Path) -> None:
    image = Image.fromarray(PICTURE)
    exif = Image.Exif()
    exif[0x0112] = turn
    path = save(tmp_path / "p.png", image, exif=exif)
    with Image.open(path) as stored:
        wanted = np.asarray(ImageOps.exif_transpose(stored))
    assert np.array_equal(read(path), wanted)


def test_samples_of_any_kind_become_8_bit_rgb(tmp_path: Path) -> None:
    grey = PICTURE[..., 0]
    rgb = np.dstack([grey] * 3)
    deep = grey.astype(np.uint16) * 257
    for name, image in {
        "grey.png": Image.fromarray(grey),
        "deep.png": Image.fromarray(deep),
        "deep.tiff": Image.fromarray(deep),
        "bits.png": Image.fromarray(grey > 99),
    }.items():
        wanted = np.dstack([np.where(grey > 99, 255, 0)] * 3) if name == "bits.png" else rgb
        assert np.array_equal(read(save(tmp_path / name, image)), wanted), name
    few = Image.fromarray(PICTURE).quantize(16)
    assert np.array_equal(read(save(tmp_path / "few.png", few)), np.asarray(few.convert("RGB")))
    with pytest.raises(VideoError, match="no known range"):
        read(save(tmp_path / "float.tiff", Image.fromarray(grey.astype(np.float32))))


def test_transparent_pictures_lie_on_black_too(tmp_path: Path) -> None:
    opacity = np.full(PICTURE.shape[:2], 128, np.uint8)
    opacity[:40] = 0
    path = save(tmp_path / "p.png", Image.fromarray(np.dstack([PICTURE, opacity])))
    shown = read(path)
    assert not shown[:40].any()
    assert np.abs(shown[40:].astype(int) - PICTURE[40:] * (128 / 255)).max() <= 1
    one = Image.fromarray(PICTURE).quantize(4)
    one.save(tmp_path / "key.png", transparency=0)
    assert not read(tmp_path / "key.png")[np.asarray(one) == 0].any()


def test_colours_are_brought_to_srgb_by_their_profile(tmp_path: Path) -> None:
    # Linear light with sRGB's primaries: a profile whose curve is a straight line.
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    plain = save(tmp_path / "srgb.png", Image.fromarray(PICTURE), icc_profile=srgb)
    assert np.array_equal(read(plain), PICTURE)
    xyz = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for odd in (b"not a profile", xyz):  # of another kind of picture: passed over
        path = save(tmp_path / "odd.png", Image.fromarray(PICTURE), icc_profile=odd)
        assert np.array_equal(read(path), PICTURE)
    wide = save(tmp_path / "wide.png", Image.fromarray(PICTURE), icc_profile=_wide_gamut())
    red = PICTURE[..., 0].astype(int) - PICTURE[..., 1]
    more = read(wide)[..., 0].astype(int) - read(wide)[..., 1]
    assert (more - red)[red > 60].mean() > 5  # the same numbers mean stronger colours there


def _wide_gamut() -> bytes:
    """Make an ICC profile of the primaries of Adobe RGB and a gamma of 2.2."""

    def fixed(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(map(fixed, values))

    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"wide\0" + b"\0" * 78
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(2.2 * 256)) + b"\0\0"
    tags = {
        b"desc": text, b"cprt": b"text\0\0\0\0none\0\0\0\0", b"wtpt": xyz(0.9642, 1.0, 0.8249),
        b"rXYZ": xyz(0.6097, 0.3111, 0.0195), b"gXYZ": xyz(0.2053, 0.6257, 0.0609),
        b"bXYZ": xyz(0.1492, 0.0632, 0.7446), b"rTRC": curve, b"gTRC": curve, b"bTRC": curve,
    }  # fmt: skip
    at, table, data = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, body in tags.items():
        body += b"\0" * (-len(body) % 4)
        table += name + struct.pack(">II", at + len(data), len(body))
        data += body
    head = struct.pack(
        ">I4sI4s4s4s", at + len(data), b"none", 0x02400000, b"mntr", b"RGB ", b"XYZ "
    )
    head += b"\0" * 12 + b"acsp" + b"\0" * 28 + xyz(0.9642, 1.0, 0.8249)[8:]
    return head.ljust(128, b"\0") + table + data


def _png(width: int, height: int) -> bytes:
    """Return a PNG that claims a size and has next to no data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _jpeg() -> bytes:
    out = io.BytesIO()
    Image.fromarray(PICTURE).save(out, "JPEG")
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("a.png", b"", "is no JPEG, PNG"),
        ("a.jpg", b"<html>not found</html>", "is no JPEG, PNG"),
        ("a.heic", b"\0\0\0\x18ftypheic" + b"\0" * 64, "is no JPEG, PNG"),
        ("a.jpg", _jpeg()[:-200], "cannot be decoded"),
        ("a.png", _png(200_000, 200_000), "too many pixels"),
        ("a.png", _png(13_000, 13_000), "13000x13000 pixels, more than"),
        ("a.png", _png(64, 64), "cannot be decoded"),
    ],
    ids=["empty", "page", "heic", "cut", "bomb", "large", "short"],
)
def test_what_cannot_be_shown_says_why(name: str, data: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(VideoError, match=why):
        read(tmp_path / name)
    assert isinstance(backend_for(name, "pyav"), StillBackend)


def test_pages_are_no_picture_and_several_frames_are_no_clip_of_one(tmp_path: Path) -> None:
    image = Image.fromarray(PICTURE)
    pages = save(tmp_path / "p.tiff", image, save_all=True, append_images=[image])
    with pytest.raises(VideoError, match="2 pages"):
        read(pages)
    with pytest.raises(VideoError, match=r"clip at 0.000 s: it is a picture, of one frame"):
        read(save(tmp_path / "p.png", image), frames=2)


@pytest.mark.parametrize("ending", ["png", "webp", "avif"])
def test_an_animation_is_a_video_whatever_it_is_called(ending: str, tmp_path: Path) -> None:
    frames = [Image.fromarray(barcode(number)) for number in range(8)]
    times: dict[str, Any] = {"save_all": True, "append_images": frames[1:], "duration": 125}
    moving = save(tmp_path / f"p.{ending}", frames[0], **times)
    backend = backend_for(moving.name, "pyav")
    info = backend.probe(VideoSource(str(moving)))
    assert (info.frames, info.duration_s, info.rate_fps) == pytest.approx((8, 1.0, 8.0))
    (clip,) = backend.read_clips(VideoSource(str(moving)), [0.0], frames=8, rate_fps=8.0)
    assert isinstance(clip, ClipFrames)
    assert [read_number(frame) for frame in clip.frames] == list(range(8))
    late, past = backend.read_clips(VideoSource(str(moving)), [0.5, 0.625], frames=4, rate_fps=8.0)
    assert isinstance(late, ClipFrames)
    assert read_number(late.frames[0]) == 4
    assert isinstance(past, VideoError)

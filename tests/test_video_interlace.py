"""Interlaced frames become whole ones, at the same times; others keep their bits."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.filter import Graph
from numpy.typing import NDArray

from reducio_latents import LatentTable, encode_corpus, open_store
from reducio_latents.check.clips import StoredClip
from reducio_latents.check.decoding import Originals
from reducio_latents.errors import StoreError, VideoError
from reducio_latents.files.source import VideoSource
from reducio_latents.store.commit import ShardKey
from reducio_latents.video import ClipFrames, get_backend
from reducio_latents.video.interlace import may_be_interlaced
from tests.fake_torchcodec import torchcodec_or_fake
from tests.videos import Recipe, constant_rate, write_frames

TIMES = constant_rate(300, 25)
X264 = {"preset": "ultrafast", "crf": "10", "g": "25"}
FIELDS = X264 | {"flags": "+ildct+ilme"}
MPEG2 = {"b": "8M", "g": "12", "flags": "+ildct+ilme"}


def moment(number: float, colour: tuple[int, int, int] = (200, 200, 200)) -> NDArray[np.uint8]:
    """Return a picture with a bar that moves four pixels a field of 1/50 s."""
    picture = np.full((80, 96, 3), 40, np.uint8)
    left = int(8 * number) % 64
    picture[:, left : left + 24] = colour
    return picture


def woven(count: int, first: str = "tff", pix_fmt: str = "yuv420p") -> list[av.VideoFrame]:
    """Return frames of two fields, the upper one first (`tff`) or the lower one (`bff`)."""
    graph: Any = Graph()
    source = graph.add_buffer(width=96, height=80, format=pix_fmt, time_base=Fraction(1, 25))
    flag, sink = graph.add("setfield", first), graph.add("buffersink")
    source.link_to(flag)
    flag.link_to(sink)
    graph.configure()
    frames = []
    for number in range(count):
        picture = moment(number)
        late = slice(first == "tff", None, 2)
        picture[late] = moment(number + 0.5)[late]
        graph.push(av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format=pix_fmt))
        frames.append(graph.pull())
    return frames


def comb(picture: NDArray[np.uint8]) -> float:
    """Return how much lines differ from the ones around them."""
    lines = picture.astype(int).mean(-1)
    near = np.abs(lines[1:-1] - (lines[:-2] + lines[2:]) / 2)[2:-2]
    return float(near.mean())


def read(path: Path, starts_s: Sequence[float], **settings: Any) -> list[ClipFrames]:
    backend = get_backend(settings.pop("name", "pyav"), **settings)
    source = VideoSource(str(path))
    clips = list(backend.read_clips(source, starts_s, frames=16, rate_fps=16.0))
    assert all(isinstance(clip, ClipFrames) for clip in clips), clips
    return clips  # type: ignore[return-value]


@pytest.fixture(scope="module")
def interlaced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fields") / "a.mp4"
    return write_frames(path, woven(len(TIMES)), TIMES, Recipe(options=FIELDS))


def test_fields_become_frames_at_the_same_times(interlaced: Path) -> None:
    whole, left = read(interlaced, [1.0])[0], read(interlaced, [1.0], deinterlace=False)[0]
    assert whole.times_s == left.times_s
    for made, kept, time_s in zip(whole.frames, left.frames, whole.times_s, strict=True):
        assert comb(made) < 1.5 < 5 < comb(kept)
        upper = moment(round(time_s * 25))
        assert np.abs(made.astype(int) - upper)[4:-4].mean() < 3  # the moment of its first field
        assert np.abs(made.astype(int) - kept)[4:-4:2].mean() < 1  # which is kept


def test_a_clip_of_fields_is_the_same_alone_and_among_others(interlaced: Path) -> None:
    starts = [0.0, 0.3, 4.0, 7.98, 8.0, 11.0]
    together = read(interlaced, starts)
    for start, clip in zip(starts, together, strict=True):
        [alone] = read(interlaced, [start])
        assert alone.times_s == clip.times_s
        for one, other in zip(alone.frames, clip.frames, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("name", "first", "recipe"),
    [
        ("a.mpg", "tff", Recipe(codec="mpeg2video", options=MPEG2, time_base=Fraction(1, 25))),
        ("a.ts", "bff", Recipe(options=FIELDS, tags=(1, 1, 1, 1))),
        ("a.mkv", "tff", Recipe(options=FIELDS, pix_fmt="yuv422p10le")),
    ],
)
def test_codecs_and_layouts_of_fields(
    tmp_path: Path, name: str, first: str, recipe: Recipe
) -> None:
    frames = woven(60, first, recipe.pix_fmt)
    path = write_frames(tmp_path / name, frames, TIMES[:60], recipe)
    [whole], [left] = read(path, [1.0]), read(path, [1.0], deinterlace=False)
    assert max(map(comb, whole.frames)) < 3 < 5 < min(map(comb, left.frames))
    kept = slice(first == "bff", None, 2)
    assert np.abs(whole.frames[5].astype(int) - left.frames[5])[kept].mean() < 1


def test_whole_frames_among_fields_keep_their_bits(tmp_path: Path) -> None:
    size = [moment(i) for i in range(60)]
    one = write_frames(tmp_path / "a.ts", size, TIMES[:60], Recipe(first_s=1.0, options=X264))
    other = write_frames(
        tmp_path / "b.ts", woven(60), TIMES[:60], Recipe(first_s=3.4, options=FIELDS)
    )
    path = tmp_path / "mixed.ts"
    path.write_bytes(one.read_bytes() + other.read_bytes())
    starts = [1.0, 3.0]
    (first, second), (kept, left) = read(path, starts), read(path, starts, deinterlace=False)
    np.testing.assert_array_equal(first.frames, kept.frames)
    assert max(map(comb, second.frames)) < 1.5 < 5 < min(map(comb, left.frames))


def test_damage_beside_a_field_is_its_own(interlaced: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged.mp4"
    data = bytearray(interlaced.read_bytes())
    with av.open(str(interlaced)) as file:
        packets = [(p.pos, p.size) for p in file.demux(video=0) if p.size]
    position, size = packets[100]  # 4 s: a key frame follows that takes nothing of it
    data[position : position + size] = b"\xff" * size
    path.write_bytes(data)
    source = VideoSource(str(path))
    backend = get_backend("pyav")
    one = next(backend.read_clips(source, [3.96], frames=1, rate_fps=25.0))
    assert isinstance(one, VideoError)
    [left] = get_backend("pyav", deinterlace=False).read_clips(
        source, [3.92], frames=1, rate_fps=25.0
    )
    assert isinstance(left, ClipFrames)


@pytest.mark.parametrize("backend", ["decord", "torchcodec"])
def test_what_may_have_fields_is_refused(interlaced: Path, backend: str) -> None:
    source = VideoSource(str(interlaced))
    with torchcodec_or_fake():
        pytest.importorskip(backend)
        refusal = rf"{backend} cannot deinterlace.*use --video-backend pyav"
        with pytest.raises(VideoError, match=refusal):
            get_backend(backend).probe(source)
        one, other = (
            read(interlaced, [1.0], name=name, deinterlace=False)[0] for name in (backend, "pyav")
        )
    assert one.times_s == other.times_s
    assert np.abs(np.stack(one.frames).astype(int) - np.stack(other.frames)).mean() < 0.5


def test_a_header_tells_whether_fields_may_come(interlaced: Path, tmp_path: Path) -> None:
    whole = [moment(i) for i in range(5)]
    profiles = {
        "high": "yuv420p",
        "high422": "yuv422p10le",
        "high444": "yuv444p",
        "main": "yuv420p",
    }
    found = {"fields": interlaced}
    for profile, pix_fmt in profiles.items():
        recipe = Recipe(options={"preset": "veryfast", "profile": profile}, pix_fmt=pix_fmt)
        found[profile] = write_frames(tmp_path / f"{profile}.mkv", whole, TIMES[:5], recipe)
        found[profile + " avi"] = write_frames(
            tmp_path / f"{profile}.avi", whole, TIMES[:5], recipe
        )
    mpeg2 = Recipe(codec="mpeg2video", options={"b": "4M"}, time_base=Fraction(1, 25))
    found["mpeg2"] = write_frames(tmp_path / "mpeg2.mkv", whole, TIMES[:5], mpeg2)
    for name, path in found.items():
        with av.open(str(path)) as file:
            stream = file.streams.video[0]
            header = stream.codec_context.extradata or b""
            first = _Progressive()
            assert may_be_interlaced(stream.codec_context.name, header, first) == (name == "fields")
            assert may_be_interlaced("h264", header[:6], first)
    assert not may_be_interlaced("vp9", b"", first)


def picture(row: Any) -> NDArray[np.uint8]:
    image: NDArray[np.uint8] = row["content_image"].permute(1, 2, 0).numpy()
    return image


def test_a_store_keeps_what_it_was_begun_with(tmp_path: Path) -> None:
    corpus, made = tmp_path / "videos", {}
    corpus.mkdir()
    write_frames(corpus / "a.mp4", woven(30), TIMES[:30], Recipe(options=FIELDS))
    settings: dict[str, Any] = {"resolution": 96, "columns": ("content_image",), "workers": 1}
    for how in ("auto", "none"):
        store = tmp_path / f"{how}.latents"
        encode_corpus(corpus, store, deinterlace=how, **settings)
        with Originals(open_store(store)) as originals:
            stored = StoredClip("", "a.mp4", 0.0, ShardKey("16x96x96", 0), 0, ())
            made[how] = picture(LatentTable(store, ["content_image"])[0])
            np.testing.assert_array_equal(originals.read(stored)[7], made[how])
    assert comb(made["none"]) > 2 * comb(made["auto"])

    store = tmp_path / "none.latents"
    with pytest.raises(StoreError, match="deinterlace is 'none' in the store, 'bwdif' now"):
        encode_corpus(corpus, store, deinterlace="bwdif", **settings)
    write_frames(corpus / "b.mp4", woven(31), TIMES[:31], Recipe(options=FIELDS))
    assert encode_corpus(corpus, store, **settings).clips.encoded == 1
    for row in LatentTable(store, ["content_image"]):
        assert comb(picture(row)) == comb(made["none"])
    deinterlaced = [open_store(tmp_path / f"{how}.latents").meta for how in ("auto", "none")]
    assert [meta.deinterlace for meta in deinterlaced] == ["bwdif", "none"]
    one, other = (meta.columns["content_image"].fingerprint for meta in deinterlaced)
    assert one != other


class _Progressive:
    interlaced_frame = False

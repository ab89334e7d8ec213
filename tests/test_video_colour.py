"""Colours: matrices and ranges as tagged, sensible guesses, HDR and transparency to RGB."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from reducio_latents.errors import VideoError
from reducio_latents.files.source import VideoSource
from reducio_latents.video import ClipFrames, get_backend
from reducio_latents.video.colour import (
    WHITE_NITS,
    RgbConverter,
    nits_to_pq,
    pq_to_nits,
    roll_off,
    to_sdr,
)
from tests.fake_torchcodec import torchcodec_or_fake
from tests.videos import Recipe, write_frames

LUMA_WEIGHTS = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593)}
MATRIX_NUMBERS = {"bt601": 6, "bt709": 1, "bt2020": 9}


def ycbcr_frame(
    ycbcr: tuple[int, int, int], *, pix_fmt: str = "yuv420p", size: tuple[int, int] = (64, 64)
) -> Any:
    """Return a frame of one colour."""
    frame = av.VideoFrame(*size, pix_fmt)
    wide = frame.format.components[0].bits > 8
    for plane, value in zip(frame.planes, ycbcr, strict=False):
        dtype = np.dtype("<u2" if wide else "u1")
        plane.update(np.full(plane.buffer_size // dtype.itemsize, value, dtype).tobytes())
    return frame


def exact_rgb(ycbcr: tuple[int, int, int], matrix: str, full_range: bool) -> NDArray[np.float64]:
    kr, kb = LUMA_WEIGHTS[matrix]
    y, cb, cr = ycbcr
    luma = y / 255 if full_range else (y - 16) / 219
    blue, red = ((c - 128) / (255 if full_range else 224) for c in (cb, cr))
    r, b = luma + 2 * (1 - kr) * red, luma + 2 * (1 - kb) * blue
    rgb: NDArray[np.float64] = np.array([r, (luma - kr * r - kb * b) / (1 - kr - kb), b])
    return np.clip(255 * rgb, 0, 255)


@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("matrix", ["bt601", "bt709", "bt2020"])
@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p"])
def test_tagged_colours_are_what_their_tags_say(
    matrix: str, full_range: bool, pix_fmt: str
) -> None:
    for ycbcr in [(50, 128, 128), (120, 100, 150), (180, 140, 110), (90, 160, 120)]:
        frame = ycbcr_frame(ycbcr, pix_fmt=pix_fmt)
        frame.colorspace, frame.color_range = MATRIX_NUMBERS[matrix], 2 if full_range else 1
        rgb = RgbConverter().convert(frame, 64)[32, 32]
        assert np.abs(rgb - exact_rgb(ycbcr, matrix, full_range)).max() <= 3


@pytest.mark.parametrize(
    ("size", "matrix"), [((640, 480), "bt601"), ((720, 576), "bt601"), ((1280, 720), "bt709")]
)
def test_an_untagged_picture_is_guessed_from_its_size(size: tuple[int, int], matrix: str) -> None:
    ycbcr = (120, 90, 170)
    rgb = RgbConverter().convert(ycbcr_frame(ycbcr, size=size), size[0])[40, 40]
    assert np.abs(rgb - exact_rgb(ycbcr, matrix, False)).max() <= 3


def test_ten_bits_are_eight_bits_more_finely() -> None:
    ycbcr = (120, 100, 150)
    fine = ycbcr_frame(tuple(4 * v for v in ycbcr), pix_fmt="yuv420p10le")  # type: ignore[arg-type]
    rgb = RgbConverter().convert(fine, 64)
    assert np.abs(rgb[20:40, 20:40] - exact_rgb(ycbcr, "bt601", False)).max() <= 3


def test_a_matrix_that_is_not_known_is_an_error() -> None:
    frame = ycbcr_frame((100, 128, 128))
    frame.colorspace = 14  # ICtCp
    with pytest.raises(VideoError, match="colour matrix"):
        RgbConverter().convert(frame, 64)


def test_transparent_pictures_lie_on_black() -> None:
    rgba = np.full((8, 8, 4), 200, np.uint8)
    rgba[:4, :, 3], rgba[4:, :, 3] = 0, 255
    rgba[4:, 4:, 3] = 128
    frame = av.VideoFrame.from_ndarray(rgba, format="rgba")
    rgb = RgbConverter().convert(frame, 8)
    assert (rgb[:4] == 0).all()
    assert (rgb[4:, :4] == 200).all()
    assert (rgb[4:, 4:] == 100).all()


def test_wider_samples_widen_the_picture() -> None:
    frame = av.VideoFrame.from_ndarray(np.full((8, 8, 3), 77, np.uint8), format="rgb24")
    rgb = RgbConverter().convert(frame, 12)
    assert rgb.shape == (8, 12, 3)
    assert np.abs(rgb.astype(int) - 77).max() <= 1


def test_pq_is_its_own_inverse_and_has_the_levels_of_the_standard() -> None:
    nits = np.array([0.01, 1.0, 100.0, 203.0, 1000.0, 10000.0])
    np.testing.assert_allclose(pq_to_nits(nits_to_pq(nits)), nits, rtol=1e-6)
    # BT.2408, table 1: 203 nits are 58 % of the signal, 1000 nits 75 %.
    np.testing.assert_allclose(nits_to_pq(np.array([203.0, 1000.0])), [0.58, 0.75], atol=3e-3)


def test_brightness_rolls_off_without_steps_or_reversals() -> None:
    nits = np.linspace(0, 10000, 20001)
    rolled = roll_off(nits)
    assert (np.diff(rolled) >= -1e-9).all()
    assert rolled.max() == pytest.approx(WHITE_NITS, rel=1e-3)
    assert rolled[nits < 80] == pytest.approx(nits[nits < 80], rel=1e-3, abs=1e-6)


def _pq_grey(nits: float) -> NDArray[np.uint16]:
    level = round(float(nits_to_pq(np.array(nits))) * 65535)
    return np.full((2, 2, 3), level, np.uint16)


@pytest.mark.parametrize("transfer", ["pq", "hlg", "sdr"])
def test_grey_stays_grey_and_brighter_stays_brighter(transfer: str) -> None:
    ramp = np.repeat(np.linspace(0, 65535, 256).astype(np.uint16)[:, None], 3, axis=1)[None]
    out = to_sdr(ramp, transfer=transfer)[0].astype(int)
    assert (out.max(axis=1) - out.min(axis=1)).max() <= 1
    assert (np.diff(out[:, 1]) >= 0).all()
    assert out[0].max() == 0
    assert out[-1].min() >= 254


def test_reference_white_is_nearly_white_and_dim_light_is_unchanged() -> None:
    white = to_sdr(_pq_grey(203.0), transfer="pq")[0, 0, 1]
    assert 215 <= white <= 240  # below the highlights, which share what is left
    dim = to_sdr(_pq_grey(20.0), transfer="pq")[0, 0, 1]
    assert dim == pytest.approx(255 * (20 / WHITE_NITS) ** (1 / 2.4), abs=2)


def test_colours_of_bt709_come_back_from_bt2020() -> None:
    """A BT.709 red, written as BT.2020 light, is the same red again; a wider one is clipped."""
    to_2020 = np.linalg.inv(
        [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]
    )
    light = to_2020 @ np.array([0.8, 0.1, 0.1])
    signal = np.rint(65535 * light ** (1 / 2.4)).astype(np.uint16).reshape(1, 1, 3)
    expected = 255 * np.array([0.8, 0.1, 0.1]) ** (1 / 2.4)
    assert np.abs(to_sdr(signal, transfer="sdr")[0, 0] - expected).max() <= 1
    widest = np.array([65535, 0, 0], np.uint16).reshape(1, 1, 3)
    assert to_sdr(widest, transfer="sdr")[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(("transfer", "number"), [("pq", 16), ("hlg", 18)])
def test_an_hdr_video_is_read_as_an_ordinary_one(
    tmp_path: Path, transfer: str, number: int
) -> None:
    # 10-bit limited range; a signal of 58 % is 203 nits in PQ, 75 % is 203 nits in HLG.
    signal = {"pq": 0.58, "hlg": 0.75}[transfer]
    grey = ycbcr_frame((round(64 + 876 * signal), 512, 512), pix_fmt="yuv420p10le", size=(96, 80))
    recipe = Recipe(pix_fmt="yuv420p10le", tags=(1, 9, 9, number))
    path = write_frames(tmp_path / "hdr.mp4", [grey, grey], [0.0, 0.5], recipe)
    [clip] = get_backend("pyav").read_clips(VideoSource(str(path)), [0.0], frames=1, rate_fps=16.0)
    assert isinstance(clip, ClipFrames)
    middle = clip.frames[0][40, 48].astype(int)
    assert middle.max() - middle.min() <= 2
    assert 205 <= middle[1] <= 245


def test_what_is_written_tagged_is_read_by_its_tags(tmp_path: Path) -> None:
    ycbcr = (120, 90, 170)
    for name, number in MATRIX_NUMBERS.items():
        if name == "bt2020":
            continue
        frames = [ycbcr_frame(ycbcr, size=(96, 80)) for _ in range(2)]
        recipe = Recipe(tags=(1, number, number, number), options={"qp": "0"})
        path = write_frames(tmp_path / f"{name}.mp4", frames, [0.0, 0.1], recipe)
        for backend in ("pyav", "decord", "torchcodec"):
            with torchcodec_or_fake():
                pytest.importorskip({"pyav": "av"}.get(backend, backend))
                [clip] = get_backend(backend).read_clips(
                    VideoSource(str(path)), [0.0], frames=1, rate_fps=16.0
                )
            assert isinstance(clip, ClipFrames), clip
            assert np.abs(clip.frames[0][40, 48] - exact_rgb(ycbcr, name, False)).max() <= 3

"""Pictures for people: clips side by side, contact sheets, and the files that a person named.

Frames are uint8 RGB (T, H, W, 3).
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from reducio_latents.errors import StoreError
from reducio_latents.video.pixels import to_uint8

Frames = NDArray[np.uint8]

LABEL_PX = 24
"""Height of the strip with the labels; even, as H.264 wants it."""
GAP_PX = 4
INK, PAPER, FAINT = (240, 240, 240), (24, 24, 24), (150, 150, 150)
THUMBNAIL_PX = 144
SHEET_COLUMNS = 8


def frames_of(video_CTHW: Tensor) -> Frames:
    """Pixels in [-1, 1] (3, T, H, W), clamped, to uint8 frames."""
    return np.ascontiguousarray(to_uint8(video_CTHW).permute(1, 2, 3, 0).cpu().numpy())


class Panel(NamedTuple):
    """One of several clips that are shown together."""

    label: str
    frames: Frames


class SheetRow(NamedTuple):
    """One clip on a contact sheet: a title, and its panels one above the other."""

    title: str
    panels: Sequence[Panel]


def side_by_side(panels: Sequence[Panel], *, labelled: bool = True) -> Frames:
    """Return clips of one size and length next to each other, `labelled` with a strip above.

    Both sides of the result are even.
    """
    frames, height, width = panels[0].frames.shape[:3]
    top = LABEL_PX if labelled else 0
    total_width = len(panels) * width + (len(panels) - 1) * GAP_PX
    shape = (frames, top + height + height % 2, total_width + total_width % 2, 3)
    canvas = np.full(shape, PAPER, np.uint8)
    if labelled:
        canvas[:, :top] = _labels([p.label for p in panels], width, shape[2])
    for number, panel in enumerate(panels):
        left = number * (width + GAP_PX)
        canvas[:, top : top + height, left : left + width] = panel.frames
    return canvas


def one_after_another(clips: Sequence[Frames]) -> Frames:
    """Return clips of any sizes as one, each in the top left corner of the largest."""
    height, width = (max(clip.shape[side] for clip in clips) for side in (1, 2))
    joined = np.full((sum(map(len, clips)), height, width, 3), PAPER, np.uint8)
    start = 0
    for clip in clips:
        joined[start : start + len(clip), : clip.shape[1], : clip.shape[2]] = clip
        start += len(clip)
    return joined


def difference(original: Frames, decoded: Frames, gain: int = 4) -> Frames:
    """Return the absolute difference, `gain` times as bright."""
    apart = np.abs(original.astype(np.int16) - decoded.astype(np.int16)) * gain
    clipped: Frames = np.minimum(apart, 255).astype(np.uint8)
    return clipped


def contact_sheet(rows: Sequence[SheetRow]) -> Frames:
    """Return one picture, (H, W, 3): for each clip some frames in time from left to right, panel
    under panel, so that the same moment stands in one column.
    """
    blocks = [_sheet_block(row) for row in rows]
    width = max(block.width for block in blocks)
    sheet = Image.new("RGB", (width, sum(block.height for block in blocks)), PAPER)
    top = 0
    for block in blocks:
        sheet.paste(block, (0, top))
        top += block.height
    return np.asarray(sheet)


def _sheet_block(row: SheetRow) -> Image.Image:
    height, width = row.panels[0].frames.shape[1:3]
    scale = min(1.0, THUMBNAIL_PX / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    width = max(
        SHEET_COLUMNS * (size[0] + GAP_PX), round(_font().getlength(row.title)) + 2 * GAP_PX
    )
    height = LABEL_PX + len(row.panels) * (size[1] + GAP_PX) + GAP_PX
    block = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(block)
    draw.text((GAP_PX, 5), row.title, fill=INK, font=_font())
    for line, panel in enumerate(row.panels):
        top = LABEL_PX + line * (size[1] + GAP_PX)
        moments = np.linspace(0, len(panel.frames) - 1, SHEET_COLUMNS).round().astype(int)
        for column, moment in enumerate(moments):
            thumbnail = Image.fromarray(panel.frames[moment]).resize(size, Image.Resampling.LANCZOS)
            block.paste(thumbnail, (column * (size[0] + GAP_PX), top))
        draw.text(
            (GAP_PX, top + 2),
            panel.label,
            fill=INK,
            font=_font(10),
            stroke_width=2,
            stroke_fill=PAPER,
        )
    return block


def _labels(labels: Sequence[str], width: int, total_width: int) -> Frames:
    """Return the strip above panels of `width`, uint8 (LABEL_PX, total_width, 3)."""
    strip = Image.new("RGB", (total_width, LABEL_PX), PAPER)
    for number, label in enumerate(labels):
        # Each on a piece of its own, so that a long one does not run into its neighbour.
        piece = Image.new("RGB", (width, LABEL_PX), PAPER)
        text = _cut_to(label, width - 2 * GAP_PX)
        ImageDraw.Draw(piece).text((GAP_PX, 5), text, fill=INK, font=_font())
        strip.paste(piece, (number * (width + GAP_PX), 0))
    return np.asarray(strip)


def _cut_to(text: str, width_px: float) -> str:
    """Return `text`, or as much of it and an ellipsis as is `width_px` wide."""
    if _font().getlength(text) <= width_px:
        return text
    while text and _font().getlength(f"{text}\N{HORIZONTAL ELLIPSIS}") > width_px:
        text = text[:-1]
    return f"{text}\N{HORIZONTAL ELLIPSIS}"


def _font(size: float = 13) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def make_folder(folder: Path) -> None:
    """Make a folder to write to; call it before work that would be lost without one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise StoreError(f"cannot write to {folder}: {err.strerror}.") from err
    if not os.access(folder, os.W_OK):
        raise StoreError(f"cannot write to {folder}: {os.strerror(errno.EACCES)}.")


def write_text(path: Path, text: str) -> None:
    with _errors_about(path):
        path.write_text(text, encoding="utf-8")


def write_picture(path: Path, picture_HWC: NDArray[np.uint8]) -> None:
    with _errors_about(path):
        Image.fromarray(picture_HWC).save(path)


@contextmanager
def _errors_about(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as err:
        raise StoreError(f"cannot write {path}: {err.strerror or err}.") from err


def file_name(clip_id: str) -> str:
    """Return a clip id as a file name; ids of stores from elsewhere may hold anything."""
    return re.sub(r"[^\w.-]", "_", clip_id).lstrip(".") or "clip"

"""Frames to pixels: two ways to resize that agree, and the crop between them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reducio_latents.core.geometry import Bucket
from reducio_latents.video.pixels import fit_clip, fit_frame

SIDES = st.integers(3, 90)


def frames_of(height: int, width: int, count: int = 2, seed: int = 0) -> torch.Tensor:
    """Return frames with an edge, a ramp and noise: uint8 (count, height, width, 3)."""
    rng = np.random.RandomState(seed)
    frames = rng.randint(0, 256, (count, height, width, 3), dtype=np.uint8)
    frames[:, : height // 2, : width // 2] = 255
    frames[:, height // 2 :, :, 0] = np.linspace(0, 255, width, dtype=np.uint8)
    return torch.from_numpy(frames)


@settings(max_examples=60)
@given(SIDES, SIDES, SIDES, SIDES, st.sampled_from(["bicubic", "bilinear"]))
def test_a_clip_is_resized_to_the_same_bits_as_its_frames(
    height: int, width: int, to_height: int, to_width: int, mode: str
) -> None:
    bucket = Bucket(2, to_height, to_width)
    frames = frames_of(height, width)
    ours = fit_clip(frames, bucket, mode)
    assert ours.shape == (2, to_height, to_width, 3)
    assert ours.dtype == torch.uint8
    theirs = np.stack([fit_frame(frame.numpy(), bucket, mode) for frame in frames])
    np.testing.assert_array_equal(ours.numpy(), theirs)


@pytest.mark.parametrize(
    ("size", "side"), [((1080, 1920), 256), ((720, 1280), 320), ((33, 4000), 32), ((40, 30), 512)]
)
def test_sizes_of_real_videos_are_resized_to_the_same_bits(
    size: tuple[int, int], side: int
) -> None:
    frames, bucket = frames_of(*size, count=1), Bucket(1, side, side)
    theirs = fit_frame(frames[0].numpy(), bucket, "bicubic")
    np.testing.assert_array_equal(fit_clip(frames, bucket, "bicubic")[0].numpy(), theirs)


def test_a_clip_of_the_right_size_is_only_cropped() -> None:
    frames = frames_of(32, 48)
    assert torch.equal(fit_clip(frames, Bucket(2, 32, 32), "bicubic"), frames[:, :, 8:40])

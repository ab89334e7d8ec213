"""What a GPU run does besides the arithmetic, with streams and pinned memory only pretended."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from reducio_latents import load_autoencoder
from reducio_latents.core.geometry import Bucket
from reducio_latents.encode import gpu
from reducio_latents.encode.gpu import BatchEncoder, DeviceFit
from reducio_latents.video.pixels import fit_clip, to_unit


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the CPU take the calls that only a GPU knows."""

    def nothing(*_: object, **__: object) -> None:
        return None

    def event(**_: object) -> SimpleNamespace:
        return SimpleNamespace(
            record=nothing, synchronize=nothing, query=lambda: True, elapsed_time=lambda _: 5.0
        )

    def stream(*_: object, **__: object) -> SimpleNamespace:
        return SimpleNamespace(wait_stream=nothing, wait_event=nothing)

    monkeypatch.setattr(gpu, "_event", event)
    monkeypatch.setattr(gpu, "_stream", stream)
    monkeypatch.setattr(gpu, "_on_gpu", lambda _: True)
    monkeypatch.setattr(gpu, "_pinned", lambda s, dtype=torch.uint8: torch.zeros(s, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.Tensor, "record_stream", nothing)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@pytest.mark.usefixtures("pretended_gpu")
def test_batches_of_any_size_pass_through_a_few_pinned_buffers() -> None:
    model = load_autoencoder("reducio-random:8")
    encoder = BatchEncoder(model)
    batches = [
        noise(size, 16, 32, side, 3, seed=size) for size, side in [(1, 32), (3, 64), (2, 32)]
    ]
    found = [wait() for wait in [encoder.launch(frames) for frames in batches * 2]]
    for frames, moments in zip(batches * 2, found, strict=True):
        alone = model.encode(to_unit(frames)).moments.to(torch.float16)
        np.testing.assert_array_equal(moments, alone.numpy())
    assert encoder.take_busy_s() == pytest.approx(6 * 0.005)
    assert encoder.take_busy_s() == 0.0


@pytest.mark.usefixtures("pretended_gpu")
def test_clips_of_any_size_are_fitted_through_one_pinned_buffer() -> None:
    fit, bucket = DeviceFit("cpu"), Bucket(4, 32, 32)
    for height, width in [(40, 60), (90, 30), (20, 20)]:
        frames = noise(4, height, width, 3)
        assert torch.equal(fit(frames, bucket, "bicubic"), fit_clip(frames, bucket, "bicubic"))
    assert fit._pinned.numel() == 4 * 90 * 30 * 3


def test_a_clip_that_finds_no_memory_on_the_device_is_fitted_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frames, bucket = noise(4, 40, 60, 3), Bucket(4, 32, 32)
    expected, calls = fit_clip(frames, bucket, "bilinear"), []

    def full_at_first(*arguments: object) -> torch.Tensor:
        calls.append(arguments)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return fit_clip(*arguments[:3])  # type: ignore[arg-type]

    monkeypatch.setattr(gpu, "fit_whole", full_at_first)
    assert torch.equal(DeviceFit("cpu")(frames, bucket, "bilinear"), expected)
    assert len(calls) == 2

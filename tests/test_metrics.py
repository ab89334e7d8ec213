"""Picture metrics equal the field's libraries; protocols differ only as they say."""

from __future__ import annotations

import math

import pytest
import torch
from pytorch_msssim import ssim as peer_ssim
from torch import Tensor
from torch.nn import functional as F

from reducio_latents.errors import ConfigError, GeometryError
from reducio_latents.metrics.psnr import PROTOCOLS, clip_psnr, flicker, protocol_named, psnr, ssim

PAPER = PROTOCOLS["paper"]


def pictures(n: int = 3, height: int = 48, width: int = 64) -> tuple[Tensor, Tensor]:
    """Return smooth pictures and noisy copies of them, in [0, 1]."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand((n, 3, 6, 8), generator=generator)
    x = F.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)
    noise = torch.randn(x.shape, generator=generator)
    return x, (x + 0.05 * noise).clamp(0, 1)


def test_psnr_equals_torchmetrics_a_frame_at_a_time() -> None:
    from torchmetrics.functional.image import peak_signal_noise_ratio

    x, y = pictures()
    for frame, (a, b) in zip(psnr(x, y), zip(x, y, strict=True), strict=True):
        assert frame.item() == pytest.approx(
            peak_signal_noise_ratio(a, b, data_range=1.0).item(), abs=1e-4
        )


@pytest.mark.parametrize("size", [(48, 64), (33, 11), (96, 40)])
def test_ssim_equals_pytorch_msssim_and_torchmetrics(size: tuple[int, int]) -> None:
    from torchmetrics.functional.image import structural_similarity_index_measure

    x, y = pictures(3, *size)
    peer = peer_ssim(x, y, data_range=1.0, size_average=False)
    torch.testing.assert_close(ssim(x, y), peer, atol=1e-4, rtol=0)
    # torchmetrics also counts windows over reflected borders; inside the frame it is the same.
    _, windows = structural_similarity_index_measure(
        x, y, data_range=1.0, reduction="none", return_full_image=True
    )
    inside = windows[..., 5 : size[0] - 5, 5 : size[1] - 5].flatten(1).mean(1)
    torch.testing.assert_close(ssim(x, y), inside, atol=1e-4, rtol=0)


def test_the_paper_protocol_averages_blocks_before_ssim_and_only_large_frames_notice() -> None:
    x, y = pictures(1, 512, 384)  # round(384 / 256) is 2
    halved = ssim(F.avg_pool2d(x, 2), F.avg_pool2d(y, 2))
    torch.testing.assert_close(ssim(x, y, PAPER), halved)
    assert ssim(x, y, PAPER).item() > ssim(x, y).item() + 0.1
    small, noisy = pictures(1, 256, 256)
    torch.testing.assert_close(ssim(small, noisy, PAPER), ssim(small, noisy))


def test_the_paper_protocol_adds_1e_8_to_the_error_before_psnr() -> None:
    x = torch.zeros(1, 3, 16, 16)
    y = torch.full_like(x, 1e-4)  # an error of 1e-8, which the protocol doubles
    assert psnr(x, y).item() == pytest.approx(80, abs=1e-3)
    assert psnr(x, y, PAPER).item() == pytest.approx(80 - 10 * math.log10(2), abs=1e-3)


@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_equal_pictures_have_ssim_1_and_a_finite_psnr_that_no_other_pair_reaches(name: str) -> None:
    x, y = pictures()
    protocol = protocol_named(name)
    torch.testing.assert_close(ssim(x, x, protocol), torch.ones(len(x)))
    assert psnr(x, x, protocol).isfinite().all()
    assert (psnr(x, y, protocol) < psnr(x, x, protocol)).all()


def test_the_psnr_of_a_clip_is_not_lifted_by_one_perfect_frame() -> None:
    x = torch.rand(2, 3, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    y = (x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    y[:, :, 7] = x[:, :, 7]
    found = clip_psnr(x, y)
    assert found.shape == (2,)
    error = (x[1].double() - y[1].double()).square().mean()
    assert float(found[1]) == pytest.approx(float(-10 * error.log10()), abs=1e-4)
    frames = psnr(x[1].transpose(0, 1), y[1].transpose(0, 1))
    assert frames.mean() > found[1] + 3
    assert torch.equal(clip_psnr(x, y), clip_psnr(y, x))


def test_metrics_are_symmetric_and_say_which_frame_is_bad() -> None:
    x, y = pictures()
    y[1] = x[1]
    for metric in (psnr, ssim):
        torch.testing.assert_close(metric(x, y), metric(y, x))
        assert metric(x, y).argmax() == 1


def test_flicker_sees_what_moves_and_not_an_error_that_stays() -> None:
    clip = pictures(4)[0]
    assert flicker(clip, clip).item() == 0
    assert flicker(clip, clip + 0.1).item() == pytest.approx(0, abs=1e-4)
    blinking = clip.clone()
    blinking[1] += 2 / 255  # a step up and a step down, in 2 of the 3 pairs
    assert flicker(clip, blinking).item() == pytest.approx(4 / 3, rel=1e-4)
    assert flicker(clip[:1], blinking[:1]).item() == 0


def test_pictures_that_cannot_be_compared_are_refused() -> None:
    x, y = pictures()
    with pytest.raises(GeometryError, match="of one size"):
        psnr(x, y[:, :, 1:])
    with pytest.raises(GeometryError, match="at least 11 px"):
        ssim(x[..., :8], y[..., :8])
    with pytest.raises(ConfigError, match="standard or paper"):
        protocol_named("papre")

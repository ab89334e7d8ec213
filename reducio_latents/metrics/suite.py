"""The metrics of a comparison, by name: made once, fed clips, asked for their means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from reducio_latents.errors import ConfigError
from reducio_latents.metrics.frechet import frechet_of_features
from reducio_latents.metrics.i3d import CLASSES, FVDNetwork, load_i3d
from reducio_latents.metrics.lpips import LPIPS, Net, load_lpips
from reducio_latents.metrics.protocol import Protocol
from reducio_latents.metrics.psnr import clip_psnr, flicker, psnr
from reducio_latents.metrics.ssim import ssim
from reducio_latents.metrics.weights import MetricUnavailableError

MetricName = Literal["psnr", "psnr-clip", "ssim", "lpips-alex", "lpips-vgg", "fvd", "flicker"]
METRICS: tuple[MetricName, ...] = get_args(MetricName)
LPIPS_NETS: dict[str, Net] = {"lpips-alex": "alex", "lpips-vgg": "vgg"}


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Metrics that are ready to use, and those that are not, with the remedy."""

    protocol: Protocol
    names: tuple[str, ...]
    """Those that can be computed."""
    unavailable: dict[str, str]
    """Those that cannot, and why."""
    lpips: dict[str, LPIPS] = field(default_factory=dict)
    i3d: FVDNetwork | None = None

    def features(self, video_BCTHW: Tensor) -> Tensor:
        """Return what FVD compares, (B, 400) on the CPU; (B, 0) where FVD is not computed."""
        if self.i3d is None:
            return torch.zeros(len(video_BCTHW), 0)
        return self.i3d.features(video_BCTHW)

    @property
    def fvd_file(self) -> str | None:
        """Which I3D measures; None where FVD is not computed."""
        return None if self.i3d is None else self.i3d.file


def load_suite(
    names: Sequence[str],
    protocol: Protocol,
    *,
    device: torch.device | str = "cpu",
    lpips_weights: dict[Net, Path] | None = None,
    fvd_weights: Path | None = None,
) -> Suite:
    """Make the metrics of these names; what lacks its weights is named, not replaced.

    Weights given by path must be there: a wrong file raises WeightsError.
    """
    unknown = sorted(set(names) - set(METRICS))
    if unknown:
        raise ConfigError(f"there is no metric {unknown[0]!r}; choose of {', '.join(METRICS)}.")
    ready, missing = [], {}
    networks: dict[str, LPIPS] = {}
    i3d: FVDNetwork | None = None
    for name in dict.fromkeys(names):  # once each: a Tally adds up by name
        try:
            if name in LPIPS_NETS:
                net = LPIPS_NETS[name]
                networks[name] = load_lpips(net, (lpips_weights or {}).get(net)).to(device)
            elif name == "fvd":
                i3d = load_i3d(fvd_weights, device)
        except MetricUnavailableError as err:
            missing[name] = str(err)
        else:
            ready.append(name)
    return Suite(
        protocol=protocol, names=tuple(ready), unavailable=missing, lpips=networks, i3d=i3d
    )


class Tally:
    """The scores of one method on one set of clips."""

    def __init__(self, suite: Suite, real_ND: Tensor) -> None:
        """`real_ND` are the `features` of the originals, the same for every method."""
        self._suite = suite
        self._sums: dict[str, float] = {}
        self._clips = 0
        self._real = real_ND
        self._made: list[Tensor] = []

    def add(self, original_CTHW: Tensor, decoded_CTHW: Tensor) -> None:
        """Take in one clip and its reconstruction, pixels in [-1, 1]."""
        self._clips += 1
        x, y = (v.transpose(0, 1).float() for v in (original_CTHW, decoded_CTHW))
        suite, unit_x, unit_y = self._suite, (x + 1) / 2, (y + 1) / 2
        for name in suite.names:
            if name == "psnr":
                self._put(name, psnr(unit_x, unit_y, suite.protocol).mean())
            elif name == "psnr-clip":
                clip_x, clip_y = (v.transpose(0, 1)[None] for v in (unit_x, unit_y))
                self._put(name, clip_psnr(clip_x, clip_y, suite.protocol).mean())
            elif name == "ssim":
                self._put(name, ssim(unit_x, unit_y, suite.protocol).mean())
            elif name == "flicker":
                self._put(name, flicker(unit_x, unit_y))
            elif name == "fvd":
                self._made.append(suite.features(decoded_CTHW[None]))
            else:
                pair = (x, y) if suite.protocol.lpips_signed else (unit_x, unit_y)
                self._put(name, _lpips(suite.lpips[name], *pair))

    def scores(self) -> dict[str, float]:
        """Return each metric's mean over clips; FVD only where there are at least 2 clips."""
        found = {name: total / self._clips for name, total in self._sums.items()}
        if len(self._made) > 1:
            found["fvd"] = frechet_of_features(self._real, torch.cat(self._made))
        return found

    @property
    def fvd_is_biased(self) -> bool:
        """Whether there are no more clips than features, which lifts the Frechet distance."""
        return 0 < len(self._made) <= CLASSES

    def _put(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + float(value)


@torch.no_grad()
def _lpips(network: LPIPS, x_NCHW: Tensor, y_NCHW: Tensor) -> Tensor:
    """Return the mean LPIPS over frames; a few at a time, as the features take much memory."""
    device = network.mean.device
    parts = [
        network(a.to(device), b.to(device))
        for a, b in zip(torch.split(x_NCHW, 4), torch.split(y_NCHW, 4), strict=True)
    ]
    return torch.cat(parts).mean().cpu()

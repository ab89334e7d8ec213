"""The metrics of a comparison, by name: made once, fed clips, asked for their means."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from reducio_latents.core.choices import LpipsNet, MetricName
from reducio_latents.core.fetching import WeightsPlace
from reducio_latents.errors import ConfigError
from reducio_latents.metrics.i3d import CLASSES, FVDNetwork, frechet_of_features, load_i3d
from reducio_latents.metrics.lpips import LPIPS, load_lpips
from reducio_latents.metrics.psnr import ComparisonRule, clip_psnr, flicker, psnr, ssim, to_pictures
from reducio_latents.metrics.weights import MetricUnavailableError

Measure = Callable[[Tensor, Tensor, ComparisonRule], Tensor]
"""Of a clip's frames, original and decoded, (T, 3, H, W) in [0, 1]; the mean is the score."""
LPIPS_NETS: dict[str, LpipsNet] = {"lpips-alex": "alex", "lpips-vgg": "vgg"}


class Metric(NamedTuple):
    """How a metric is shown, and what makes it of a clip's frames."""

    title: str
    form: str
    """How a score is printed, for str.format."""
    measure: Measure | None = None
    """None: `load_suite` makes it, of weights."""


METRICS: dict[MetricName, Metric] = {
    "psnr": Metric("PSNR", "{:.2f}", psnr),
    "psnr-clip": Metric(
        "PSNR (clip)", "{:.2f}", lambda x, y, rule: clip_psnr(x[None], y[None], rule)
    ),
    "ssim": Metric("SSIM", "{:.3f}", ssim),
    "lpips-alex": Metric("LPIPS (alex)", "{:.3f}"),
    "lpips-vgg": Metric("LPIPS (vgg)", "{:.3f}"),
    "flicker": Metric("flicker", "{:.2f}", lambda x, y, _: flicker(x, y)),
    "fvd": Metric("rFVD", "{:.2f}"),
}
"""In the order of a table's columns."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Metrics that are ready to use, and those that are not, with the remedy."""

    protocol: ComparisonRule
    measures: Mapping[str, Measure]
    i3d: FVDNetwork | None
    """For FVD, which is of all clips together; None if it is not computed."""
    unavailable: dict[str, str]
    """Those that cannot be computed, and why."""

    def features(self, video_BCTHW: Tensor) -> Tensor:
        """Return what FVD compares, (B, 400) on the CPU; (B, 0) if FVD is not computed."""
        if self.i3d is None:
            return torch.zeros(len(video_BCTHW), 0)
        return self.i3d.features(video_BCTHW)

    @property
    def fvd_file(self) -> str | None:
        """Which I3D measures; None if FVD is not computed."""
        return None if self.i3d is None else self.i3d.file


def load_suite(
    names: Sequence[str],
    protocol: ComparisonRule,
    *,
    device: torch.device | str = "cpu",
    lpips_weights: Mapping[LpipsNet, WeightsPlace] | None = None,
    fvd_weights: WeightsPlace | None = None,
) -> Suite:
    """Make the metrics of these names; a metric without its weights is named, not replaced.

    Weights given by path must be there: a wrong file raises WeightsError.
    """
    unknown = sorted({*names} - {*METRICS})
    if unknown:
        raise ConfigError(f"there is no metric {unknown[0]!r}; choose of {', '.join(METRICS)}.")
    measures: dict[str, Measure] = {}
    missing: dict[str, str] = {}
    i3d = None
    for name, metric in METRICS.items():
        if name not in names:
            continue
        try:
            if metric.measure is not None:
                measures[name] = metric.measure
            elif name in LPIPS_NETS:
                net = LPIPS_NETS[name]
                network = load_lpips(net, (lpips_weights or {}).get(net)).to(device)
                measures[name] = partial(_lpips, network)
            else:
                i3d = load_i3d(fvd_weights, device)
        except MetricUnavailableError as err:
            missing[name] = str(err)
    return Suite(protocol=protocol, measures=measures, i3d=i3d, unavailable=missing)


class RunningScores:
    """The scores of one method on a set of clips, as they come."""

    def __init__(self, suite: Suite, real_ND: Tensor) -> None:
        """`real_ND` are the `features` of the originals, the same for every method."""
        self._suite = suite
        self._sums: dict[str, float] = defaultdict(float)
        self._clips = 0
        self._real = real_ND
        self._made: list[Tensor] = []

    def add(self, original_CTHW: Tensor, decoded_CTHW: Tensor) -> None:
        """Take in one clip and its reconstruction, pixels in [-1, 1]."""
        self._clips += 1
        original, decoded = to_pictures(original_CTHW), to_pictures(decoded_CTHW)
        for name, measure in self._suite.measures.items():
            self._sums[name] += float(measure(original, decoded, self._suite.protocol).mean())
        if self._suite.i3d is not None:
            self._made.append(self._suite.i3d.features(decoded_CTHW[None]))

    def means(self) -> dict[str, float]:
        """Return each metric's mean over clips; FVD only if there are at least 2 clips."""
        found = {name: total / self._clips for name, total in self._sums.items()}
        if len(self._made) > 1:
            found["fvd"] = frechet_of_features(self._real, torch.cat(self._made))
        return found

    @property
    def fvd_is_biased(self) -> bool:
        """Whether there are no more clips than features, which lifts the Frechet distance."""
        return 0 < len(self._made) <= CLASSES


@torch.no_grad()
def _lpips(network: LPIPS, x_NCHW: Tensor, y_NCHW: Tensor, rule: ComparisonRule) -> Tensor:
    """Return the LPIPS of each frame; a few at a time, as the features take much memory."""
    if rule.lpips_signed:
        x_NCHW, y_NCHW = x_NCHW * 2 - 1, y_NCHW * 2 - 1
    device = network.mean.device
    parts = [
        network(a.to(device), b.to(device))
        for a, b in zip(torch.split(x_NCHW, 4), torch.split(y_NCHW, 4), strict=True)
    ]
    return torch.cat(parts).cpu()

"""FVD: the Frechet distance of I3D's logits. arXiv 1812.01717; Carreira and Zisserman, 1705.07750.

Two files of it are in use, and FVDs of the one are some 10 % from those of the other:
`i3d_pretrained_400.pt`, a state dict whose keys are those of the network here, with which VideoGPT,
TATS and OmniTokenizer measure; and `i3d_torchscript.pt`, a program, with which StyleGAN-V does. A
program is run only if it is that very one, by its SHA-256. The file is named beside the number.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from reducio_latents.core.fetching import WeightsPlace, find_weights
from reducio_latents.core.weight_files import is_torchscript, load_tensors, open_tensor_file
from reducio_latents.errors import GeometryError
from reducio_latents.metrics.weights import MetricUnavailableError, hub_path

FILE = "i3d_pretrained_400.pt"
PROGRAM_FILE = "i3d_torchscript.pt"
PROGRAM_SHA256 = "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2"
"""Of the file as StyleGAN-V's authors distribute it; several evaluation suites pin the same."""
CLASSES = 400
SIDE_PX = 224
MIN_FRAMES = 9
"""Fewer leave nothing to average over after the three halvings of time."""

Size = tuple[int, int, int]

MIXED: dict[str, tuple[int, ...]] = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
"""Channels of each Inception block: branch 0; branch 1 inner, outer; branch 2; branch 3."""
POOL_BEFORE: dict[str, tuple[Size, Size]] = {
    "Mixed_3b": ((1, 3, 3), (1, 2, 2)),
    "Mixed_4b": ((3, 3, 3), (2, 2, 2)),
    "Mixed_5b": ((2, 2, 2), (2, 2, 2)),
}


def pad_same(x: Tensor, kernel: Size, stride: Size) -> Tensor:
    """Pad with zeros as TensorFlow's `SAME` does: to ceil(size / stride), an odd one last."""
    pads: list[int] = []
    for size, k, s in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride), strict=True):
        total = max((-(-size // s) - 1) * s + k - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


class Unit3D(nn.Module):
    """Convolution, batch norm, ReLU; or the bare convolution with a bias."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, bare: bool = False
    ) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(inputs, outputs, kernel, stride, bias=bare)
        self.bn = None if bare else nn.BatchNorm3d(outputs, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv3d
        x = conv(pad_same(x, conv.kernel_size, conv.stride))  # type: ignore[arg-type]
        return x if self.bn is None else F.relu(self.bn(x))


class Inception(nn.Module):
    def __init__(self, inputs: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        w0, w1a, w1b, w2a, w2b, w3 = widths
        self.b0 = Unit3D(inputs, w0)
        self.b1a, self.b1b = Unit3D(inputs, w1a), Unit3D(w1a, w1b, 3)
        self.b2a, self.b2b = Unit3D(inputs, w2a), Unit3D(w2a, w2b, 3)
        self.b3b = Unit3D(inputs, w3)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.max_pool3d(pad_same(x, (3, 3, 3), (1, 1, 1)), 3, 1)
        branches = [self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)]
        return torch.cat(branches, dim=1)


class I3D(nn.Module):
    """Videos (B, 3, T, 224, 224) in [-1, 1] to the logits of 400 actions, (B, 400)."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = Unit3D(3, 64, 7, 2)
        self.Conv3d_2b_1x1 = Unit3D(64, 64)
        self.Conv3d_2c_3x3 = Unit3D(64, 192, 3)
        channels = 192
        for name, widths in MIXED.items():
            self.add_module(name, Inception(channels, widths))
            channels = widths[0] + widths[2] + widths[4] + widths[5]
        self.logits = Unit3D(channels, CLASSES, bare=True)

    def forward(self, x: Tensor) -> Tensor:
        x = _pool(self.Conv3d_1a_7x7(x), (1, 3, 3), (1, 2, 2))
        x = self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x))
        for name in MIXED:
            if name in POOL_BEFORE:
                x = _pool(x, *POOL_BEFORE[name])
            x = self.get_submodule(name)(x)
        logits: Tensor = self.logits(F.avg_pool3d(x, (2, 7, 7), 1))
        return logits.mean((2, 3, 4))


def _pool(x: Tensor, kernel: Size, stride: Size) -> Tensor:
    # Values are at least 0 after a ReLU, so padding with zeros never wins.
    return F.max_pool3d(pad_same(x, kernel, stride), kernel, stride)


class FVDNetwork:
    """What FVD compares videos by: the network of this module, or StyleGAN-V's program.

    For the first, frames are resized to 224 x 224, bilinear, not antialiased and without keeping
    the aspect ratio, as TATS and OmniTokenizer do. The program resizes by itself, and takes pixels
    from 0 to 255.
    """

    def __init__(self, network: Any, device: torch.device | str = "cpu") -> None:
        self._network = network.to(device).eval()
        self._device = device
        self._is_program = not isinstance(network, I3D)
        self.file = PROGRAM_FILE if self._is_program else FILE
        """Name of the weights' file, as the field knows it."""

    @torch.no_grad()
    def features(self, video_BCTHW: Tensor) -> Tensor:
        """Return (B, 400) on the CPU, of videos in [-1, 1] of any size."""
        frames = video_BCTHW.shape[2]
        if frames < MIN_FRAMES:
            raise GeometryError(f"FVD needs clips of at least {MIN_FRAMES} frames, got {frames}.")
        video = video_BCTHW.to(self._device).float()
        if self._is_program:
            settings = {"rescale": True, "resize": True, "return_features": True}
            found: Tensor = self._network((video + 1) * 127.5, **settings)
        else:
            flat = rearrange(video, "b c t h w -> (b t) c h w")
            flat = F.interpolate(flat, size=(SIDE_PX, SIDE_PX), mode="bilinear")
            found = self._network(rearrange(flat, "(b t) c h w -> b c t h w", t=frames))
        return found.float().cpu()


def load_i3d(weights: WeightsPlace | None = None, device: torch.device | str = "cpu") -> FVDNetwork:
    """Load I3D from `weights`; None: from torch.hub's folder, whichever of the two files it has.

    Raises MetricUnavailableError if it has neither, WeightsError for another file.
    """
    path = _hub_file() if weights is None else find_weights(weights)
    if is_torchscript(path):
        data = path.read_bytes()  # once: what is run is what was hashed
        if hashlib.sha256(data).hexdigest() == PROGRAM_SHA256:
            return FVDNetwork(torch.jit.load(io.BytesIO(data), map_location=device), device)  # type: ignore[no-untyped-call]
    i3d = I3D()
    file = open_tensor_file(path)
    load_tensors(i3d, {key: file.read(key) for key in file.shapes}, str(path))
    return FVDNetwork(i3d, device)


def _hub_file() -> Path:
    for file in (FILE, PROGRAM_FILE):
        if hub_path(file).is_file():
            return hub_path(file)
    raise MetricUnavailableError(
        f"FVD is unavailable: {hub_path(FILE)} does not exist. Put {FILE} (I3D's state dict, as "
        f"VideoGPT and TATS distribute it) or {PROGRAM_FILE} (as StyleGAN-V does) at that place, "
        "or give it by --fvd-weights."
    )


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Return |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), in float64.

    Means are (D,), covariances (D, D), symmetric and positive semi-definite. The trace of the root
    is taken of the symmetric cov_a^(1/2) cov_b cov_a^(1/2), which has the same eigenvalues.
    Dowson and Landau (1982).
    """
    cov_a, cov_b = cov_a.double(), cov_b.double()
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    shared = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    shift = (mean_a.double() - mean_b.double()).square().sum()
    distance = shift + cov_a.trace() + cov_b.trace() - 2 * shared
    return max(0.0, float(distance))  # rounding can leave a little below zero


def frechet_of_features(a_ND: Tensor, b_ND: Tensor) -> float:
    """Return the Frechet distance of Gaussians fitted to two sets of features, (N, D) and (M, D).

    The covariance is the unbiased one. With fewer rows than features the distance is biased
    upwards: compare only numbers made with the same N. Raises GeometryError for fewer than 2 rows.
    """
    if min(len(a_ND), len(b_ND)) < 2:
        raise GeometryError(
            f"a Frechet distance needs at least 2 clips on either side, got {len(a_ND)} and "
            f"{len(b_ND)}."
        )
    return frechet_distance(*_fit(a_ND), *_fit(b_ND))


def _fit(features_ND: Tensor) -> tuple[Tensor, Tensor]:
    features = features_ND.double()
    return features.mean(0), torch.cov(features.T)

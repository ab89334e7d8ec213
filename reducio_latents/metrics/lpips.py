"""LPIPS: how different two pictures look. Zhang et al., arXiv 1801.03924.

The heads come with this package; the backbones are ImageNet's AlexNet and VGG16 as torchvision
publishes them, fetched by torch.hub to where it keeps them. torchvision is never imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from reducio_latents.core.choices import LpipsNet
from reducio_latents.core.fetching import WeightsPlace, find_weights
from reducio_latents.core.libraries import first_line
from reducio_latents.core.weight_files import load_tensors, open_tensor_file
from reducio_latents.errors import WeightsError
from reducio_latents.metrics.weights import MetricUnavailableError, download, hub_path

MEAN = (-0.030, -0.088, -0.188)
STD = (0.458, 0.448, 0.450)
NORM_EPS = 1e-8
HEADS_FILE = Path(__file__).with_name("lpips_heads.safetensors")
"""Weights of the channels, `NET.STAGE`; its licence lies beside it."""


@dataclass(frozen=True)
class Backbone:
    """Convolutions, each with a ReLU, and max-poolings, numbered as torchvision's `features`."""

    file: str
    pool: int
    """Size of the max-poolings; their stride is 2."""
    layers: tuple[tuple[int, int, int, int] | None, ...]
    """(channels, kernel, stride, padding) of a convolution; None: a max-pooling."""
    taken_after: tuple[int, ...]
    """The five ReLUs whose outputs are compared."""

    @property
    def url(self) -> str:
        return f"https://download.pytorch.org/models/{self.file}"

    def build(self) -> nn.Sequential:
        modules: list[nn.Module] = []
        channels = 3
        for layer in self.layers:
            if layer is None:
                modules.append(nn.MaxPool2d(self.pool, 2))
            else:
                modules += [nn.Conv2d(channels, *layer), nn.ReLU()]
                channels = layer[0]
        return nn.Sequential(*modules)


_VGG_WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)

BACKBONES: dict[str, Backbone] = {
    "alex": Backbone(
        file="alexnet-owt-7be5be79.pth",
        pool=3,
        layers=(
            (64, 11, 4, 2), None, (192, 5, 1, 2), None,
            (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1),
        ),
        taken_after=(1, 4, 7, 9, 11),
    ),
    "vgg": Backbone(
        file="vgg16-397923af.pth",
        pool=2,
        layers=tuple((width, 3, 1, 1) if width else None for width in _VGG_WIDTHS),
        taken_after=(3, 8, 15, 22, 29),
    ),
}  # fmt: skip


class LPIPS(nn.Module):
    """Distance of two batches of pictures (N, 3, H, W) in [-1, 1]: (N,), 0 where they are equal."""

    mean: Tensor
    std: Tensor

    def __init__(self, net: LpipsNet) -> None:
        super().__init__()
        self.features = BACKBONES[net].build()
        heads = open_tensor_file(HEADS_FILE)
        for stage, number in enumerate(BACKBONES[net].taken_after):
            self.register_buffer(f"head_{number}", heads.read(f"{net}.{stage}").clone())
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(STD)[:, None, None])
        self.requires_grad_(False)

    def forward(self, x_NCHW: Tensor, y_NCHW: Tensor) -> Tensor:
        distance = x_NCHW.new_zeros(x_NCHW.shape[0])
        h = (torch.cat([x_NCHW, y_NCHW]) - self.mean) / self.std
        for number, layer in enumerate(self.features):
            h = layer(h)
            head = getattr(self, f"head_{number}", None)
            if head is not None:
                x, y = (h * torch.rsqrt(NORM_EPS + h.square().sum(1, keepdim=True))).chunk(2)
                apart = torch.einsum("nchw,c->nhw", (x - y).square(), head)
                distance = distance + apart.mean((1, 2))
        return distance


def load_lpips(net: LpipsNet, weights: WeightsPlace | None = None) -> LPIPS:
    """Build LPIPS with `weights`, the backbone's state dict; None: the file in torch.hub's folder.

    If the folder lacks it, it is downloaded and proven by the hash in its name. Raises
    MetricUnavailableError where it cannot be had, WeightsError for another file.
    """
    network, backbone = LPIPS(net), BACKBONES[net]
    path = hub_path(backbone.file) if weights is None else find_weights(weights)
    if weights is None and not path.is_file():
        try:
            download(backbone.url, path)
        # The network, the disk and torch.hub's check of the hash raise what they like.
        except Exception as err:
            raise MetricUnavailableError(
                f"LPIPS ({net}) is unavailable: {path} does not exist and could not be fetched "
                f"({first_line(err)}). Download {backbone.url} to that place, or give the file by "
                "--lpips-weights."
            ) from err
    file, start = open_tensor_file(path), "features."
    features = {key: file.read(key) for key in file.shapes if key.startswith(start)}
    try:
        load_tensors(nn.ModuleDict({"features": network.features}), features, str(path))
    except WeightsError as err:
        reason = str(err).removeprefix(f"{path}: ").rstrip(".")
        raise WeightsError(
            f"{path} does not hold the backbone that torchvision publishes: {reason}. "
            f"Take {backbone.url}."
        ) from err
    return network.eval()

"""LPIPS: how different two pictures look. Zhang et al., arXiv 1801.03924.

The heads come with the torchmetrics package; the backbones are ImageNet's AlexNet and VGG16 as
torchvision publishes them, found where torch.hub keeps them. Neither package is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from reducio_latents.errors import WeightsError
from reducio_latents.metrics.weights import MetricUnavailableError, hub_path, read_tensors

Net = Literal["alex", "vgg"]
MEAN = (-0.030, -0.088, -0.188)
STD = (0.458, 0.448, 0.450)
EPS = 1e-8


@dataclass(frozen=True)
class Conv:
    """One convolution of a backbone."""

    number: int
    """Its place in torchvision's `features`."""
    channels: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1


@dataclass(frozen=True)
class Backbone:
    """Stages of convolutions with a max-pooling between; features are taken after each stage."""

    file: str
    pool: int
    """Size of the max-poolings; their stride is 2."""
    pooled: tuple[int, ...]
    """Stages that begin with one."""
    stages: tuple[tuple[Conv, ...], ...]

    @property
    def url(self) -> str:
        return f"https://download.pytorch.org/models/{self.file}"


def _vgg_stages() -> tuple[tuple[Conv, ...], ...]:
    numbers = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
    widths = (64, 128, 256, 512, 512)
    return tuple(
        tuple(Conv(number, width) for number in stage)
        for stage, width in zip(numbers, widths, strict=True)
    )


BACKBONES: dict[str, Backbone] = {
    "alex": Backbone(
        "alexnet-owt-7be5be79.pth",
        3,
        (1, 2),
        (
            (Conv(0, 64, kernel=11, stride=4, padding=2),),
            (Conv(3, 192, kernel=5, padding=2),),
            (Conv(6, 384),),
            (Conv(8, 256),),
            (Conv(10, 256),),
        ),
    ),
    "vgg": Backbone("vgg16-397923af.pth", 2, (1, 2, 3, 4), _vgg_stages()),
}


class LPIPS(nn.Module):
    """Distance of two batches of pictures (N, 3, H, W) in [-1, 1]: (N,), 0 where they are equal."""

    mean: Tensor
    std: Tensor

    def __init__(self, net: Net) -> None:
        super().__init__()
        backbone = BACKBONES[net]
        self.stages = nn.ModuleList()
        channels = 3
        for number, convs in enumerate(backbone.stages):
            pools = number in backbone.pooled
            layers: list[nn.Module] = [nn.MaxPool2d(backbone.pool, 2)] if pools else []
            for c in convs:
                layers += [
                    nn.Conv2d(channels, c.channels, c.kernel, c.stride, c.padding),
                    nn.ReLU(),
                ]
                channels = c.channels
            self.stages.append(nn.Sequential(*layers))
        widths = [convs[-1].channels for convs in backbone.stages]
        self.heads = nn.ParameterList(torch.empty(width) for width in widths)
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(STD)[:, None, None])
        self.requires_grad_(False)

    def forward(self, x_NCHW: Tensor, y_NCHW: Tensor) -> Tensor:
        distance = x_NCHW.new_zeros(x_NCHW.shape[0])
        h = (torch.cat([x_NCHW, y_NCHW]) - self.mean) / self.std
        for stage, head in zip(self.stages, self.heads, strict=True):
            h = stage(h)
            x, y = (h * torch.rsqrt(EPS + h.square().sum(1, keepdim=True))).chunk(2)
            distance = distance + torch.einsum("nchw,c->nhw", (x - y).square(), head).mean((1, 2))
        return distance


def load_lpips(net: Net, weights: Path | None = None) -> LPIPS:
    """Build LPIPS with `weights`, the backbone's state dict; None: the file in torch.hub's folder.

    Raises MetricUnavailableError where weights cannot be had, WeightsError for another file.
    """
    network, backbone = LPIPS(net), BACKBONES[net]
    path = weights if weights is not None else _backbone_path(net)
    heads, tensors = read_tensors(_heads_path(net)), read_tensors(path)
    try:
        for i, head in enumerate(network.heads):
            head.copy_(heads[f"lin{i}.model.1.weight"].flatten())
        numbers = [conv.number for convs in backbone.stages for conv in convs]
        modules = [m for m in network.stages.modules() if isinstance(m, nn.Conv2d)]
        for number, module in zip(numbers, modules, strict=True):
            state = {name: tensors[f"features.{number}.{name}"] for name in ("weight", "bias")}
            module.load_state_dict(state)
    except (KeyError, RuntimeError) as err:
        raise WeightsError(
            f"{path} does not hold the backbone that torchvision publishes ({err}). "
            f"Take {backbone.url}."
        ) from err
    return network.eval()


def _backbone_path(net: Net) -> Path:
    backbone = BACKBONES[net]
    path = hub_path(backbone.file)
    if not path.is_file():
        raise MetricUnavailableError(
            f"LPIPS ({net}) is unavailable: {path} is not there. Download {backbone.url} to that "
            "place, or give the file by --lpips-weights."
        )
    return path


def _heads_path(net: Net) -> Path:
    spec = find_spec("torchmetrics")
    if spec is None or spec.origin is None:
        raise MetricUnavailableError(
            "LPIPS is unavailable: it takes its heads from torchmetrics, which is not installed. "
            "pip install 'reducio-latents[train]'."
        )
    path = Path(spec.origin).parent / "functional" / "image" / "lpips_models" / f"{net}.pth"
    if not path.is_file():
        raise MetricUnavailableError(
            f"LPIPS is unavailable: torchmetrics has no {path.name} at {path.parent}. "
            "Install torchmetrics 1.4 to 1.9."
        )
    return path

"""Autoencoders other than Reducio-VAE behind the `Autoencoder` protocol.

A network gives moments and takes samples; here it is put on a device, named, and fingerprinted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from reducio_latents.autoencoders.pretrained import digest_of, quiet
from reducio_latents.autoencoders.protocol import Autoencoder, LoadOptions, identity_hash, lay_out
from reducio_latents.core.devices import usable_device
from reducio_latents.core.fetching import WeightsPlace, find_weights
from reducio_latents.core.gaussian import final_channels, undo_final_rule
from reducio_latents.core.geometry import LatentGeometry
from reducio_latents.core.values import Posterior
from reducio_latents.core.weight_files import check_keys, open_tensor_file, shapes_of
from reducio_latents.errors import ConfigError, GeometryError, WeightsError
from reducio_latents.vae.model import check_pixels
from reducio_latents.vae.tiling import Tiling

NetworkT = TypeVar("NetworkT", bound=nn.Module)


class Network(Protocol):
    """A VAE in torch."""

    geometry: LatentGeometry

    def check_clip(self, frames: int, height: int, width: int) -> None:
        """Raise GeometryError, naming a size that would do, unless a clip (T, H, W) fits."""

    def encode(self, video_BCTHW: Tensor) -> Posterior:
        """Return the posterior of pixels in [-1, 1]."""

    def decode(self, z_BDthw: Tensor) -> Tensor:
        """Return the video of samples, pixels about [-1, 1]."""

    def tile(self, tiling: Tiling | None) -> None:
        """Have frames cut from now on, or not; raise ConfigError where that cannot be."""


class NetworkAutoencoder(Autoencoder):
    """A `Network` on one device, for inference; its weights are those of `model`.

    `halves` are the submodules that only encoding, and only decoding, needs. `identity` is what the
    fingerprint is made of beside the weights; `described` and `remarks` are parts of the config.
    `own_tiling` is how frames are cut unless told otherwise.
    """

    model: nn.Module

    def __init__(
        self,
        name: str,
        network: Network,
        model: nn.Module,
        options: LoadOptions,
        *,
        halves: tuple[Sequence[str], Sequence[str]],
        final_rule: Mapping[str, Any],
        identity: Mapping[str, Any],
        described: Mapping[str, Any],
        remarks: Mapping[str, Any] | None = None,
        own_tiling: Tiling | None = None,
    ) -> None:
        self.name, self.network, self.model = name, network, model
        self.geometry, self.check_clip = network.geometry, network.check_clip
        self.final_rule = dict(final_rule)
        channels = final_channels(final_rule, network.geometry.channels)
        self._final = replace(network.geometry, channels=channels)
        self.weights_sha256 = digest_of(model)  # of float32, so that precision does not change it
        self.tiling = own_tiling if options.tiling == "auto" else options.tiling
        if self.tiling is not None or own_tiling is not None:
            network.tile(self.tiling)
        _put_to_work(model, options, *halves)
        weight = next(model.parameters())
        self.device, self.dtype, self.options = weight.device, weight.dtype, options
        self.fingerprint = identity_hash(**identity, weights_sha256=self.weights_sha256)
        self.described, self.remarks = described, remarks or {}
        self.architecture = str(described["architecture"])

    def with_dtype(self, dtype: torch.dtype) -> Self:
        """Return a copy that computes in another precision."""
        twin = deepcopy(self)
        with quiet():
            twin.model.to(dtype)
        twin.dtype, twin.options = dtype, replace(self.options, dtype=dtype)
        return twin

    @torch.inference_mode()
    def encode(self, video_BCTHW: Tensor) -> Posterior:
        """Return the posterior, float32.

        Raises GeometryError for a size that does not fit, PixelError for other pixels than floats
        in [-1, 1].
        """
        check_pixels("video", video_BCTHW, ndim=5)
        size = video_BCTHW.shape[2:]
        self.check_clip(*size)
        video = video_BCTHW.to(self.device, self.dtype, non_blocking=True)
        found = self.network.encode(video)
        wanted = (len(video), *self.geometry.latent_shape(*size))
        if tuple(found.mean.shape) != wanted:
            raise GeometryError(
                f"{self.architecture} gave latents {tuple(found.mean.shape)} for clips of "
                f"{'x'.join(map(str, size))}, not {wanted}. Its config and its weights disagree."
            )
        return found

    @torch.inference_mode()
    def decode(self, latents: Tensor, content_image: Tensor | None = None) -> Tensor:
        """Return the video of final latents, float32; a content image is not needed or used."""
        self._final.check_latents(latents.shape)
        z = undo_final_rule(self.final_rule, latents.to(self.device)).to(self.dtype)
        return self.network.decode(z).float()


def _put_to_work(
    model: nn.Module, options: LoadOptions, encoding: Sequence[str], decoding: Sequence[str]
) -> None:
    """Place a model as `options` say; ConfigError for what it cannot do."""
    whole = options.compiles_whole(type(model).__name__)
    dropped = {"encoder": decoding, "decoder": encoding}.get(options.parts, ())
    for path in dropped:
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, None)
    model.eval().requires_grad_(False)
    with quiet():
        model.to(usable_device(options.device), options.dtype)
    lay_out(model, options)
    for path in (*encoding, *decoding):
        if whole and path not in dropped:
            model.get_submodule(path).compile(dynamic=False)


def own_network(
    name: str,
    model: Any,
    options: LoadOptions,
    *,
    halves: tuple[Sequence[str], Sequence[str]],
    final_rule: Mapping[str, Any],
) -> NetworkAutoencoder:
    """Put a network of our own code, which is its own `Network`, to work as `options` say."""
    architecture, _, rest = name.partition(":")
    return NetworkAutoencoder(
        name,
        model,
        model,
        options,
        halves=halves,
        final_rule=final_rule,
        identity={"architecture": architecture, "final_rule": dict(final_rule)},
        described={"architecture": architecture},
        remarks={"random_weights": bool(rest), "final_rule": dict(final_rule)},
    )


HINT = "To see the way through without them, add :random to the name."


def build_network(
    make: Callable[[], NetworkT],
    name: str,
    weights: WeightsPlace | None,
    *,
    ignored: tuple[str, ...] = (),
) -> NetworkT:
    """Make a network and load `weights` into it, every key, as float32.

    A name `architecture:random[:SEED]` leaves it untrained instead. Keys of the file that begin
    with one of `ignored` belong to training. Raises WeightsError for any other difference, and
    where no weights are given; ConfigError for a name that cannot be read.
    """
    architecture, _, rest = name.partition(":")
    if rest:
        return untrained(make, random_seed(name, rest, weights))
    if weights is None:
        raise WeightsError(f"{architecture} needs its weights: give the published file. {HINT}")
    file = open_tensor_file(find_weights(weights))
    with torch.device("meta"):
        model = make()
    found = {key: shape for key, shape in file.shapes.items() if not key.startswith(ignored)}
    check_keys(f"{weights} ({name})", found, shapes_of(model.state_dict()))
    model.load_state_dict({key: file.read(key).clone() for key in found}, strict=True, assign=True)
    return model.float()


def untrained(make: Callable[[], NetworkT], seed: int) -> NetworkT:
    """Make a network whose weights are those of `seed`; other random numbers stay as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def random_seed(name: str, rest: str, weights: WeightsPlace | None) -> int:
    """Return the seed of a name whose part after the first colon, `rest`, is `random[:SEED]`.

    Raises ConfigError for any other rest, and where weights are given as well.
    """
    match = re.fullmatch(r"random(?::(\d+))?", rest)
    if match is None:
        raise ConfigError(f"{name!r} is not a model; after the colon write random or random:SEED.")
    if weights is not None:
        raise ConfigError(f"{name} takes no weights; leave out {weights}.")
    return int(match[1] or 0)

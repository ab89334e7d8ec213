"""What autoencoders of our own code have in common behind the `Autoencoder` protocol.

A network gives moments and takes samples; here it is put on a device, named, and fingerprinted.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from reducio_latents.autoencoders.placing import lay_out, precision_of
from reducio_latents.autoencoders.pretrained import check_keys, digest_of
from reducio_latents.autoencoders.protocol import LoadOptions
from reducio_latents.core.devices import usable_device
from reducio_latents.core.gaussian import final_latents, undo_final_rule
from reducio_latents.core.geometry import LatentGeometry
from reducio_latents.core.values import Posterior
from reducio_latents.errors import ConfigError, WeightsError
from reducio_latents.vae.weight_files import open_tensor_file

ModelT = TypeVar("ModelT", bound=nn.Module)


class Network(Protocol):
    """A VAE in torch. Modules that `parts` leave out are set to None by `keep`."""

    def moments(self, video_BCTHW: Tensor) -> Tensor:
        """Return mean and log-variance, (B, 2D, t, h, w), of pixels in [-1, 1]."""

    def pixels(self, z_BDthw: Tensor) -> Tensor:
        """Return the video of samples, pixels about [-1, 1]."""

    def halves(self) -> tuple[Iterable[str], Iterable[str]]:
        """Return the names of the submodules that only encoding, and only decoding, needs."""


class NetworkAutoencoder:
    """A `Network` on one device, for inference."""

    needs_content = False

    def __init__(
        self,
        name: str,
        model: nn.Module,
        *,
        geometry: LatentGeometry,
        final_rule: Mapping[str, Any],
        check_clip: Callable[[int, int, int], None],
        options: LoadOptions,
    ) -> None:
        self.name = name
        self.geometry = geometry
        self.final_rule = dict(final_rule)
        self.check_clip = check_clip
        self.weights_sha256 = digest_of(model)  # of float32, so that precision does not change it
        self.model = prepare(model, options)
        self._options = options
        self._network: Network = model  # type: ignore[assignment]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def fingerprint(self) -> str:
        identity = {
            "architecture": self.architecture,
            "final_rule": self.final_rule,
            "weights_sha256": self.weights_sha256,
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    @property
    def architecture(self) -> str:
        return self.name.partition(":")[0]

    @property
    def config(self) -> dict[str, Any]:
        return {
            "architecture": self.architecture,
            "fingerprint": self.fingerprint,
            "weights_sha256": self.weights_sha256,
            "random_weights": ":random" in self.name,
            "final_rule": self.final_rule,
            "tiling": None,
            "precision": self.precision,
        }

    @property
    def precision(self) -> dict[str, Any]:
        return precision_of(self.device, self.dtype, self._options)

    @torch.inference_mode()
    def encode(self, video_BCTHW: Tensor) -> Posterior:
        """Return the posterior, float32; raise GeometryError for a size that does not fit."""
        self.check_clip(*video_BCTHW.shape[2:])
        video = video_BCTHW.to(self.device, self.dtype, non_blocking=True)
        return Posterior.of_moments(self._network.moments(video).float()).clamped()

    def final_latents(self, posterior: Posterior, noise: Tensor | None = None) -> Tensor:
        return final_latents(posterior, noise, self.final_rule)

    @torch.inference_mode()
    def decode(self, latents: Tensor, content_image: Tensor | None = None) -> Tensor:
        """Return the video of final latents, float32; a content image is not needed or used."""
        z = undo_final_rule(self.final_rule, latents.to(self.device)).to(self.dtype)
        return self._network.pixels(z).float()


def prepare(model: nn.Module, options: LoadOptions) -> nn.Module:
    """Put a model to work as `options` say; raise ConfigError for what it cannot do."""
    if options.tiling not in ("auto", None):
        raise ConfigError(f"{type(model).__name__} cannot be tiled. Use tiling=None.")
    encoding, decoding = model.halves()  # type: ignore[operator]
    dropped = {"encoder": decoding, "decoder": encoding}.get(options.parts, ())
    for path in dropped:
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, None)
    model.eval().requires_grad_(False)
    model.to(usable_device(options.device), options.dtype)
    lay_out(model, options)
    if options.compiles_whole(type(model).__name__):
        for path in (*encoding, *decoding):
            if path not in dropped:
                model.get_submodule(path).compile(dynamic=False)
    return model


HINT = "To see the way through without them, add :random to the name."


def build(
    make: Callable[[], ModelT], name: str, weights: Path | None, *, ignored: tuple[str, ...] = ()
) -> ModelT:
    """Make a network and load `weights` into it, every key, as float32.

    A name `architecture:random[:SEED]` leaves it untrained instead. Keys of the file that begin
    with one of `ignored` belong to training. Raises WeightsError for any other difference, and
    where no weights are given; ConfigError for a name that cannot be read.
    """
    architecture, _, rest = name.partition(":")
    if rest:
        return _untrained(make, name, rest, weights)
    if weights is None:
        raise WeightsError(f"{architecture} needs its weights: give the published file. {HINT}")
    file = open_tensor_file(weights)
    with torch.device("meta"):
        model = make()
    own = model.state_dict()
    found = {key for key in file.shapes if not key.startswith(ignored)}
    check_keys(
        f"{weights} ({name})",
        missing=own.keys() - found,
        unexpected=found - own.keys(),
        mismatched=(key for key in own.keys() & found if own[key].shape != file.shapes[key]),
    )
    model.load_state_dict({key: file.read(key).clone() for key in own}, strict=True, assign=True)
    return model.float()


def _untrained(make: Callable[[], ModelT], name: str, rest: str, weights: Path | None) -> ModelT:
    seed = random_seed(name, rest, weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def random_seed(name: str, rest: str, weights: Path | None) -> int:
    """Return the seed of a name whose part after the first colon, `rest`, is `random[:SEED]`.

    Raises ConfigError for any other rest, and where weights are given as well.
    """
    match = re.fullmatch(r"random(?::(\d+))?", rest)
    if match is None:
        raise ConfigError(f"{name!r} is not a model; after the colon write random or random:SEED.")
    if weights is not None:
        raise ConfigError(f"{name} takes no weights; leave out {weights}.")
    return int(match[1] or 0)

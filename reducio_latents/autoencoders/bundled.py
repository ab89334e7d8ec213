"""Models that come with the package: a folder of weights each, `bundled/NAME`.

A source checkout may lack them; `tools/train_tiny.py` makes such a folder.
"""

from __future__ import annotations

from pathlib import Path

from reducio_latents.autoencoders.protocol import LoadOptions
from reducio_latents.autoencoders.reducio import ReducioAutoencoder, load_any_width
from reducio_latents.core.fetching import WeightsPlace
from reducio_latents.errors import ConfigError, WeightsError

BUNDLED = Path(__file__).with_name("bundled")


def load_bundled(
    name: str, weights: WeightsPlace | None, options: LoadOptions
) -> ReducioAutoencoder:
    """Load a model that comes with the package; WeightsError where this build has none."""
    if ":" in name:
        raise ConfigError(f"there is no autoencoder {name!r}; {name.partition(':')[0]} takes no :.")
    if weights is not None:
        raise ConfigError(
            f"{name} brings its own weights; to load {weights}, use the model reducio."
        )
    folder = BUNDLED / name
    if not folder.is_dir():
        raise WeightsError(
            f"{name} is not bundled in this build: there is no {folder}. Train it, "
            "`python tools/train_tiny.py VIDEOS --out DIR`, and use the model reducio with the "
            f"weights DIR/{name}, or copy that folder there. To try things without weights, use "
            "the model reducio-random:32."
        )
    model = load_any_width("reducio", folder, options)
    model.name = name
    return model

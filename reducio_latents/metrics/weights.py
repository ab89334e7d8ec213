"""Where metrics have their weights, and how they say that they have none."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from reducio_latents.core.fetching import one_at_a_time
from reducio_latents.errors import ConfigError

log = logging.getLogger(__name__)


class MetricUnavailableError(ConfigError):
    """A metric has no weights here. Its message says where they come from; there is no number."""


def hub_path(file: str) -> Path:
    """Return where torch.hub keeps a file: below TORCH_HOME, or ~/.cache/torch."""
    return Path(torch.hub.get_dir()) / "checkpoints" / file


def download(url: str, path: Path) -> None:
    """Have torch.hub download a file and check the hash in its name; one process of a machine."""
    match = torch.hub.HASH_REGEX.search(path.name)
    with one_at_a_time(path.with_name(f"{path.name}.lock")):
        if not path.is_file():
            log.warning("fetching %s to %s", url, path)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), match and match[1])

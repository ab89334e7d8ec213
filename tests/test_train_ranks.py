"""How a process finds its device and the others of its run."""

from __future__ import annotations

import pytest
import torch

from reducio_latents.errors import ConfigError
from reducio_latents.train.ranks import join_ranks


def test_more_processes_than_gpus_are_told_how_many_to_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with (
        pytest.raises(ConfigError, match=r"process 3 .* sees 2 GPUs.*--nproc_per_node=2"),
        join_ranks(),
    ):
        pass


def test_a_world_size_that_is_not_torchruns_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"WORLD_SIZE is 2.*torchrun"), join_ranks():
        pass

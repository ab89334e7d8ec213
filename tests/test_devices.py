"""A device that is not there is one clear error, before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from reducio_latents.core.devices import usable_device
from reducio_latents.encode import EncodeOptions
from reducio_latents.errors import ConfigError
from tests.corpora import write_video
from tests.test_encode_flow import encode


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "", "meta", "mps", "xpu", "hpu", "cuda:99"])
def test_a_device_that_is_not_here_is_named_with_those_that_are(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^device '{name}' .*\. Use auto, cpu"):
        usable_device(name)
    with pytest.raises(ConfigError, match=f"device '{name}'"):
        _ = EncodeOptions(device=name).torch_device


def test_how_many_gpus_there_are_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"there are 2 GPUs.*Use auto, cpu, cuda:0, cuda:1\."):
        usable_device("cuda:2")


def test_a_run_on_such_a_device_writes_nothing(tmp_path: Path) -> None:
    write_video(tmp_path / "corpus" / "v.mp4", 1.1)
    with pytest.raises(ConfigError, match="device 'mps' cannot be used here"):
        encode(tmp_path / "corpus", tmp_path / "store", device="mps")
    assert not (tmp_path / "store").exists()
    assert usable_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")

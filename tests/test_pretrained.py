"""Models by Hub name: what is fetched of a repository, and what is not."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from reducio_latents.autoencoders.checkpoint import read_description
from reducio_latents.autoencoders.pretrained import find_model, read_config
from reducio_latents.errors import ConfigError, WeightsError
from reducio_latents.metrics.i3d import load_i3d
from reducio_latents.vae.weights import open_state_dict

hub = pytest.importorskip("huggingface_hub")


class Repository:
    """Stands for the Hub: gives the files that match, into one folder."""

    def __init__(self, folder: Path, files: Sequence[str]) -> None:
        self.folder, self.files = folder, files
        self.revision: str | None = None

    def snapshot_download(
        self,
        name: str,
        *,
        revision: str | None,
        allow_patterns: Sequence[str],
        ignore_patterns: Sequence[str] = (),
        etag_timeout: float,
    ) -> str:
        assert name == "acme/model"
        self.revision = revision
        for file in hub.utils.filter_repo_objects(
            self.files, allow_patterns=list(allow_patterns), ignore_patterns=list(ignore_patterns)
        ):
            (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / file).write_text("{}")
        return str(self.folder)

    def fetched(self) -> set[str]:
        found = (p for p in self.folder.rglob("*") if p.is_file())
        return {p.relative_to(self.folder).as_posix() for p in found}


@pytest.fixture
def repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    def make(*files: str) -> Repository:
        made = Repository(tmp_path / "snapshot", files)
        monkeypatch.setattr(hub, "snapshot_download", made.snapshot_download)
        return made

    return make


def test_of_several_formats_only_safetensors_are_fetched(repository: Any) -> None:
    made = repository(
        "config.json", "model.safetensors", "model.fp16.safetensors", "pytorch_model.bin",
        "open_clip_model.safetensors", "flax_model.msgpack", "tokenizer.json", "spiece.model",
    )  # fmt: skip
    assert find_model("acme/model@v2") == made.folder
    assert made.fetched() == {"config.json", "model.safetensors", "tokenizer.json", "spiece.model"}
    assert made.revision == "v2"


def test_older_repositories_give_their_bin_files(repository: Any) -> None:
    made = repository(
        "config.json", "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin",
        "pytorch_model.bin.index.json", "tf_model.h5",
    )  # fmt: skip
    find_model("acme/model")
    assert made.fetched() == {
        "config.json", "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin",
        "pytorch_model.bin.index.json",
    }  # fmt: skip


def test_of_a_whole_pipeline_only_the_part_is_fetched(repository: Any) -> None:
    made = repository(
        "model_index.json", "whole_pipeline.safetensors", "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors", "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.bin",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    )  # fmt: skip
    assert find_model("acme/model", part="vae") == made.folder / "vae"
    weights = {name for name in made.fetched() if not name.endswith(".json")}
    assert weights == {"vae/diffusion_pytorch_model.safetensors"}


def test_a_text_encoder_of_a_pipeline_comes_with_its_tokenizer(repository: Any) -> None:
    made = repository(
        "model_index.json", "text_encoder/config.json", "text_encoder/model.safetensors",
        "tokenizer/spiece.model", "tokenizer/tokenizer_config.json", "transformer/x.safetensors",
    )  # fmt: skip
    assert find_model("acme/model", part="text_encoder") == made.folder / "text_encoder"
    assert made.fetched() == set(made.files) - {"transformer/x.safetensors"}


def test_a_path_is_never_taken_for_a_hub_name(repository: Any, tmp_path: Path) -> None:
    repository("config.json")
    for name in ("./acme/model", "/acme/model", "~/acme", "model", "a/b/c", ""):
        with pytest.raises(ConfigError, match="no model at"):
            find_model(name)
    folder = tmp_path / "own"
    folder.mkdir()
    assert find_model(str(folder)) == folder


@pytest.mark.parametrize("kind", ["a pipe", "a device"])
def test_weights_and_configs_that_are_no_files_are_refused_at_once(
    tmp_path: Path, kind: str
) -> None:
    def put(path: Path) -> Path:
        path.parent.mkdir(exist_ok=True)
        os.mkfifo(path) if kind == "a pipe" else path.symlink_to("/dev/zero")
        return path

    config, beside = put(tmp_path / "a" / "config.json"), put(tmp_path / "b" / "model.safetensors")
    (beside.parent / "config.json").write_text("{}")
    reading: list[Callable[[], object]] = [
        lambda: open_state_dict(put(tmp_path / "x.ckpt")),
        lambda: load_i3d(put(tmp_path / "x.pth")),
        lambda: read_config(config.parent),
        lambda: read_config(beside.parent),
    ]
    for read in reading:
        with pytest.raises(WeightsError, match=f"cannot be read: it is {kind}, not a file"):
            read()
    assert read_description(config.parent) is None

"""Weights by name: of a stub of the Hub, once a machine; and every way in which there are none."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save

from reducio_latents.autoencoders import load_autoencoder
from reducio_latents.autoencoders.pretrained import find_model
from reducio_latents.autoencoders.reducio import PUBLISHED_SIZES
from reducio_latents.cli import main
from reducio_latents.core.fetching import find_weights, hub_name
from reducio_latents.errors import ConfigError, WeightsError
from reducio_latents.metrics import lpips
from reducio_latents.metrics.weights import MetricUnavailableError
from reducio_latents.vae import ReducioVAEConfig
from reducio_latents.vae.weights import random_state_dict
from tests.forked import Python
from tests.hub_stub import HubStub, serving

constants = pytest.importorskip("huggingface_hub.constants")

NARROW = ReducioVAEConfig(width=8, content_width=8, decoder_width=8)
PUBLISHED = "reducio-ft4-fs32-attn23.ckpt"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The same weights as published ones are, and as `import-checkpoint` writes them."""
    state = random_state_dict(NARROW)
    tensors = {key: state.read(key) for key in state.shapes}
    path = tmp_path_factory.mktemp("published") / PUBLISHED
    torch.save({"state_dict": tensors}, path)
    return {"ckpt": path.read_bytes(), "safetensors": save(tensors)}


@pytest.fixture
def stub(
    files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[HubStub]:
    repositories = {
        "microsoft/Reducio-VAE": {PUBLISHED: files["ckpt"], "reducio-ft2-fs32-attn23.ckpt": b"2"},
        "acme/narrow": {"model.safetensors": files["safetensors"]},
        "acme/odd": {"mine.ckpt": files["ckpt"], "README.md": b"#"},
        "acme/parts": {
            "config.json": b"{}", "model.safetensors": b"w", "tokenizer.json": b"{}",
            "small/model.safetensors": files["safetensors"],
        },
        "acme/bare": {"README.md": b"#"},
    }  # fmt: skip
    with serving(repositories) as stub:
        monkeypatch.setattr(constants, "ENDPOINT", stub.url)
        template = stub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setitem(PUBLISHED_SIZES, "reducio-ft4-fs32", NARROW)
        monkeypatch.chdir(tmp_path)
        for name, value in stub.environment.items():
            monkeypatch.setenv(name, value)
        yield stub


def refusal(place: str, **settings: Any) -> str:
    with pytest.raises(WeightsError) as refused:
        find_weights(place, **settings)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_the_published_weights_come_by_themselves_and_once(
    stub: HubStub, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub.cut_next = True  # of the first file: it is gone on with where it broke off
    first = load_autoencoder("reducio-ft4-fs32")
    (tmp_path / "own.ckpt").write_bytes(files["ckpt"])
    assert first.config == load_autoencoder("reducio", tmp_path / "own.ckpt").config
    assert stub.gets(PUBLISHED) == 2
    asked = len(stub.asked)
    load_autoencoder("reducio-ft4-fs32")
    assert len(stub.asked) == asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for place in ("microsoft/Reducio-VAE", f"hf://microsoft/Reducio-VAE/{PUBLISHED}"):
        found = find_weights(place, usual=[PUBLISHED])
        assert found.read_bytes() == files["ckpt"]


def test_ranks_of_a_machine_ask_once(stub: HubStub, tmp_path: Path) -> None:
    code = """
from reducio_latents.core.fetching import find_weights
print(find_weights("hf://acme/narrow"))
"""
    environment = os.environ | stub.environment | {"HF_HOME": str(tmp_path / "home")}
    environment["HF_HUB_OFFLINE"] = "0"
    ranks = [Python(["-c", code], environment) for _ in range(2)]
    found = {rank.communicate()[0].strip() for rank in ranks}
    assert len(found) == 1, [rank.communicate() for rank in ranks]
    path = Path(*found)
    assert path.is_relative_to(tmp_path / "home")
    assert stub.gets("model.safetensors") == 1
    asked = len(stub.asked)
    assert Python(["-c", code], environment | {"HF_HUB_OFFLINE": "1"}).wait() == 0
    assert len(stub.asked) == asked < 8


def test_a_repository_is_weights(stub: HubStub, files: dict[str, bytes], tmp_path: Path) -> None:
    for place in ("hf://acme/narrow@main", "acme/narrow", "acme/odd", "hf://acme/parts/small"):
        assert find_weights(place).read_bytes() in files.values()
    stub.repositories = {}  # what the cache has serves, also if the Hub has forgotten it
    for place in ("acme/odd", "hf://acme/narrow"):
        folder = tmp_path / place.replace("/", "-")
        result = CliRunner().invoke(main, ["import-checkpoint", place, str(folder)])
        assert result.exit_code == 0, result.output
        assert (folder / "model.safetensors").is_file()


def test_a_model_in_a_folder_is_asked_for_once(stub: HubStub) -> None:
    folder = find_model("hf://acme/parts")
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors"}
    asked = len(stub.asked)
    assert find_model("acme/parts") == folder
    assert len(stub.asked) == asked


def test_what_cannot_be_had_is_one_line(stub: HubStub, monkeypatch: pytest.MonkeyPatch) -> None:
    stub.gated.add("acme/gated")
    for place, words in {
        "hf://acme/none": "no such repository, or it is private.*HF_TOKEN",
        "acme/none": "no file or folder here.*no such repository",
        "hf://acme/gated/x.ckpt": "terms must be accepted on https://huggingface.co/acme/gated",
        "hf://acme/narrow@v9": "no revision v9",
        "hf://acme/narrow/x.ckpt": r"has no x\.ckpt; its weights are model\.safetensors",
        "hf://microsoft/Reducio-VAE": "its weights are reducio-ft2.*hf://microsoft.*/FILE",
        "hf://acme/bare": "it has no weights at all",
        "hf://acme": "write hf://OWNER/NAME",
        "hf://datasets/acme/x": "write hf://OWNER/NAME",
        "hf://acme/narrow/../x": "write hf://OWNER/NAME",
        "https://x.org/a.ckpt": "not read from https://",
    }.items():
        assert re.search(words, refusal(place))
    stub.damage = True
    assert "came damaged: its SHA-256" in refusal("hf://acme/narrow")
    stub.damage = False
    assert find_weights("hf://acme/narrow").read_bytes()  # nothing of it was left
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert f"take {PUBLISHED} from https://huggingface.co/microsoft" in refusal(
        "hf://microsoft/Reducio-VAE", usual=[PUBLISHED]
    )
    with pytest.raises(WeightsError, match=rf"HF_HUB_OFFLINE.*take {PUBLISHED}.*give its path"):
        load_autoencoder("reducio-ft4-fs32")


def test_a_path_wins_and_a_mistyped_one_is_no_download(stub: HubStub, tmp_path: Path) -> None:
    (tmp_path / "acme" / "narrow").mkdir(parents=True)
    assert find_weights("acme/narrow") == Path("acme/narrow")
    assert "there is no acme/odd, though there is a folder acme" in refusal("acme/odd")
    with pytest.raises((ConfigError, WeightsError), match="though there is a folder acme"):
        load_autoencoder("diffusers:acme/parts")
    for path in ("weights/mine.ckpt", "./acme/x", "/acme/x", "~/x", "x.ckpt", "a/b/c"):
        assert find_weights(path) == Path(path)
    assert find_weights(Path("other/model")) == Path("other/model")
    with pytest.raises(WeightsError, match="no such weights file"):
        load_autoencoder("reducio", "weights/mine.ckpt")
    assert not stub.asked


def test_names_of_the_hub_are_read_whole() -> None:
    name = hub_name("hf://a/b.c@refs/pr/3/d/e.pt")
    assert name is not None
    assert (name.repository, name.revision, name.file) == ("a/b.c", "refs/pr/3", "d/e.pt")


def test_backbones_of_lpips_come_by_torch_hub_and_are_proven(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a file:// URL, which torch.hub fetches as any other."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    features = lpips.LPIPS("alex").features.state_dict()
    path = tmp_path / "plain.pth"
    torch.save({f"features.{key}": value for key, value in features.items()}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for name, served in (("good", digest[:8]), ("bad", "0" * 8)):
        file = path.rename(tmp_path / f"{name}-{served}.pth")
        backbone = lpips.Backbone(file.name, 3, lpips.BACKBONES["alex"].layers, (1, 4, 7, 9, 11))
        monkeypatch.setitem(lpips.BACKBONES, "alex", backbone)
        monkeypatch.setattr(lpips.Backbone, "url", file.as_uri())
        if name == "good":
            lpips.load_lpips("alex")
        else:
            with pytest.raises(MetricUnavailableError, match=r"invalid hash.*--lpips-weights"):
                lpips.load_lpips("alex")
            left = {path.name for path in (tmp_path / "torch/hub/checkpoints").iterdir()}
            assert file.name not in left
        path = file

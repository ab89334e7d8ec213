"""Reducio-VAE by name: what is loaded, what identifies it, and `import-checkpoint`."""

from __future__ import annotations

import configparser
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor

from reducio_latents.autoencoders import LOADERS, Autoencoder, load_autoencoder, reducio
from reducio_latents.autoencoders.checkpoint import import_checkpoint
from reducio_latents.autoencoders.reducio import PUBLISHED_SIZES, ReducioAutoencoder, load_preset
from reducio_latents.cli.upkeep import import_checkpoint as command
from reducio_latents.core.gaussian import final_latents
from reducio_latents.errors import ConfigError, GeometryError, PixelError, StoreError, WeightsError
from reducio_latents.vae import ReducioVAE, ReducioVAEConfig, Tiling
from reducio_latents.vae.norm import fusible_norm_silu
from reducio_latents.vae.weights import random_state_dict
from tests.half_precision import assert_as_near, rounding

NARROW = ReducioVAEConfig(width=8, content_width=8, decoder_width=8)


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    state = random_state_dict(NARROW)
    return {key: state.read(key) for key in state.shapes}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Tensor]) -> Path:
    path = tmp_path_factory.mktemp("weights") / "narrow.ckpt"
    state = {f"module.{key}": tensor for key, tensor in tensors.items()}
    torch.save({"state_dict": {**state, "module.loss.logvar": torch.zeros(())}}, path)
    return path


@pytest.fixture(scope="module")
def random8() -> Autoencoder:
    return load_autoencoder("reducio-random:8")


@pytest.fixture(scope="module")
def clip() -> Tensor:
    return torch.tanh(torch.randn(2, 3, 16, 32, 64, generator=torch.Generator().manual_seed(1)))


def test_it_keeps_the_protocol(random8: Autoencoder, clip: Tensor) -> None:
    assert random8.needs_content
    assert random8.geometry.latent_shape(16, 32, 64) == (16, 4, 1, 2)
    assert (random8.device, random8.dtype) == (torch.device("cpu"), torch.float32)
    assert json.loads(json.dumps(random8.config)) == random8.config
    assert random8.config["precision"] == random8.precision
    posterior = random8.encode(clip)
    latents = random8.final_latents(posterior)
    assert torch.equal(latents, final_latents(posterior, None, random8.final_rule))
    decoded = random8.decode(latents, clip[:, :, 7])
    assert decoded.shape == clip.shape
    assert not decoded.requires_grad


def test_final_latents_can_be_trained_on(random8: Autoencoder, clip: Tensor) -> None:
    """Tensors of inference mode could not; a trainer that encodes on the fly needs others."""
    layer = torch.nn.Linear(2, 2)
    layer(random8.final_latents(random8.encode(clip))).sum().backward()
    assert layer.weight.grad is not None


def test_it_refuses_what_the_model_does_not_take(random8: Autoencoder, clip: Tensor) -> None:
    random8.check_clip(16, 256, 448)
    with pytest.raises(GeometryError, match="width=448"):
        random8.check_clip(16, 256, 455)
    with pytest.raises(PixelError, match=r"127.5"):
        random8.encode(127.5 * (clip + 1))
    with pytest.raises(ConfigError, match="content image"):
        random8.decode(torch.zeros(1, 16, 4, 1, 1))


def test_random_weights_are_the_same_everywhere_and_say_that_they_are_random() -> None:
    narrow = load_autoencoder("reducio-random:8", parts="encoder")
    assert narrow.weights_sha256 == PINNED
    assert narrow.name == "reducio-random:8:ft4:0"
    assert narrow.config["random_weights"] is True
    again = load_autoencoder(narrow.name, parts="decoder")
    assert again.fingerprint == narrow.fingerprint
    others = [
        load_autoencoder(name, parts="encoder")
        for name in ("reducio-random:8:ft2", "reducio-random:8:1")
    ]
    assert len({narrow.fingerprint, *(other.fingerprint for other in others)}) == 3
    assert [other.geometry.temporal_stride for other in others] == [2, 4]


def test_checkpoint_folder_and_half_are_the_same_model(
    tmp_path: Path, checkpoint: Path, random8: Autoencoder, clip: Tensor
) -> None:
    import_checkpoint(checkpoint, tmp_path / "folder")
    loaded = [
        load_autoencoder("reducio", checkpoint),
        load_autoencoder("reducio", tmp_path / "folder"),
        load_autoencoder("reducio", tmp_path / "folder" / "model.safetensors"),
        load_autoencoder("reducio", checkpoint, parts="encoder"),
        load_autoencoder("reducio", checkpoint, dtype=torch.bfloat16, parts="encoder"),
    ]
    assert {model.fingerprint for model in loaded} == {random8.fingerprint}
    assert loaded[0].config == loaded[3].config != loaded[4].config
    assert {model.name for model in loaded} == {"reducio"}
    wanted = random8.encode(clip)
    for model in loaded[:4]:
        assert torch.equal(model.encode(clip).mean, wanted.mean)
    with pytest.raises(ConfigError, match="no decoder"):
        loaded[3].decode(random8.final_latents(wanted), clip[:, :, 7])


def test_other_weights_of_the_same_size_are_another_model(
    tmp_path: Path, tensors: dict[str, Tensor], random8: Autoencoder
) -> None:
    changed = dict(tensors)
    changed["decoder.conv_out.bias"] = changed["decoder.conv_out.bias"] + 1e-6
    save_file(changed, tmp_path / "b.safetensors")
    other = load_autoencoder("reducio", tmp_path / "b.safetensors", parts="encoder")
    assert other.fingerprint != random8.fingerprint


def test_precision_is_apart_from_identity(checkpoint: Path, clip: Tensor) -> None:
    plain = load_autoencoder("reducio", checkpoint, parts="encoder")
    rough = load_autoencoder(
        "reducio",
        checkpoint,
        parts="encoder",
        dtype=torch.bfloat16,
        memory_format=torch.channels_last_3d,
    )
    assert rough.fingerprint == plain.fingerprint
    assert rough.precision["dtype"] == "bfloat16"
    assert rough.precision["memory_format"] == "channels_last_3d"
    exact, near = plain.encode(clip).mean, rough.encode(clip).mean
    assert near.dtype == torch.float32
    assert isinstance(plain.model, ReducioVAE)
    rounded = rounding(plain.model)
    assert_as_near(near, exact, rounded.encode(clip).mean)


def test_tiling_is_the_published_one_unless_said_otherwise(clip: Tensor) -> None:
    def load(**options: Any) -> Autoencoder:
        return load_autoencoder("reducio-random:8", parts="encoder", **options)

    published, small, whole = load(), load(tiling=Tiling(tile_px=32)), load(tiling=None)
    assert published.config["tiling"] == {"tile_px": 256, "overlap": 0.25}
    assert whole.config["tiling"] is None
    assert torch.equal(published.encode(clip).mean, whole.encode(clip).mean)  # one tile
    assert not torch.equal(small.encode(clip).mean, whole.encode(clip).mean)
    tall = clip[:1].repeat(1, 1, 1, 11, 1)[..., :32]  # 352 px: tiles of 320 and 96
    assert not torch.equal(published.encode(tall).mean, whole.encode(tall).mean)


def test_compiled_norms_compute_the_same(
    checkpoint: Path, clip: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_with, compiled = torch.compile, []

    def compile_eagerly(function: Any, **options: Any) -> Any:
        compiled.append(function)
        return compile_with(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    fast = load_autoencoder("reducio", checkpoint, compile="norms")
    slow = load_autoencoder("reducio", checkpoint)
    assert compiled == [fusible_norm_silu]
    assert fast.precision["compiled"] == "norms"
    torch.testing.assert_close(fast.encode(clip).mean, slow.encode(clip).mean)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("name", "compile"),
    [("reducio-random:8", "some"), ("bicubic-32x", "all")],
)
def test_what_cannot_be_compiled_is_refused(name: str, compile: Any) -> None:
    with pytest.raises(ConfigError, match="none"):
        load_autoencoder(name, compile=compile)


def test_compiled_networks_compute_the_same(
    checkpoint: Path, clip: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []

    def compile_eagerly(self: torch.nn.Module, **options: Any) -> None:
        compiled.append(type(self).__name__)
        self._compiled_call_impl = torch.compile(self._call_impl, backend="eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    fast = load_autoencoder("reducio", checkpoint, parts="encoder", compile="all")
    slow = load_autoencoder("reducio", checkpoint, parts="encoder")
    assert compiled == ["VideoEncoder"]
    assert fast.precision["compiled"] == "all"
    torch.testing.assert_close(fast.encode(clip).mean, slow.encode(clip).mean)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("reducio-ft4-fs23", ConfigError, "did you mean 'reducio-ft4-fs32'"),
        ("sora", ConfigError, "choose one of reducio-ft4-fs32"),
        ("reducio-random", ConfigError, "reducio-random:WIDTH"),
        ("reducio-random:wide", ConfigError, "reducio-random:WIDTH"),
        ("reducio-random:8:ft3", ConfigError, "reducio-random:WIDTH"),
        ("reducio-random:12", ConfigError, "multiple of 8"),
        ("reducio-random:8:99999999999", ConfigError, "seed"),
        ("reducio:8", ConfigError, "no autoencoder"),
        ("reducio-ft4-fs32:8", ConfigError, "no autoencoder"),
        ("reducio-tiny-ft4-fs32:8", ConfigError, "no autoencoder"),
        ("reducio", WeightsError, "needs weights.*huggingface.co/microsoft/Reducio-VAE"),
        ("reducio-ft2-fs32", WeightsError, "reducio-ft2-fs32-attn23.ckpt.*reducio-random:32"),
    ],
)
def test_a_name_that_cannot_be_loaded_is_explained(
    name: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_autoencoder(name)


def test_devices_and_parts_that_there_are_not_are_refused(checkpoint: Path) -> None:
    for device in ("cuda:7", "warp"):
        with pytest.raises(ConfigError, match=f"'{device}' cannot be used"):
            load_autoencoder("reducio-random:8", device=device)
    with pytest.raises(ConfigError, match="parts is 'half'"):
        load_autoencoder("reducio-random:8", parts="half")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="takes no weights"):
        load_autoencoder("reducio-random:8", checkpoint)


def test_a_model_that_comes_with_the_package_needs_no_weights(
    checkpoint: Path, clip: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "reducio-tiny-ft4-fs32"
    monkeypatch.setattr(reducio, "BUNDLED", tmp_path)
    with pytest.raises(WeightsError, match=r"not bundled in this build.*tools/train_tiny\.py"):
        load_autoencoder(name)
    import_checkpoint(checkpoint, tmp_path / name)
    model = load_autoencoder(name)
    same = load_autoencoder("reducio", checkpoint)
    assert (model.name, model.fingerprint) == (name, same.fingerprint)
    assert torch.equal(model.encode(clip).mean, same.encode(clip).mean)
    with pytest.raises(ConfigError, match="brings its own weights"):
        load_autoencoder(name, checkpoint)


def test_what_is_bundled_is_small_described_and_packaged() -> None:
    names = [name for name, where in LOADERS.items() if "bundled" in where]
    for folder in reducio.BUNDLED.iterdir() if reducio.BUNDLED.is_dir() else []:
        assert folder.name in names
        assert {path.name for path in folder.iterdir()} == {
            "model.safetensors", "config.json", "README.md",
        }  # fmt: skip
        assert (folder / "model.safetensors").stat().st_size < 8_000_000
        model = load_autoencoder(folder.name)
        assert model.fingerprint in (folder / "README.md").read_text()
    package = reducio.BUNDLED.parents[1]
    example = reducio.BUNDLED / names[0] / "model.safetensors"
    patterns = configparser.ConfigParser()
    patterns.read(package.parent / "setup.cfg")
    data = patterns["options.package_data"]["reducio_latents"].split(", ")
    assert any(example.relative_to(package).match(pattern) for pattern in data)


def test_a_preset_takes_its_own_sizes_only(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(WeightsError, match=r"width is 8, not 128.*use the model reducio"):
        load_autoencoder("reducio-ft4-fs32", checkpoint)
    monkeypatch.setitem(PUBLISHED_SIZES, "reducio-ft4-fs32", NARROW)
    assert load_autoencoder("reducio-ft4-fs32", checkpoint).name == "reducio-ft4-fs32"
    # A store records the name, so one model has one.
    assert load_autoencoder("reducio", checkpoint).name == "reducio-ft4-fs32"
    with pytest.raises(WeightsError, match=r"temporal_stride is 4.*use the model reducio-ft4-fs32"):
        load_autoencoder("reducio-ft2-fs32", checkpoint)


def test_every_listed_loader_of_reducio_exists() -> None:
    places = [place for place in LOADERS.values() if "reducio:" in place]
    assert len(places) == 5
    assert LOADERS["reducio-ft4-fs32"].endswith(load_preset.__name__)


def test_import_writes_what_it_read_and_describes_it(
    tmp_path: Path, checkpoint: Path, tensors: dict[str, Tensor]
) -> None:
    folder = tmp_path / "new" / "weights"
    result = CliRunner().invoke(command, [str(checkpoint), str(folder)])
    assert result.exit_code == 0, result.output
    loaded = load_autoencoder("reducio", folder)
    described = json.loads((folder / "config.json").read_text())
    assert described["config"] == asdict(NARROW)
    assert described["fingerprint"] == loaded.fingerprint
    for fact in (f"{sum(t.numel() for t in tensors.values()):,}", loaded.fingerprint, "1 keys"):
        assert fact in result.output
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_import_goes_on_where_it_was_killed_and_overwrites_nothing(
    tmp_path: Path, checkpoint: Path, tensors: dict[str, Tensor]
) -> None:
    first = import_checkpoint(checkpoint, tmp_path)
    written = (tmp_path / "model.safetensors").stat().st_mtime_ns
    (tmp_path / "config.json").unlink()  # killed between the two files
    assert import_checkpoint(checkpoint, tmp_path) == first
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == written

    other = {key: tensor * 2 for key, tensor in tensors.items()}
    torch.save(other, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match=r"holds other weights. Give an empty folder"):
        import_checkpoint(tmp_path / "other.pt", tmp_path)
    assert load_autoencoder("reducio", tmp_path).fingerprint == first.fingerprint


def test_import_keeps_out_of_other_models_folders(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(WeightsError, match="belongs to something else"):
        import_checkpoint(checkpoint, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_import_says_why_it_cannot_write(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="cannot write"):
        import_checkpoint(checkpoint, tmp_path / "file" / "weights")


@pytest.mark.parametrize("where", [0.2, 0.5, 0.99])
def test_a_flipped_bit_in_imported_weights_is_noticed(
    tmp_path: Path, checkpoint: Path, where: float
) -> None:
    import_checkpoint(checkpoint, tmp_path)
    path = tmp_path / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[int(len(content) * where)] ^= 1
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"damaged or replaced|not finite"):
        load_autoencoder("reducio", tmp_path)


def test_a_description_of_other_sizes_is_noticed(tmp_path: Path, checkpoint: Path) -> None:
    import_checkpoint(checkpoint, tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    for config, message in (
        ({**described["config"], "temporal_stride": 2}, "temporal_stride is 4, not 2"),
        ({**described["config"], "depth": 2}, "unknown key 'depth'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**described, "config": config}))
        with pytest.raises(WeightsError, match=message):
            load_autoencoder("reducio", tmp_path)


def test_weights_beside_another_models_config_load(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    assert isinstance(load_autoencoder("reducio", tmp_path), ReducioAutoencoder)


PINNED = "54782069193ba422ff31917e2206fbda1689b5f0382a2ea1e6bea354af431a41"

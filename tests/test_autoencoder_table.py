"""Every autoencoder of diffusers: in the table or refused, and used as its own pipelines use it."""

from __future__ import annotations
import __future__

import ast
import hashlib
import inspect
import json
import re
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from multiprocessing import Pipe
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from reducio_latents import LatentDataset, open_store
from reducio_latents.autoencoders import load_autoencoder
from reducio_latents.autoencoders.diffusers_rules import AUTOENCODERS, IMAGENET, REFUSED
from reducio_latents.core.clips import ClipSpec
from reducio_latents.errors import ConfigError, GeometryError
from reducio_latents.vae.tiling import Tiling
from reducio_latents.video.processes import Channel, ProcessPool, _Worker
from tests import tiny_models
from tests.corpora import write_video
from tests.test_encode_flow import encode

diffusers = pytest.importorskip("diffusers")

MEAN, STD = (torch.tensor(v).view(1, 3, 1, 1, 1) for v in IMAGENET)
FRAMES: dict[str, tuple[str, int, Callable[[int], bool]]] = {
    "each": ("any", 2, lambda n: True),
    "each_as_clip": ("any", 2, lambda n: True),
    "causal": ("4k+1", 5, lambda n: n % 4 == 1),
    "AutoencoderKLAllegro": ("16k+24", 24, lambda n: n >= 24 and n % 16 == 8),
    "AutoencoderKLCogVideoX": ("8k+1", 9, lambda n: n % 8 == 1),
    "AutoencoderKLCosmos": ("8k+1", 9, lambda n: n % 8 == 1),
    "AutoencoderKLLTX2Video": ("8k+1", 9, lambda n: n % 8 == 1),
    "AutoencoderKLLTXVideo": ("8k+1", 9, lambda n: n % 8 == 1),
    "AutoencoderKLMiniMaxH3": ("17k+22", 22, lambda n: n >= 22 and n % 17 == 5),
    "AutoencoderKLMochi": ("6k+1", 7, lambda n: n % 6 == 1),
}
"""Of a class, or of its kind: the lengths of clips in words, one of them, and whether one is."""
SIDES = {"AutoencoderRAE": 64, "AutoencoderKLLTX2Video": 64}
"""Pixels, where 32 are too few."""


def frames_of(name: str) -> tuple[str, int, Callable[[int], bool]]:
    return FRAMES.get(name) or FRAMES[AUTOENCODERS[name].frames]


def side_of(name: str) -> int:
    return SIDES.get(name, 32)


@cache
def method_of(pipeline: str, method: str) -> Callable[..., Any]:
    """Return a method of a pipeline, read from its file: importing one takes seconds.

    What it draws from a posterior is the mean.
    """
    path, name = pipeline.split(":")
    text = (Path(diffusers.__file__).parent / "pipelines" / f"{path}.py").read_text("utf-8")
    (body,) = (
        n.body for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name == name
    )
    (found,) = (n for n in body if isinstance(n, ast.FunctionDef) and n.name == method)
    found.decorator_list = []
    code = compile(
        ast.Module([found], []),
        path,
        "exec",
        __future__.annotations.compiler_flag,
        dont_inherit=True,
    )
    names: dict[str, Any] = {
        "torch": torch,
        "inspect": inspect,
        "is_compiled_module": lambda _: False,
        "retrieve_latents": lambda output, **_: output.latent_dist.mode(),
    }
    exec(code, names)
    return names[method]  # type: ignore[no-any-return]


def by_pipeline(pipeline: str, method: str, **has: str) -> Callable[..., Tensor]:
    """Call a pipeline's own method with the model and what else it `has`: its own, or a value."""

    def call(model: Any, x: Tensor, *more: Any) -> Tensor:
        needs = {
            key: method_of(pipeline, key) if value == "own" else model.config[value]
            for key, value in has.items()
        }
        given = (None,) if method == "_encode_vae_image" else more
        pipe = SimpleNamespace(vae=model, **needs)
        return method_of(pipeline, method)(pipe, x, *given)  # type: ignore[no-any-return]

    return call


def mode(model: Any, x: Tensor) -> Tensor:
    found = model.encode(x)
    if hasattr(found, "latent_dist"):
        return found.latent_dist.mode()  # type: ignore[no-any-return]
    return found.latent if hasattr(found, "latent") else found.latents  # type: ignore[no-any-return]


def scaled(model: Any, x: Tensor) -> Tensor:
    return mode(model, x) * float(model.config.scaling_factor)


def whitened(model: Any, x: Tensor) -> Tensor:
    z, channels = mode(model, x), len(model.config.latents_mean)
    shape = (1, z.shape[1], channels // z.shape[1], 1, 1)
    mean, std = (
        torch.tensor(value).view(shape)[:, :, : z.shape[2]]
        for value in (model.config.latents_mean, model.config.latents_std)
    )
    return (z - mean) * float(model.config.get("scaling_factor", 1.0)) / std


def by_ltx(pipeline: str) -> Callable[[Any, Tensor], Tensor]:
    return lambda model, x: method_of(pipeline, "_normalize_latents")(
        mode(model, x), model.latents_mean, model.latents_std, model.config.scaling_factor
    )


def with_alpha(model: Any, x: Tensor) -> Tensor:
    call = by_pipeline(
        "qwenimage21/pipeline_qwenimage21:QwenImage21Pipeline",
        "_encode_vae_image",
        latent_channels="z_dim",
    )
    return call(model, torch.cat([x, torch.ones_like(x[:, :1])], 1))


SD = "stable_diffusion/pipeline_stable_diffusion"
SVD = "stable_video_diffusion/pipeline_stable_video_diffusion:StableVideoDiffusionPipeline"
FLUX2 = "flux2/pipeline_flux2:Flux2Pipeline"
LTX = "ltx/pipeline_ltx:LTXPipeline"
REFINER = "hunyuan_image/pipeline_hunyuanimage_refiner:HunyuanImageRefinerPipeline"
KANDINSKY = "kandinsky6/pipeline_kandinsky6_sr:Kandinsky6SRPipeline"
THEIRS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "AutoencoderKL": by_pipeline(
        "flux/pipeline_flux_img2img:FluxImg2ImgPipeline", "_encode_vae_image"
    ),
    "AsymmetricAutoencoderKL": by_pipeline(
        f"{SD}_inpaint:StableDiffusionInpaintPipeline", "_encode_vae_image"
    ),
    # DreamLitePipeline decodes latents / scaling_factor + shift_factor.
    "AutoencoderTiny": lambda model, x: (
        (mode(model, x) - model.config.shift_factor) * model.config.scaling_factor
    ),
    "AutoencoderDC": scaled,  # SanaPipeline decodes latents / scaling_factor, as many do
    "AutoencoderKLFlux2": by_pipeline(FLUX2, "_encode_vae_image", _patchify_latents="own"),
    "AutoencoderKLHunyuanImage": scaled,
    "AutoencoderKLHunyuanImageRefiner": by_pipeline(
        REFINER, "_encode_vae_image", _reorder_image_tokens="own"
    ),
    "AutoencoderKLQwenImage21": with_alpha,
    "AutoencoderKLKVAE": mode,
    "ConsistencyDecoderVAE": scaled,
    "VQModel": mode,  # KandinskyV22Img2ImgPipeline does nothing more
    "AutoencoderRAE": lambda model, x: mode(model, x / 2 + 0.5),
    "AutoencoderKLTemporalDecoder": scaled,
    "AutoencoderKLWan": whitened,  # as WanVideoToVideoPipeline.prepare_latents
    "AutoencoderKLQwenImage": by_pipeline(
        "qwenimage/pipeline_qwenimage_edit:QwenImageEditPipeline",
        "_encode_vae_image",
        latent_channels="z_dim",
    ),
    "AutoencoderKLLTXVideo": by_ltx(LTX),
    "AutoencoderKLLTX2Video": by_ltx("ltx2/pipeline_ltx2:LTX2Pipeline"),
    "AutoencoderKLCogVideoX": scaled,
    "AutoencoderKLHunyuanVideo": scaled,
    "AutoencoderKLHunyuanVideo15": scaled,
    "AutoencoderKLMochi": whitened,
    "AutoencoderKLCosmos": whitened,  # then times the sigma_data of a scheduler
    "AutoencoderKLMagvit": scaled,
    "AutoencoderKLAllegro": scaled,
    "AutoencoderKLMiniMaxH3": lambda model, x: whitened(model, (x / 2 + 0.5 - MEAN) / STD),
    "AutoencoderKLKVAEVideo": mode,
    "Kandinsky6SRVAE": by_pipeline(KANDINSKY, "encode_video"),
    "AutoencoderVidTok": lambda model, x: model(x, sample_posterior=False, encoder_mode=True),
}
"""Final latents of pixels as a pipeline makes them: by its own function, or as it says in line."""
BACK: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "AutoencoderKLFlux2": lambda model, z: (
        model.decode(
            method_of(FLUX2, "_unpatchify_latents")(
                z * (model.bn.running_var + model.config.batch_norm_eps).sqrt().view(-1, 1, 1)
                + model.bn.running_mean.view(-1, 1, 1)
            )
        ).sample
    ),
    "AutoencoderKLHunyuanImageRefiner": lambda model, z: (
        model.decode(
            method_of(REFINER, "_restore_image_tokens_order")(z / model.config.scaling_factor)
        ).sample
    ),
    "AutoencoderKLTemporalDecoder": lambda model, z: by_pipeline(SVD, "decode_latents")(
        model, z[None], len(z)
    )[0].transpose(0, 1),
    "AutoencoderKLAllegro": by_pipeline(
        "allegro/pipeline_allegro:AllegroPipeline", "decode_latents"
    ),
    "Kandinsky6SRVAE": by_pipeline(KANDINSKY, "decode_latents"),
    "AutoencoderKLLTXVideo": lambda model, z: (
        model.decode(
            method_of(LTX, "_denormalize_latents")(
                z, model.latents_mean, model.latents_std, model.config.scaling_factor
            )
        ).sample
    ),
}
"""Pixels of final latents, likewise."""


@torch.no_grad()
def compare(name: str, model: Any, ours: Any) -> tuple[float, float]:
    """Return the largest difference from the pipelines in final latents, and in pixels."""
    side, count = side_of(name), frames_of(name)[1]
    generator = torch.Generator().manual_seed(0)
    video = torch.rand(1, 3, count, side, side, generator=generator) * 2 - 1
    given = video
    if AUTOENCODERS[name].frames.startswith("each"):
        given = video[0].transpose(0, 1)
        given = given[:, :, None] if AUTOENCODERS[name].frames == "each_as_clip" else given
    wanted = THEIRS[name](model, given)
    final = ours.final_latents(ours.encode(video))
    decoded = ours.decode(final)
    assert decoded.shape == video.shape
    far = 0.0
    if name in BACK:
        pixels = BACK[name](model, wanted)
        far = float((_as_clip(name, pixels) - decoded.clamp(*_range(pixels))).abs().max())
    return float((_as_clip(name, wanted) - final).abs().max()), far


def _range(pixels: Tensor) -> tuple[float, float]:
    return float(pixels.min()), float(pixels.max())


def _as_clip(name: str, x: Tensor) -> Tensor:
    if not AUTOENCODERS[name].frames.startswith("each"):
        return x
    x = x[:, :, 0] if x.ndim == 5 else x
    return x.transpose(0, 1)[None]


FINAL_IN_WORDS = {
    "scaled": "scaled",
    "raw": "as encoded",
    "repeated": "scaled, channels twice",
    "batch_norm": "patches, by its batch norm",
}


def page() -> str:
    """Return the table of docs/models.md: `python -m tests.test_autoencoder_table`."""
    lines = [
        "| class | works | frames | px a cell | final latents | largest difference |",
        "|" + "---|" * 6,
    ]
    for name in AUTOENCODERS:
        with TemporaryDirectory() as place:
            model = tiny_models.vae(name, **SHIFTED.get(name, {}))
            model.save_pretrained(place)
            ours = load_autoencoder(f"diffusers:{place}")
        far, cell = compare(name, ours.model, ours)[0], ours.geometry.spatial_stride
        kind = FINAL_IN_WORDS[AUTOENCODERS[name].final]
        lines.append(f"| {name} | yes | {frames_of(name)[0]} | {cell} | {kind} | {far:.1g} |")
    lines += [f"| {name} | no: {why} | | | | |" for name, why in REFUSED.items()]
    return "\n".join(lines)


SHIFTED: dict[str, dict[str, Any]] = {"AutoencoderKL": {"shift_factor": 0.1159}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("vaes")

    def saved(name: str) -> Path:
        if not (root / name).exists():
            tiny_models.vae(name, **SHIFTED.get(name, {})).save_pretrained(root / name)
        return root / name

    return saved


@pytest.fixture(scope="module")
def loaded(folder: Callable[[str], Path]) -> Callable[[str], Any]:
    return cache(lambda name: load_autoencoder(f"diffusers:{folder(name)}"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus")
    write_video(path / "a.mp4", 1.6, seed=1)
    return path


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have threads read videos in place of processes, which take longer to start than to work."""

    def start(pool: ProcessPool) -> _Worker:
        ours, theirs = Pipe()
        memory = None
        if pool.slots:
            memory = SharedMemory(create=True, size=pool.slots * pool.slot_bytes)
            memory.unlink()
        channel = Channel(theirs, memory, pool.slots)

        def work() -> None:
            with suppress(EOFError, OSError):
                while True:
                    pool.target(channel.next_task(), channel)
                    channel.finish()

        thread: Any = Thread(target=work, daemon=True)
        thread.kill, thread.pid = ours.close, None
        thread.start()
        return _Worker(thread, ours, memory)

    monkeypatch.setattr(ProcessPool, "_start_once", start)


def test_the_library_has_no_autoencoder_that_is_neither_known_nor_refused() -> None:
    import diffusers.models.autoencoders as found

    named = re.compile(r"Autoencoder|VAE|VQModel|Vocoder|AudioTokenizer|DecoderModel")
    models = {name for name in dir(found) if isinstance(getattr(found, name), type)}
    models |= {name for name in dir(diffusers) if named.search(name) and "Pipeline" not in name}
    models = {n for n in models if hasattr(getattr(diffusers, n, None), "from_config")}
    assert len(models) > 30
    assert models <= AUTOENCODERS.keys() | REFUSED.keys(), (
        models - AUTOENCODERS.keys() - REFUSED.keys()
    )
    assert not AUTOENCODERS.keys() & REFUSED.keys()
    assert THEIRS.keys() == AUTOENCODERS.keys()


def test_a_corpus_goes_through_every_autoencoder_and_comes_back_as_its_pipelines_have_it(
    folder: Callable[[str], Path],
    loaded: Callable[[str], Any],
    corpus: Path,
    tmp_path: Path,
    threads: None,
) -> None:
    for number, name in enumerate(AUTOENCODERS):
        model, store = f"diffusers:{folder(name)}", tmp_path / name
        side, (words, count, takes) = side_of(name), frames_of(name)
        settings = {"columns": ("motion",), "resolution": side, "workers": 1}
        encode(corpus, store, model=model, clip=ClipSpec(frames=count, policy="centre"), **settings)
        ours = loaded(name)
        differences = compare(name, ours.model, ours)
        assert differences[0] < 1e-6, (name, differences)
        assert differences[1] < 1e-4, (name, differences)
        drawn, mean = (
            LatentDataset(store, batch_size=1, shuffle=False, latents=kind).batch(0, 0)["latents"]
            for kind in ("sample", "mean")
        )
        # Latents without a distribution are drawn as they are.
        is_point = (drawn - mean).abs().max() < 1e-5
        assert is_point == (ours.encode(torch.zeros(1, 3, count, side, side)).logvar == -30).all()
        if number % 3 == 0:  # the store's decoder is this model, loaded once more
            frames = open_store(store).decoder(device="cpu").decode(mean)
            assert frames.shape == (1, count, side, side, 3), name
            assert frames.float().std() > 1, name
        for length in range(1, 60):  # the library pads or drops the others without a word
            if takes(length):
                ours.check_clip(length, side, side)
                continue
            with pytest.raises(GeometryError, match=re.escape(words)) as refused:
                ours.check_clip(length, side, side)
            for usable in re.findall(r"(\d+) (?:or|frames)", str(refused.value)):
                ours.check_clip(int(usable), side, side)


def test_norms_of_others_are_not_compiled_by_themselves(
    folder: Callable[[str], Path],
) -> None:
    with pytest.raises(ConfigError, match="no norms that could be compiled"):
        load_autoencoder(f"diffusers:{folder('AutoencoderKL')}", compile="norms")


def test_what_a_store_was_made_with_before_is_the_same_model(folder: Callable[[str], Path]) -> None:
    for name in map(tiny_models.VIDEO_VAES.get, ("wan", "cosmos", "mochi")):
        ours: Any = load_autoencoder(f"diffusers:{folder(str(name))}", parts="encoder")
        config = json.loads((folder(str(name)) / "config.json").read_text())
        identity = {
            "architecture": name,
            "model": {key: value for key, value in config.items() if not key.startswith("_")},
            "weights_sha256": ours.weights_sha256,
        }
        text = json.dumps(identity, sort_keys=True).encode()
        assert ours.fingerprint == hashlib.sha256(text).hexdigest()
        described = {
            "architecture",
            "model",
            "fingerprint",
            "weights_sha256",
            "tiling",
            "precision",
        }
        assert ours.config.keys() == described


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("LTX2VideoDiffusionDecoderModel", "cannot encode: it is a decoder for latents of"),
        ("AutoencoderOobleck", "is for sound"),
        ("UNet2DModel", "is no autoencoder"),
        ("../x", "is no autoencoder"),
        ("StableDiffusionPipeline", "is no autoencoder"),
    ],
)
def test_a_class_of_no_use_is_refused_in_a_line(tmp_path: Path, name: str, why: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": name}))
    for trust in (False, True):
        with pytest.raises(ConfigError, match=f"holds {re.escape(name)}, which {why}") as refused:
            load_autoencoder(f"diffusers:{tmp_path}", trust_config=trust)
        assert "\n" not in str(refused.value)


def test_a_config_that_makes_a_class_of_no_use_is_refused(tmp_path: Path) -> None:
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("VQModel", {"lookup_from_codebook": True}, "gives numbers of a codebook"),
        ("AutoencoderKL", {"in_channels": 4}, "takes 4 colour channels"),
    ]
    for name, settings, why in cases:
        tiny_models.vae(name, **settings).save_pretrained(tmp_path / name)
        with pytest.raises(ConfigError, match=f"{name} of this config {why}"):
            load_autoencoder(f"diffusers:{tmp_path / name}")


VARIANTS: dict[str, tuple[str, dict[str, Any], int, tuple[int, ...]]] = {
    "Wan 2.2": (
        "AutoencoderKLWan",
        {"patch_size": 2, "in_channels": 12, "out_channels": 12, "is_residual": True},
        5,
        (4, 2, 2, 2),
    ),
    "Qwen-Image-Layered": ("AutoencoderKLQwenImage", {"input_channels": 4}, 5, (4, 2, 4, 4)),
    "VidTok, not causal": ("AutoencoderVidTok", {"is_causal": False}, 16, (4, 4, 4, 4)),
    "VidTok, codes": (
        "AutoencoderVidTok",
        {"regularizer": "fsq", "double_z": False, "codebook_size": 8**4},
        5,
        (4, 2, 4, 4),
    ),
}
"""Another form of a class: its settings, frames of a clip, and the shape of latents."""


@pytest.mark.parametrize("form", VARIANTS)
def test_other_forms_of_a_class(form: str, tmp_path: Path) -> None:
    name, settings, frames, shape = VARIANTS[form]
    tiny_models.vae(name, **settings).save_pretrained(tmp_path)
    ours: Any = load_autoencoder(f"diffusers:{tmp_path}")
    video = torch.rand(1, 3, frames, 32, 32) * 2 - 1
    posterior = ours.encode(video)
    assert tuple(posterior.mean[0].shape) == shape
    assert ours.decode(ours.final_latents(posterior)).shape == video.shape
    assert (posterior.logvar == -30).all() == ("codes" in form)


def test_a_class_that_is_not_known_is_tried_only_if_told_to_and_the_store_says_so(
    folder: Callable[[str], Path],
    corpus: Path,
    tmp_path: Path,
    threads: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    name, model = "AutoencoderKLQwenImage", f"diffusers:{folder('AutoencoderKLQwenImage')}"
    known = load_autoencoder(model)
    for gone in (name, "AutoencoderDC", "AutoencoderKLTemporalDecoder"):
        monkeypatch.delitem(AUTOENCODERS, gone)
    with pytest.raises(ConfigError, match=f"{name}, which is not known here.*--trust-conf"):
        load_autoencoder(model)
    store = tmp_path / "store"
    settings = {"columns": ("motion",), "clip": ClipSpec(frames=5, policy="centre"), "workers": 1}
    encode(corpus, store, model=model, trust_config=True, **settings)
    said = "AutoencoderKLQwenImage is not known here: assumed clips of 4k+1 frames, 8 px a latent"
    assert said in caplog.text
    assumed = {"frames": "causal", "strides": [4, 8], "channels": 4}
    assert open_store(store).meta.columns["motion"].config["assumed"] == assumed
    final = LatentDataset(store, batch_size=1, latents="mean").batch(0, 0)["latents"]
    frames = open_store(store).decoder(device="cpu").pixels(final)
    torch.testing.assert_close(frames, known.decode(final), atol=1e-5, rtol=1e-5)
    tried: Any = load_autoencoder(model, trust_config=True)
    assert tried.final_rule == known.final_rule
    assert tried.fingerprint != known.fingerprint
    pictures = load_autoencoder(f"diffusers:{folder('AutoencoderDC')}", trust_config=True)
    assert pictures.config["assumed"] == {"frames": "each", "strides": [1, 8], "channels": 4}
    with pytest.raises(ConfigError, match="cannot be used by its config alone"):
        load_autoencoder(f"diffusers:{folder('AutoencoderKLTemporalDecoder')}", trust_config=True)


def test_tiles_of_every_class_that_has_them(loaded: Callable[[str], Any]) -> None:
    tiling = Tiling(tile_px=32, overlap=0.5)
    for name in AUTOENCODERS:
        ours = loaded(name)
        network = ours.network
        if not AUTOENCODERS[name].tiles or not hasattr(network.model, "use_tiling"):
            with pytest.raises(ConfigError, match=f"{name} cannot be tiled"):
                network.tile(tiling)
            continue
        side, count = (128 if "LTX" in name else 64), frames_of(name)[1]
        video = torch.rand(1, 3, 1 if count < 22 else count, side, side) * 2 - 1
        whole = ours.encode(video).mean
        network.tile(tiling if "LTX" not in name else Tiling(tile_px=64, overlap=0.5))
        tiled = ours.encode(video).mean
        assert tiled.shape == whole.shape, name
        assert not torch.allclose(tiled, whole, atol=1e-5), name
        network.tile(None)
        assert not network.model.use_tiling


def test_what_half_a_call_has_left_does_not_reach_the_next(loaded: Callable[[str], Any]) -> None:
    ours = loaded("AutoencoderKLMagvit")
    video = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    wanted = ours.encode(video).mean
    with pytest.raises(ValueError, match="non-empty"):
        ours.model.encode(video[:, :, :2])  # its own cache is left half full
    assert torch.equal(ours.encode(video).mean, wanted)


def test_the_page_of_models_has_what_is_measured() -> None:
    text = (Path(__file__).parents[1] / "docs" / "models.md").read_text("utf-8")
    listed = re.findall(r"^\| (\w+) \| yes \| ([^|]+) \| \d+ \| [^|]+ \| (\S+) \|$", text, re.M)
    wanted = {(name, frames_of(name)[0]) for name in AUTOENCODERS}
    assert {(name, frames) for name, frames, _ in listed} == wanted
    assert all(float(far) < 1e-6 for _, _, far in listed)
    assert dict(re.findall(r"^\| (\w+) \| no: ([^|]+) \|", text, re.M)) == REFUSED


if __name__ == "__main__":
    print(page())

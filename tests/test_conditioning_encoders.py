"""Image and text encoders: agreement with their libraries, precision, strict loading."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reducio_latents.conditioning.images import (
    CLIP_PIXELS,
    ImageAutoencoder,
    ImageEncoder,
    preprocess,
)
from reducio_latents.conditioning.options import (
    ContentClipOptions,
    ContentLatentOptions,
    TextOptions,
)
from reducio_latents.conditioning.precision import settle
from reducio_latents.conditioning.text import TextEncoder
from reducio_latents.errors import ConfigError, WeightsError
from tests import tiny_models
from tests.half_precision import assert_as_near, rounding

pytest.importorskip("transformers")

CAPTIONS = ("a cat", "the red fox runs through snow at night", "", "blue video of a dog")


def images(side: int = 40, count: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, side, side + 16, generator=generator) * 2 - 1


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("encoders")
    tiny_models.clip_model().save_pretrained(root / "clip")
    tiny_models.siglip_model().save_pretrained(root / "siglip")
    tiny_models.dino_model().save_pretrained(root / "dino")
    tiny_models.image_vae().save_pretrained(root / "vae")
    tiny_models.save_text_encoder(root / "t5")
    return {path.name: path for path in root.iterdir()}


def image_encoder(folder: Path, **settings: Any) -> ImageEncoder:
    return ImageEncoder(ContentClipOptions(model=str(folder), **{"dtype": "float32", **settings}))


def test_content_latents_are_the_librarys_moments(models: dict[str, Path]) -> None:
    from diffusers import AutoencoderKL

    ours = ImageAutoencoder(ContentLatentOptions(model=str(models["vae"]), dtype="float32"))
    pixels = images(side=48)
    with torch.no_grad():
        wanted = AutoencoderKL.from_pretrained(models["vae"]).eval().encode(pixels).latent_dist
    mean, logvar = ours.encode(pixels)
    torch.testing.assert_close(mean, wanted.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logvar, wanted.logvar, atol=1e-5, rtol=1e-5)
    assert ours.final_rule == {"rule": "scale_shift", "scale": 0.18215, "shift": 0.0}


def test_clip_tokens_are_those_before_pooling(models: dict[str, Path]) -> None:
    from transformers import CLIPModel

    ours, model = image_encoder(models["clip"]), CLIPModel.from_pretrained(models["clip"]).eval()
    pixels = images()
    inputs = preprocess(pixels, 32, "published", CLIP_PIXELS)
    with torch.no_grad():
        out = model.vision_model(pixel_values=inputs)
        tokens = model.vision_model.post_layernorm(out.last_hidden_state)[:, 1:]
        pooled = model.visual_projection(out.pooler_output)
    codes = ours.encode(pixels)
    torch.testing.assert_close(codes.tokens, tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(codes.pooled, pooled, atol=1e-5, rtol=1e-5)
    assert (ours.tokens_shape, ours.pooled_dim) == ((16, 32), 24)


@pytest.mark.parametrize(("name", "skipped"), [("siglip", 0), ("dino", 5)])
def test_other_image_encoders_give_their_patch_tokens(
    models: dict[str, Path], name: str, skipped: int
) -> None:
    from transformers import AutoModel

    ours, model = (
        image_encoder(models[name], resize="antialias"),
        AutoModel.from_pretrained(models[name]),
    )
    pixels = images()
    half = torch.tensor([0.5, 0.5, 0.5]).view(3, 1, 1)
    imagenet = [
        torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    ]
    mean, std = (half, half) if name == "siglip" else imagenet
    square = F.interpolate(pixels, size=(32, 32), mode="bicubic", antialias=True)
    with torch.no_grad():
        out = model.eval()(pixel_values=((square + 1) / 2 - mean) / std)
    codes = ours.encode(pixels)
    torch.testing.assert_close(
        codes.tokens, out.last_hidden_state[:, skipped:], atol=1e-5, rtol=1e-5
    )
    assert codes.tokens.shape == (2, 16, 32)


def test_the_published_resize_blurs_and_aligns_corners() -> None:
    pixels = images(side=64, count=1)
    found = preprocess(pixels, 32, "published", CLIP_PIXELS)
    # Written out: factor 2 is sigma 0.5 and 3 taps, factor 2.5 is sigma 0.75 and 3 taps.
    blurred = pixels
    for axis, sigma in ((2, 0.5), (3, 0.75)):
        side = float(np.exp(-1 / (2 * sigma**2)))
        taps = torch.tensor([side, 1.0, side]) / (1 + 2 * side)
        padding = (0, 0, 1, 1) if axis == 2 else (1, 1, 0, 0)
        padded = F.pad(blurred, padding, mode="reflect")
        size = pixels.shape[axis]
        blurred = sum(taps[i] * padded.narrow(axis, i, size) for i in range(3))  # type: ignore[assignment]
    square = F.interpolate(blurred, size=(32, 32), mode="bicubic", align_corners=True)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in CLIP_PIXELS)
    torch.testing.assert_close(found, ((square + 1) / 2 - mean) / std, atol=1e-5, rtol=1e-5)
    small = images(side=16, count=1)[..., :16]
    plain = F.interpolate(small, size=(32, 32), mode="bicubic", align_corners=True)
    torch.testing.assert_close(
        preprocess(small, 32, "published", CLIP_PIXELS), ((plain + 1) / 2 - mean) / std
    )


class OpenClipTower(nn.Module):
    """OpenCLIP's image tower, by its own names: what its checkpoints hold."""

    def __init__(
        self, width: int, layers: int, heads: int, patch: int, grid: int, out: int
    ) -> None:
        super().__init__()
        self.heads = heads
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(grid * grid + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.proj = nn.Parameter(torch.randn(width, out))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(pixels), 1, -1)
        x = self.ln_pre(torch.cat([first, patches], dim=1) + self.positional_embedding)
        for block in self.transformer.resblocks:  # type: ignore[union-attr]
            x = block(x)
        x = self.ln_post(x)
        return x[:, 0] @ self.proj, x[:, 1:]


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Module()
        self.mlp.c_fc, self.mlp.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        hidden = F.gelu(self.mlp.c_fc(self.ln_2(x)))  # type: ignore[operator]
        out: Tensor = self.mlp.c_proj(hidden)  # type: ignore[operator]
        return x + out


def save_open_clip(folder: Path) -> OpenClipTower:
    torch.manual_seed(3)
    tower = OpenClipTower(width=32, layers=2, heads=4, patch=8, grid=4, out=24).eval()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    state = {f"visual.{key}": value for key, value in tower.state_dict().items()}
    folder.mkdir()
    torch.save(state | {"logit_scale": torch.ones(())}, folder / "open_clip_pytorch_model.bin")
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8}
    config = {"model_cfg": {"embed_dim": 24, "vision_cfg": vision}, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return tower


def test_open_clips_own_checkpoint_gives_open_clips_tokens(tmp_path: Path) -> None:
    tower = save_open_clip(tmp_path / "open_clip")
    pixels = images()
    with torch.no_grad():
        pooled, tokens = tower(preprocess(pixels, 32, "published", CLIP_PIXELS))
    for place in (tmp_path / "open_clip", tmp_path / "open_clip/open_clip_pytorch_model.bin"):
        codes = image_encoder(place).encode(pixels)
        torch.testing.assert_close(codes.tokens, tokens, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(codes.pooled, pooled, atol=1e-5, rtol=1e-5)
    (tmp_path / "open_clip/open_clip_config.json").unlink()
    with pytest.raises(WeightsError, match="width 32, which is none of the published"):
        image_encoder(tmp_path / "open_clip")


def test_text_vectors_are_the_librarys_without_padding(models: dict[str, Path]) -> None:
    from transformers import AutoTokenizer, T5EncoderModel

    ours = TextEncoder(TextOptions(model=str(models["t5"]), dtype="float32", cleaning="none"))
    tokenizer = AutoTokenizer.from_pretrained(models["t5"])
    model = T5EncoderModel.from_pretrained(models["t5"]).eval()
    padded = tokenizer(list(CAPTIONS), padding="max_length", max_length=12, return_tensors="pt")
    with torch.no_grad():
        wanted = model(
            input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]
        ).last_hidden_state
    for caption, vectors, mask in zip(
        ours.encode(CAPTIONS), wanted, padded["attention_mask"], strict=True
    ):
        length = int(mask.sum())
        assert caption.vectors.shape == (length, 32)
        assert caption.full_length == length
        np.testing.assert_allclose(caption.vectors, vectors[:length], atol=1e-5, rtol=1e-5)


def test_a_long_caption_is_cut_with_its_end_mark_and_said_once(
    models: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    options = TextOptions(model=str(models["t5"]), dtype="float32", max_tokens=8)
    encoder = TextEncoder(options)
    long = " ".join(["cat"] * 2500)
    assert len(long) == 9999
    with caplog.at_level(logging.WARNING):
        cut, other = encoder.encode([long, "dog " * 50])
    assert (len(cut.vectors), cut.full_length) == (8, 2501)
    assert (len(other.vectors), other.full_length) == (8, 51)
    assert len([r for r in caplog.records if "the first 8 are kept" in r.getMessage()]) == 1
    whole = encoder.encode(["cat " * 7])[0]
    assert (len(whole.vectors), whole.full_length) == (8, 8)
    np.testing.assert_allclose(cut.vectors, whole.vectors, atol=1e-6)


def test_what_is_left_empty_by_cleaning_is_the_empty_caption_to_the_bit(
    models: dict[str, Path],
) -> None:
    encoder = TextEncoder(TextOptions(model=str(models["t5"]), dtype="float32"))
    found = encoder.encode(["a cat", "", "http://example.com", "  ", "the red fox runs"])
    for caption in (found[1], found[2], found[3]):
        assert np.array_equal(caption.vectors, encoder.empty.vectors)
    assert len(encoder.empty.vectors) == 1  # the end mark


def test_captions_of_a_pipeline_use_the_tokenizer_beside_the_encoder(
    models: dict[str, Path], tmp_path: Path
) -> None:
    pipeline = tmp_path / "pipeline"
    for part, names in {
        "text_encoder": ("config.json", "model.safetensors"),
        "tokenizer": ("tokenizer.json", "tokenizer_config.json"),
    }.items():
        (pipeline / part).mkdir(parents=True)
        for name in names:
            (pipeline / part / name).write_bytes((models["t5"] / name).read_bytes())
    (pipeline / "model_index.json").write_text("{}")
    encoders = [
        TextEncoder(TextOptions(model=str(place), dtype="float32"))
        for place in (pipeline, models["t5"])
    ]
    first, second = (encoder.encode(["a cat"])[0].vectors for encoder in encoders)
    assert np.array_equal(first, second)
    (pipeline / "tokenizer/tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="has no tokenizer"):
        TextEncoder(TextOptions(model=str(pipeline)))


def test_another_models_tokenizer_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((models["t5"] / name).read_bytes())
    with pytest.raises(ConfigError, match="has no tokenizer"):
        TextEncoder(TextOptions(model=str(tmp_path)))
    described = json.loads((models["t5"] / "tokenizer.json").read_text())
    described["model"]["vocab"]["zebra"] = len(described["model"]["vocab"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match="another model's tokenizer"):
        TextEncoder(TextOptions(model=str(tmp_path)))


def test_the_text_encoder_of_a_whole_t5_is_taken_without_its_decoder(
    models: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config.from_pretrained(models["t5"])
    config.is_encoder_decoder = True
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((models["t5"] / name).read_bytes())
    encoder = TextEncoder(TextOptions(model=str(tmp_path), dtype="float32"))
    assert encoder.encode(["a cat"])[0].vectors.shape == (3, 32)


def test_lower_precision_is_measured_and_kept_out_where_the_model_says_so(
    models: dict[str, Path], tmp_path: Path
) -> None:
    lowered = TextEncoder(TextOptions(model=str(models["t5"]), dtype="bfloat16"))
    assert lowered.error is not None
    exact = TextEncoder(TextOptions(model=str(models["t5"]), dtype="float32"))
    wanted = exact.encode(["a cat"])[0].vectors
    exact.model = rounding(exact.model)
    rounded = exact.encode(["a cat"])[0].vectors
    near = lowered.encode(["a cat"])[0].vectors
    assert_as_near(*(torch.from_numpy(vectors) for vectors in (near, wanted, rounded)))
    assert 0 < lowered.error < 0.1
    assert exact.error is None
    assert lowered.config != exact.config
    vae = ImageAutoencoder(ContentLatentOptions(model=str(models["vae"]), dtype="auto"))
    assert vae.dtype in (torch.bfloat16, torch.float32)
    tiny_models.image_vae(force_upcast=True).save_pretrained(tmp_path)
    upcast = ImageAutoencoder(ContentLatentOptions(model=str(tmp_path), dtype="auto"))
    assert (upcast.dtype, upcast.error) == (torch.float32, None)


@pytest.mark.parametrize(
    ("factor", "wanted", "dtype"),
    [
        (1.001, "auto", torch.bfloat16),
        (1.5, "auto", torch.float32),
        (float("nan"), "auto", torch.float32),
        (1.5, "bfloat16", torch.bfloat16),
    ],
)
def test_auto_takes_bfloat16_only_where_its_error_is_small(
    factor: float, wanted: str, dtype: torch.dtype
) -> None:
    model, found, error = settle(1.0, wanted, lambda _, __: factor, lambda x: torch.full((4,), x))
    assert found == dtype
    if dtype == torch.bfloat16:
        assert model == factor
        assert error == pytest.approx(factor - 1, rel=1e-3)
    else:
        assert (model, error) == (1.0, None)


def test_a_precision_that_gives_nan_is_refused_where_it_was_asked_for() -> None:
    with pytest.raises(ConfigError, match="NaN or infinity in float16"):
        settle(1.0, "float16", lambda _, __: float("inf"), lambda x: torch.full((4,), x))


def test_a_model_too_large_for_the_device_goes_there_lowered(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from reducio_latents.conditioning import precision

    def no_memory(*_: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(precision, "deepcopy", no_memory)
    encoder = TextEncoder(TextOptions(model=str(models["t5"]), dtype="bfloat16"))
    assert (encoder.dtype, encoder.error) == (torch.bfloat16, None)
    assert next(encoder.model.parameters()).dtype == torch.bfloat16


def test_models_of_another_kind_are_refused_in_one_line(
    models: dict[str, Path], tmp_path: Path
) -> None:
    tiny_models.video_vae("wan").save_pretrained(tmp_path / "wan")
    cases: list[tuple[Any, Any, str]] = [
        (ImageEncoder, ContentClipOptions(model=str(models["t5"])), "holds a 't5' model"),
        (ImageEncoder, ContentClipOptions(model=str(models["vae"])), "holds a 'None' model"),
        (TextEncoder, TextOptions(model=str(models["vae"])), "cannot be loaded"),
        (ImageAutoencoder, ContentLatentOptions(model=str(models["t5"])), "holds None"),
        (ImageAutoencoder, ContentLatentOptions(model=str(tmp_path / "wan")), "video autoencoder"),
        (TextEncoder, TextOptions(model=str(tmp_path / "nowhere")), "no model at"),
    ]
    for make, options, message in cases:
        with pytest.raises((ConfigError, WeightsError), match=message) as refused:
            make(options)
        assert "\n" not in str(refused.value)


def test_clip_weights_of_another_size_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    from transformers import CLIPVisionModel

    CLIPVisionModel.from_pretrained(models["clip"]).save_pretrained(tmp_path)
    tiny_models.edit_json(tmp_path / "config.json", num_hidden_layers=3)
    with pytest.raises(WeightsError, match="another architecture"):
        image_encoder(tmp_path)
    tiny_models.edit_json(tmp_path / "config.json", num_hidden_layers=2, intermediate_size=48)
    with pytest.raises(WeightsError, match="another architecture"):
        image_encoder(tmp_path)


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        (TextOptions, {"cleaning": "pixar"}, "choose one of none, whitespace, pixart"),
        (TextOptions, {"max_tokens": 0}, "max_tokens must be >= 1"),
        (TextOptions, {"values": "int4"}, "float16, bfloat16, int8"),
        (ContentClipOptions, {"resize": "nearest"}, "published, antialias"),
        (ContentClipOptions, {"quantization": "int4"}, "none, int8"),
        (ContentLatentOptions, {"dtype": "half"}, "auto, float32"),
    ],
)
def test_an_option_out_of_range_is_refused(
    options: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        options(**settings)

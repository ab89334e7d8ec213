"""Text as diffusion models want it: equal to their pipelines' own functions, on random models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from click.testing import CliRunner
from torch import Tensor

from reducio_latents import LatentDataset, LatentTable, open_store
from reducio_latents.cli import main
from reducio_latents.conditioning.options import TextOptions
from reducio_latents.conditioning.presets import TEXT_PRESETS
from reducio_latents.conditioning.text import TextEncoder
from reducio_latents.core.geometry import Bucket
from reducio_latents.dataset.fields import pad_vectors
from reducio_latents.encode import EncodeOptions, add_column
from reducio_latents.encode.conditioning_columns import TextColumn
from reducio_latents.encode.estimate import bytes_per_clip
from reducio_latents.errors import ConfigError, StoreError
from reducio_latents.files.local import LocalFiles
from reducio_latents.upkeep.convert import convert_store
from reducio_latents.upkeep.verify import verify
from tests import tiny_models
from tests.latent_stores import write_store

pytest.importorskip("diffusers")

CAPTIONS = (
    'A red fox  runs through &amp; "snow at night", “the cat”',
    "",
    "  a video of the blue dog\n",
    "the red fox " * 400,
)
MODELS = {
    "T5": tiny_models.text_t5,
    "UMT5": tiny_models.text_umt5,
    "CLIP": tiny_models.text_clip,
    "CLIP with projection": tiny_models.text_clip_projected,
    "LLaMA": tiny_models.text_llama,
    "Gemma 2": tiny_models.text_gemma2,
    "Gemma 3": tiny_models.text_gemma3,
    "Gemma 3, multimodal": tiny_models.whole_gemma3,
    "Qwen2.5-VL": tiny_models.whole_qwen25_vl,
    "Qwen3": tiny_models.text_qwen3,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of small models of every kind, each with a tokenizer; ByT5 with its own."""
    from transformers import ByT5Tokenizer

    root, tokenizer = tmp_path_factory.mktemp("text"), tiny_models.chat_tokenizer()
    folders = {name: root / name.replace(" ", "_") for name in MODELS}
    for name, folder in folders.items():
        MODELS[name](len(tokenizer)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    folders["ByT5"] = root / "byt5"
    tiny_models.text_t5(384).save_pretrained(folders["ByT5"])
    ByT5Tokenizer().save_pretrained(folders["ByT5"])
    return folders


@pytest.fixture(scope="module")
def hunyuan(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's folder, as HunyuanVideo's: two encoders, their tokenizers beside them."""
    root = tmp_path_factory.mktemp("hunyuan")
    (root / "model_index.json").write_text("{}")
    for number, name in (("", "LLaMA"), ("_2", "CLIP")):
        for part in ("text_encoder", "tokenizer"):
            (root / f"{part}{number}").mkdir()
        for path in models[name].iterdir():
            part = "tokenizer" if "token" in path.name or "chat" in path.name else "text_encoder"
            (root / f"{part}{number}" / path.name).write_bytes(path.read_bytes())
    return root


def encoder(folder: Path, column: str = "text", **settings: Any) -> TextEncoder:
    options = {"model": str(folder), "dtype": "float32", **settings}
    return TextEncoder(TextOptions(**options), column=column)


def loaded(folder: Path, name: str) -> dict[str, Any]:
    """Return a pipeline's parts as it has them."""
    import transformers

    model = getattr(transformers, name).from_pretrained(folder, attn_implementation="sdpa").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return {"text_encoder": model, "tokenizer": tokenizer}


Rows = list[Tensor]


def kept(embeds: Tensor, mask: Tensor) -> Rows:
    return [vectors[present.bool()] for vectors, present in zip(embeds, mask, strict=True)]


def _wan(models: dict[str, Path]) -> Rows:
    from diffusers import WanPipeline

    parts = SimpleNamespace(**loaded(models["UMT5"], "UMT5EncoderModel"), _execution_device="cpu")
    embeds = WanPipeline._get_t5_prompt_embeds(parts, list(CAPTIONS), max_sequence_length=512)
    filled = embeds.abs().sum(-1) > 0
    assert (filled.int().diff(dim=1) <= 0).all()
    return kept(embeds, filled)


def _ltx2(models: dict[str, Path]) -> Rows:
    from diffusers import LTX2Pipeline

    model = loaded(models["Gemma 3, multimodal"], "Gemma3ForConditionalGeneration")
    parts = SimpleNamespace(**model, _execution_device="cpu")
    return kept(*LTX2Pipeline._get_gemma_prompt_embeds(parts, list(CAPTIONS)))


def _hunyuan(models: dict[str, Path]) -> Rows:
    from diffusers import HunyuanVideoPipeline
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

    parts = SimpleNamespace(**loaded(models["LLaMA"], "LlamaModel"), _execution_device="cpu")
    make = HunyuanVideoPipeline._get_llama_prompt_embeds
    return kept(*make(parts, list(CAPTIONS), DEFAULT_PROMPT_TEMPLATE))


def _hunyuan_clip(models: dict[str, Path]) -> Rows:
    from diffusers import HunyuanVideoPipeline

    found = {f"{k}_2": v for k, v in loaded(models["CLIP"], "CLIPTextModel").items()}
    parts = SimpleNamespace(**found, _execution_device="cpu")
    embeds = HunyuanVideoPipeline._get_clip_prompt_embeds(parts, list(CAPTIONS))
    return list(embeds[:, None])


def _hunyuan15(models: dict[str, Path]) -> Rows:
    from diffusers import HunyuanVideo15Pipeline

    parts = loaded(models["Qwen2.5-VL"], "Qwen2_5_VLModel")
    parts["text_encoder"] = parts["text_encoder"].language_model
    make = HunyuanVideo15Pipeline._get_mllm_prompt_embeds
    return kept(*make(**parts, prompt=list(CAPTIONS), device=torch.device("cpu")))


def _hunyuan15_glyph(models: dict[str, Path]) -> Rows:
    from diffusers import HunyuanVideo15Pipeline

    parts = loaded(models["ByT5"], "T5EncoderModel")
    make = HunyuanVideo15Pipeline._get_byt5_prompt_embeds
    return kept(*make(**parts, prompt=list(CAPTIONS), device=torch.device("cpu")))


def _qwen_image(models: dict[str, Path]) -> Rows:
    from diffusers import QwenImagePipeline

    parts = loaded(models["Qwen2.5-VL"], "Qwen2_5_VLForConditionalGeneration")
    whole = QwenImagePipeline(scheduler=None, vae=None, transformer=None, **parts)
    return kept(*whole._get_qwen_prompt_embeds(list(CAPTIONS), torch.device("cpu")))


def _cogvideox(models: dict[str, Path]) -> Rows:
    from diffusers import CogVideoXPipeline

    parts = SimpleNamespace(**loaded(models["T5"], "T5EncoderModel"), _execution_device="cpu")
    return list(CogVideoXPipeline._get_t5_prompt_embeds(parts, list(CAPTIONS)))


PIPELINES: dict[str, tuple[str, str, str, Callable[[dict[str, Path]], Rows]]] = {
    "wan": ("wan", "text", "UMT5", _wan),
    "ltx2": ("ltx2", "text", "Gemma 3, multimodal", _ltx2),
    "hunyuan": ("hunyuan", "text:llama", "LLaMA", _hunyuan),
    "hunyuan, pooled": ("hunyuan", "text:clip", "CLIP", _hunyuan_clip),
    "hunyuan15": ("hunyuan15", "text", "Qwen2.5-VL", _hunyuan15),
    "hunyuan15, glyphs": ("hunyuan15", "text:glyph", "ByT5", _hunyuan15_glyph),
    "qwen-image": ("qwen-image", "text:qwen", "Qwen2.5-VL", _qwen_image),
    "cogvideox": ("cogvideox", "text", "T5", _cogvideox),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_preset_gives_what_the_pipelines_own_function_gives(
    name: str, models: dict[str, Path]
) -> None:
    preset, column, model, make = PIPELINES[name]
    with torch.no_grad():
        wanted = make(models)
    found = encoder(models[model], column, preset=preset).encode(CAPTIONS)
    assert [len(caption.vectors) for caption in found] == [len(rows) for rows in wanted]
    assert sum(len(rows) for rows in wanted)
    for caption, rows in zip(found, wanted, strict=True):
        np.testing.assert_allclose(caption.vectors, rows.float().numpy(), atol=2e-5, rtol=1e-4)


def table(models: dict[str, Path]) -> str:
    """Return which model which preset takes, and what comes out, as the page of models has it."""
    presets: list[Any] = [None, *TEXT_PRESETS]
    lines = ["| text model | " + " | ".join(f"`{p}`" if p else "no preset" for p in presets) + " |"]
    lines.append("|---" * (len(presets) + 1) + "|")
    for name in MODELS:
        cells = []
        for preset in presets:
            try:
                recipe = encoder(models[name], preset=preset).recipe
            except ConfigError as err:
                assert f"preset {preset} has column text made by" in str(err)  # noqa: PT017
                cells.append("")
                continue
            kind = "quoted" if recipe.glyphs else "pooled" if recipe.pooled else "tokens"
            cells.append(kind)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def test_the_page_of_models_says_which_preset_takes_which_model(models: dict[str, Path]) -> None:
    page = Path(__file__).resolve().parents[1] / "docs" / "models.md"
    assert (found := table(models)) in page.read_text(), f"put into {page}:\n{found}"


def save_fixed_t5(folder: Path) -> None:
    """Save a T5 encoder and its tokenizer, every byte of which is known on any machine."""
    from transformers import T5Config, T5EncoderModel

    config = {
        "vocab_size": 8,
        "d_model": 8,
        "d_kv": 4,
        "d_ff": 8,
        "num_layers": 1,
        "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
        "is_encoder_decoder": False,
    }
    model = T5EncoderModel(T5Config(**config))
    with torch.no_grad():
        for weights in model.parameters():
            weights.copy_((torch.arange(weights.numel()) % 17 / 16 - 0.5).view_as(weights))
    model.save_pretrained(folder)
    named = {"model_type": "t5", "architectures": ["T5EncoderModel"], **config}
    (folder / "config.json").write_text(json.dumps(named))
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "a", "cat"])}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding")),
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        **dict.fromkeys(("post_processor", "decoder")),
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    marks = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **marks}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_columns_of_t5_that_stores_have_are_what_they_were(tmp_path: Path) -> None:
    save_fixed_t5(tmp_path)
    for preset in (None, "reducio"):
        column = TextColumn(encoder(tmp_path, preset=preset))
        assert column.describe([]).fingerprint == (
            "ea8da4a340c06922186db5fb7dd7eebb8355f6e39faf84e8fe98af5ae56e67d3"
        )


def test_template_and_layer_by_hand_go_before_those_of_a_preset(models: dict[str, Path]) -> None:
    from transformers import AutoModel, AutoTokenizer

    folder = models["Qwen3"]
    ours = encoder(folder, template="<|im_start|> the video of {} <|im_end|>", layer=-2)
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("<|im_start|> the video of a red fox <|im_end|>", return_tensors="pt")
    with torch.no_grad():
        wanted = model.eval()(**ids, output_hidden_states=True).hidden_states[-2][0, 4:]
    [found] = ours.encode(["a  red\tfox"])
    np.testing.assert_allclose(found.vectors, wanted, atol=1e-5)
    assert ours.config["drop"] == 4
    plain = encoder(models["LLaMA"], "text", preset="hunyuan", template="{}", layer="all")
    assert plain.encode(["a cat"])[0].vectors.shape == (3, 4 * 16)
    configs = [plain.config, encoder(models["LLaMA"], preset="hunyuan").config, ours.config]
    assert len({json.dumps(config) for config in configs}) == 3


def test_pooled_vectors_are_the_librarys(models: dict[str, Path]) -> None:
    from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

    for name, cls, field in (
        ("CLIP", CLIPTextModel, "pooler_output"),
        ("CLIP with projection", CLIPTextModelWithProjection, "text_embeds"),
    ):
        tokens = AutoTokenizer.from_pretrained(models[name])("a red fox", return_tensors="pt")
        with torch.no_grad():
            wanted = getattr(cls.from_pretrained(models[name]).eval()(**tokens), field)
        ours = encoder(models[name], "text:clip_pooled")
        np.testing.assert_allclose(ours.encode(["a red fox"])[0].vectors, wanted, atol=1e-5)
    [cut] = ours.encode(["a cat " * 100])
    assert (len(cut.vectors), cut.full_length) == (1, 1 + 201 - 77)


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ("T5", {"preset": "wan"}, "made by a model of type umt5; .* holds 't5'"),
        (
            "CLIP",
            {"preset": "hunyuan", "column": "text:llama"},
            "of type llama or llava; .* holds 'clip_",
        ),
        ("T5", {"column": "text_pooled"}, "has no pooled vector: text_pooled needs a CLIP model"),
        ("bare LLaMA", {"preset": "hunyuan"}, "no token <|start_header_id|>, which the template"),
        ("bare Qwen", {"preset": "hunyuan15"}, "has no chat template, which preset hunyuan15"),
        ("bare LLaMA", {"template": "<|x|>{}"}, "no token <|x|>"),
        ("no tokenizer", {"preset": "cogvideox"}, "has no tokenizer: no tokenizer.json"),
        ("LLaMA", {"layer": 4}, "layer is 4; .* hidden states 0 to 3, or -1 to -4"),
        ("LLaMA", {"layer": "last"}, "a whole number or all, got 'last'"),
        ("CLIP", {"preset": "hunyuan", "layer": -1}, "a pooled vector has none"),
        ("CLIP", {"max_tokens": 78}, "max_tokens is 78; .* takes 77"),
        ("T5", {"template": "no place"}, "must have {} once"),
        ("T5", {"preset": "sora"}, "preset is 'sora'; choose one of reducio, wan"),
        ("T5", {"model": ("./a", "./b")}, "names ./a and ./b for column text"),
    ],
)
def test_what_cannot_be_is_said_in_one_line_before_weights_are_read(
    model: str,
    settings: dict[str, Any],
    message: str,
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if model not in models:
        whole = {"bare LLaMA": "LLaMA", "bare Qwen": "Qwen2.5-VL", "no tokenizer": "T5"}[model]
        for path in models[whole].iterdir():
            if "token" not in path.name and "chat" not in path.name:
                (tmp_path / path.name).write_bytes(path.read_bytes())
        if model != "no tokenizer":
            tiny_models.plain_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr("reducio_latents.conditioning.text.load_strictly", None)
    with pytest.raises(ConfigError, match=message.replace("|", r"\|")) as refused:
        encoder(models.get(model, tmp_path), **settings)
    assert "\n" not in str(refused.value)


def test_a_model_may_be_named_for_a_column() -> None:
    options = TextOptions(model=("clip=a/b", "models/c=d"))
    assert options.model_of("text:clip") == options.model_of("text:clip_pooled") == "a/b"
    assert options.model_of("text:t5") == options.model_of("text") == "models/c=d"
    assert TextOptions(model="clip=a").model_of("text") is None


def test_estimates_know_how_large_the_text_of_a_preset_is() -> None:
    def estimate(column: str, **text: Any) -> int:
        options = EncodeOptions(columns=(column,), text=TextOptions(**text))
        return bytes_per_clip(Bucket(16, 256, 256), options)

    assert estimate("text:own") == estimate("text") == 2 * 45 * 4096
    assert estimate("text", preset="cogvideox") == 2 * 226 * 4096
    assert estimate("text", preset="ltx2") > 10**7 > 10**4 > estimate("text:clip", preset="hunyuan")


SETTINGS: dict[str, Any] = {"batch_size": 2, "device": "cpu"}
SAID = ("the red fox runs", "", "a blue cat at night")


@pytest.fixture(scope="module")
def store(hunyuan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with two columns of text by name, and a third one that was added later."""
    root, captions = tmp_path_factory.mktemp("store"), [(text,) if text else () for text in SAID]
    spec: dict[str, Any] = {
        "videos": 3,
        "clips_per_video": 1,
        "buckets": ("16x32x32",),
        "columns": ("caption",),
    }
    write_store(root / "store", captions=captions.__getitem__, **spec)
    text = TextOptions(model=str(hunyuan), preset="hunyuan", dtype="float32")
    add_column(root / "store", ["text:llama", "text:clip"], text=text, **SETTINGS)
    more = ["--text-model", str(hunyuan / "text_encoder"), "--text-dtype", "float32"]
    result = CliRunner().invoke(main, ["add-column", str(root / "store"), "text:plain", *more])
    assert result.exit_code == 0, result.output
    return root / "store"


def test_several_columns_of_text_stand_side_by_side(
    store: Path, hunyuan: Path, tmp_path: Path
) -> None:
    names = ("text:llama", "text:clip", "text:plain")
    opened = open_store(store)
    assert verify(opened).ok
    assert {*names} < {*opened.columns}
    assert all(":" not in str(path.relative_to(store)) for path in store.rglob("*"))
    assert "16x32x32/text.llama" in zarr.open_group(store, mode="r")
    assert opened.meta.statistics["text:clip/all"]["tokens"]["mean"] == [1.0]

    convert_store(opened, LocalFiles(tmp_path / "tars"), "webdataset")
    assert verify(open_store(tmp_path / "tars")).ok
    for place in (store, tmp_path / "tars"):
        dataset = LatentDataset(place, columns=["caption", *names], batch_size=3)
        batch = next(iter(dataset))
        order = [SAID.index(caption) for caption in batch["caption"]]
        assert batch["text:clip"].shape == (3, 16)
        assert batch["text:plain"].shape == (3, 6, 16)
        assert batch["text:plain_mask"].sum(1).tolist() == [[5, 1, 6][i] for i in order]
        row = order.index(2)
        wanted = encoder(hunyuan, "text:llama", preset="hunyuan").encode(["a blue cat at night"])
        kept_rows = batch["text:llama"][row][batch["text:llama_mask"][row]]
        np.testing.assert_allclose(kept_rows, wanted[0].vectors, atol=2e-3)
        assert tuple(LatentTable(place, columns=["text:clip"])[0]["text:clip"].shape) == (16,)

    text = TextOptions(model=str(hunyuan), preset="hunyuan", dtype="float32", values="bfloat16")
    with pytest.raises(StoreError, match="--replace text:clip"):
        add_column(tmp_path / "tars", ["text:clip"], text=text, **SETTINGS)
    add_column(tmp_path / "tars", replacing=["text:clip"], text=text, **SETTINGS)
    assert verify(open_store(tmp_path / "tars")).ok
    with pytest.raises(ConfigError, match="no column text:t5 to make"):
        add_column(store, ["text:x"], text=TextOptions(model="t5=./nowhere"), **SETTINGS)
    with pytest.raises(ConfigError, match="text preset is for columns of text"):
        add_column(store, ["caption"], text=TextOptions(preset="wan"), **SETTINGS)
    for name in ("text:", "text:a/b", "text:x_mask", "text.x"):
        with pytest.raises(ConfigError, match="there is no column"):
            add_column(store, [name], **SETTINGS)


def test_dropped_texts_are_the_empty_captions_of_every_column(store: Path) -> None:
    names = ["text:llama", "text:clip", "text:plain"]
    batch = next(iter(LatentDataset(store, columns=["caption", *names], batch_size=3)))
    whole = LatentDataset(store, columns=["caption", *names], batch_size=3, text_dropout=1.0)
    none = next(iter(whole))
    assert none["caption"] == [""] * 3
    assert not any(torch.equal(none[name], batch[name]) for name in names)
    assert (none["text:clip"] == whole.empty_caption("text:clip")).all()
    assert (none["text:plain"] == whole.empty_caption("text:plain")).all()
    assert none["text:plain_mask"].all()
    some = LatentDataset(store, columns=names[1:2], batch_size=3, text_dropout=0.5, seed=1)
    draws = [batch["text:clip"] for epoch in range(12) for batch in _epoch(some, epoch)]
    again = [batch["text:clip"] for epoch in range(12) for batch in _epoch(some, epoch)]
    assert all(map(torch.equal, draws, again))
    empty = sum(int((rows == whole.empty_caption("text:clip")).all(1).sum()) for rows in draws)
    assert 12 < empty < 36  # a third have no caption anyhow
    with pytest.raises(ConfigError, match="a share from 0 to 1"):
        LatentDataset(store, columns=names, batch_size=3, text_dropout=1.5)


def _epoch(dataset: LatentDataset, epoch: int) -> list[Any]:
    dataset.set_epoch(epoch)
    return list(dataset)


def test_texts_that_are_padded_at_the_left_end_together() -> None:
    rows = [np.ones((2, 4), np.float32), np.full((3, 4), 2, np.float32)]
    padded, mask = pad_vectors(rows, None, at_left=True)
    assert mask.tolist() == [[False, True, True], [True, True, True]]
    assert padded[0, :, 0].tolist() == [0, 1, 1]
    assert pad_vectors(rows, 4, at_left=True)[1].sum(1).tolist() == [2, 3]

"""How the text of a diffusion model is made: a table, a row for each text encoder of a model.

Sources: the pipelines of diffusers 0.42, whose constants these are; the tests hold every row
against the pipeline's own function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from reducio_latents.core.choices import TextCleaning, TextLayer, TextPreset

CAPTION_MARK = "{}"
"""Where a template takes the caption."""
_ASPECTS = (
    "1. The main content and theme of the video.",
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects.",
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the "
    "objects.",
    "4. background environment, light, style and atmosphere.",
    "5. camera angles, movements, and transitions used in the video",
)
_HUNYUAN = (
    "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following "
    f"aspects: {''.join(_ASPECTS)}:<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{{}}"
    "<|eot_id|>"
)
_HUNYUAN_15 = (
    "You are a helpful assistant. Describe the video by detailing the following aspects: "
    f"        {'         '.join(_ASPECTS)}."
)
_QWEN_IMAGE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity,"
    " text, spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}"
    "<|im_end|>\n<|im_start|>assistant\n"
)


@dataclass(frozen=True, kw_only=True)
class TextRecipe:
    """What becomes of a caption on its way to vectors."""

    models: tuple[str, ...] = ()
    """The `model_type` of configs that it is for; any if there is none."""
    hub: str = "DeepFloyd/t5-v1_1-xxl"
    """Where the model is, if nothing is said."""
    part: str = "text_encoder"
    """Its folder in a pipeline; the tokenizer's is called alike."""
    width: int = 4096
    """Of the vectors that the model there gives, for estimates."""
    cleaning: TextCleaning = "whitespace"
    strips: bool = False
    """Whether spaces at the ends are left out, whatever the cleaning."""
    max_tokens: int = 120
    """Tokens of the caption, its template's prefix not counted; longer ones are cut."""
    template: str = CAPTION_MARK
    chat: bool = False
    """Whether `template` is a system message, and the tokenizer knows how a chat is written."""
    drop: int | None = 0
    """Tokens at the beginning whose vectors are left out; None: those that every caption has."""
    layer: TextLayer | None = None
    """Index into the hidden states, which begin with the embeddings; None: what the model gives."""
    padding_side: Literal["right", "left"] = "right"
    """Where batches are padded."""
    pads: bool = False
    """Whether captions are filled up to `max_tokens`, and the filling is seen and kept."""
    pooled: bool = False
    """One vector a caption, the model's own."""
    projected: bool = False
    """Whether that is the one after CLIP's projection."""
    glyphs: bool = False
    """Only what stands between double quotes in the caption is encoded."""

    def told(self) -> dict[str, Any]:
        """Return, for a fingerprint, what of the way to vectors is not the usual."""
        usual = TextRecipe()
        said = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _TOLD_APART}
        return {name: value for name, value in said.items() if value != getattr(usual, name)}


_TOLD_APART = ("models", "hub", "part", "width", "cleaning", "max_tokens")
T5 = TextRecipe(models=("t5",), cleaning="pixart")
_QWEN = ("qwen2_5_vl", "qwen2_5_vl_text")

TEXT_PRESETS: dict[TextPreset, dict[str, TextRecipe]] = {
    "reducio": {"t5": T5},
    "wan": {
        "umt5": TextRecipe(models=("umt5",), hub="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", max_tokens=512)
    },
    "ltx2": {
        "gemma": TextRecipe(
            models=("gemma3", "gemma3_text"),
            hub="Lightricks/LTX-2",
            width=49 * 3840,
            cleaning="none",
            strips=True,
            max_tokens=1024,
            layer="all",
            padding_side="left",
        )
    },
    "hunyuan": {
        "llama": TextRecipe(
            models=("llama", "llava"),
            hub="hunyuanvideo-community/HunyuanVideo",
            cleaning="none",
            max_tokens=256,
            template=_HUNYUAN,
            drop=95,
            layer=-3,
        ),
        "clip": TextRecipe(
            models=("clip", "clip_text_model"),
            hub="hunyuanvideo-community/HunyuanVideo",
            part="text_encoder_2",
            width=768,
            cleaning="none",
            max_tokens=77,
            pooled=True,
        ),
    },
    "hunyuan15": {
        "qwen": TextRecipe(
            models=_QWEN,
            width=3584,
            hub="hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v",
            cleaning="none",
            max_tokens=1000,
            template=_HUNYUAN_15,
            chat=True,
            drop=108,
            layer=-3,
        ),
        "glyph": TextRecipe(
            models=("t5",),
            hub="hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v",
            part="text_encoder_2",
            width=1472,
            cleaning="none",
            max_tokens=256,
            glyphs=True,
        ),
    },
    "qwen-image": {
        "qwen": TextRecipe(
            models=_QWEN,
            width=3584,
            hub="Qwen/Qwen-Image",
            cleaning="none",
            max_tokens=1024,
            template=_QWEN_IMAGE,
            drop=34,
            layer=-1,
        )
    },
    "cogvideox": {
        "t5": TextRecipe(
            models=("t5",), hub="THUDM/CogVideoX-2b", cleaning="none", max_tokens=226, pads=True
        )
    },
}
"""Preset -> name of a text encoder, which a column `text:NAME` may ask for -> how it is used. The
first one is that of the column `text`."""


def recipes_of(preset: TextPreset | None, name: str) -> list[TextRecipe]:
    """Return how a column `text:NAME` may be made, by the model that it is given; one or more."""
    table = TEXT_PRESETS[preset] if preset else {"": TextRecipe()}
    return [table[name]] if name in table else list(table.values())


def made_as(config: Mapping[str, Any], preset: TextPreset | None) -> bool:
    """Whether a column of text, by its config, has vectors such as a preset gives; any for None.

    Which captions were cut, and how they were cleaned, is not looked at.
    """
    recipes = TEXT_PRESETS[preset].values() if preset else ()
    names = [f.name for f in fields(TextRecipe) if f.name not in _TOLD_APART]
    said = {name: config[name] for name in names if name in config}
    return not recipes or any(recipe.told() == said for recipe in recipes)

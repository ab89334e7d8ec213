"""Text encoders of transformers: captions in, token vectors out, unpadded."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reducio_latents.autoencoders.pretrained import (
    describe_config,
    digest_of,
    digest_of_files,
    find_model,
    load_strictly,
    read_config,
)
from reducio_latents.conditioning.cleaning import REVISIONS, get_cleaning
from reducio_latents.conditioning.options import POOLED_SUFFIX, TextOptions, text_name
from reducio_latents.conditioning.precision import FrozenEncoder, place_encoder
from reducio_latents.conditioning.presets import CAPTION_MARK, T5, TextRecipe, recipes_of
from reducio_latents.core.devices import usable_device
from reducio_latents.core.libraries import first_line, import_library
from reducio_latents.core.regular import require_files
from reducio_latents.errors import ConfigError, WeightsError
from reducio_latents.store.text_rows import CaptionTokens

log = logging.getLogger(__name__)

ENCODER_CLASSES = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
}
"""`model_type` of a config -> the class that is its text encoder; for others, `AutoModel`."""
PROJECTED = "CLIPTextModelWithProjection"
"""The class that pools otherwise, where a config names it."""
BESIDE_ENCODER = (
    r"decoder\.",
    r"(.*\.)?lm_head\.",
    r"vision_model\.",
    r"visual_projection\.",
    r"text_projection\.",
    r"logit_scale",
    r".*position_ids$",
)
"""Keys of a whole model that its text encoder does not have."""
BESIDE_PROJECTED = tuple(key for key in BESIDE_ENCODER if "text_projection" not in key)
VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*")
TOKENIZER_FILES = (*VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "merges.txt")
MAX_BATCH_TOKENS = 8192
"""Tokens in one pass, padding included; bounds memory."""
MARKS = re.compile(r"<\|[^<>|]+\|>")
"""Tokens that a template names."""
PROBE_CAPTION = "a red fox runs through fresh snow at sunrise, slow motion"
PROBE_WORDS = ("a", "7", "É")
"""Captions whose first tokens differ."""
ROOMY = 2.0**14
"""Values beyond it leave float16 too little room: they are stored as bfloat16."""


class TextEncoder(FrozenEncoder):
    """A frozen text encoder and its tokenizer, on one device, for a column."""

    def __init__(
        self, options: TextOptions, device: torch.device | str = "cpu", column: str = "text"
    ) -> None:
        self.options = options
        recipe, folder, config = _find(options, column)
        transformers = import_library("transformers")
        text_config = _text_config(transformers, folder)
        self.tokenizer, tokenizer_folder = _load_tokenizer(transformers, folder)
        # What is wrong with the way to vectors is said before gigabytes are read.
        self.recipe = self._by_hand(recipe, folder, text_config)
        self._clean = get_cleaning(self.recipe.cleaning)
        self._warned = False
        self._settle_template(tokenizer_folder)
        model = _load_model(transformers, folder, config, self.recipe)
        self._vocabulary = int(model.get_input_embeddings().num_embeddings)
        if self.tokenizer.vocab_size > self._vocabulary:
            raise ConfigError(
                f"{tokenizer_folder} knows {self.tokenizer.vocab_size} tokens, {folder} only "
                f"{self._vocabulary}: it is another model's tokenizer. Copy the right one."
            )
        self.name = f"transformers:{type(model).__name__}"
        self.identity = {
            "model": describe_config(config),
            "weights_sha256": digest_of(model),
            "tokenizer_sha256": digest_of_files(tokenizer_folder, TOKENIZER_FILES),
            "cleaning": REVISIONS.get(self.recipe.cleaning, self.recipe.cleaning),
            "max_tokens": self.recipe.max_tokens,
            **self.recipe.told(),
        }
        model = model.eval().requires_grad_(False)
        where = usable_device(device)
        self.model, self.dtype, self.error = place_encoder(model, options.dtype, where, self._probe)
        self.empty = self._encode_cleaned([""])[""]
        probed, empty = self._probe(self.model).abs(), np.abs(self.empty.vectors)
        roomy = probed.max().item() < ROOMY and empty.max(initial=0) < ROOMY
        self.values = options.values or ("float16" if roomy else "bfloat16")

    @property
    def dim(self) -> int:
        """Length of a token's vector."""
        return int(self.empty.vectors.shape[1])

    def encode(self, captions: Sequence[str]) -> list[CaptionTokens]:
        """Return the token vectors of each caption; equal captions are encoded once.

        Captions are cleaned, cut to `max_tokens` (the tokenizer keeps its end mark), and encoded
        beside others of about their length; padding takes no part. One that nothing is left of is
        `empty`, to the bit.
        """
        cleaned = [self._clean(caption) for caption in captions]
        if self.recipe.strips:
            cleaned = [caption.strip() for caption in cleaned]
        if self.recipe.glyphs:
            cleaned = [glyphs_of(caption) for caption in cleaned]
        found = self._encode_cleaned([c for c in dict.fromkeys(cleaned) if c]) | {"": self.empty}
        return [found[caption] for caption in cleaned]

    def _encode_cleaned(self, unique: Sequence[str]) -> dict[str, CaptionTokens]:
        if not unique:
            return {}
        ids, cut = self._tokenize(unique)
        found: dict[str, CaptionTokens] = {}
        order = sorted(range(len(unique)), key=lambda i: (len(ids[i]), i))
        for group in _groups(order, ids):
            vectors = self._forward(self.model, [ids[i] for i in group])
            for i, values in zip(group, vectors, strict=True):
                found[unique[i]] = CaptionTokens(values.cpu().numpy(), len(values) + cut[i])
        return found

    def _tokenize(self, captions: Sequence[str]) -> tuple[list[list[int]], list[int]]:
        """Return the tokens of each caption in its template, and how many were cut off it."""
        if self.recipe.glyphs and captions == [""]:  # no quotes: not even an end mark
            return [[]], [0]
        limit = self.recipe.max_tokens + (self.recipe.drop or 0)  # with the template
        limit = min(limit, self._room or limit)
        texts = [self._filled(caption) for caption in captions]
        padding = "max_length" if self.recipe.pads else False
        ids = self._ids(texts, truncation=True, max_length=limit, padding=padding)
        cut = [0] * len(ids)
        for i, text in enumerate(texts):
            if len(ids[i]) == limit:
                full = len(self._ids([text], verbose=False)[0])
                cut[i] = max(0, full - limit)
                if cut[i] and not self._warned:
                    self._warned = True
                    log.warning(
                        "a caption has %d tokens, the first %d are kept; the share of cut captions "
                        "is among the store's statistics. It begins: %.60s",
                        full,
                        limit,
                        captions[i],
                    )
        # A tokenizer may have tokens of pictures, say, that the text model has no vectors of.
        return [[token for token in tokens if token < self._vocabulary] for tokens in ids], cut

    def _ids(self, texts: Sequence[str], **settings: Any) -> list[list[int]]:
        if self.recipe.chat:  # it writes all marks itself
            settings["add_special_tokens"] = False
        found: list[list[int]] = self.tokenizer(list(texts), **settings)["input_ids"]
        return found

    def _filled(self, caption: str) -> str:
        """Return a caption in its template."""
        if not self.recipe.chat:
            return self.recipe.template.replace(CAPTION_MARK, caption)
        chat = [
            {"role": "system", "content": self.recipe.template},
            {"role": "user", "content": caption or " "},
        ]
        text: str = self.tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True
        )
        return text

    @torch.inference_mode()
    def _forward(self, model: Any, ids: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return the vectors of each caption, float32 (its tokens, dim)."""
        lengths = [len(tokens) for tokens in ids]
        longest = max(lengths)
        layer, drop = self.recipe.layer, self.recipe.drop or 0
        if longest == 0:
            states = model.config.num_hidden_layers + 1 if layer == "all" else 1
            return [torch.zeros(0, states * model.config.hidden_size) for _ in ids]
        tokens = np.zeros((len(ids), longest), np.int64)
        mask = np.zeros((len(ids), longest), np.int64)
        for row, caption in enumerate(ids):
            tokens[row, : len(caption)] = caption
            mask[row, : len(caption)] = 1
        device = next(model.parameters()).device
        output = model(
            input_ids=torch.from_numpy(tokens).to(device),
            attention_mask=torch.from_numpy(mask).to(device),
            **({} if layer is None else {"output_hidden_states": True}),
        )
        if self.recipe.pooled:
            name = "text_embeds" if "text_embeds" in output else "pooler_output"
            return list(output[name].float()[:, None])
        if layer is None:
            hidden = output.last_hidden_state
        elif layer == "all":
            hidden = torch.stack(output.hidden_states, dim=-1).flatten(2)
        else:
            hidden = output.hidden_states[layer]
        return [hidden[row, drop:length].float() for row, length in enumerate(lengths)]

    def _probe(self, model: Any) -> Tensor:
        return self._forward(model, self._tokenize([PROBE_CAPTION])[0])[0]

    def _by_hand(self, recipe: TextRecipe, folder: Path, config: Any) -> TextRecipe:
        """Return the recipe with what was set by hand; raise ConfigError for what cannot be."""
        options = self.options
        hand: dict[str, Any] = {
            "cleaning": options.cleaning,
            "max_tokens": options.max_tokens,
            "layer": options.layer,
            "template": options.template,
        }
        if options.template is not None:
            hand |= {"chat": False, "drop": None if options.template != CAPTION_MARK else 0}
        states, layer = config.num_hidden_layers, options.layer
        if isinstance(layer, int) and not -states - 1 <= layer <= states:
            raise ConfigError(
                f"text layer is {layer}; {folder} has hidden states 0 to {states}, or -1 to "
                f"{-states - 1} from the end."
            )
        if recipe.pooled and layer is not None:
            raise ConfigError("text layer is for tokens; a pooled vector has none. Leave it out.")
        room = config.max_position_embeddings if config.model_type == "clip_text_model" else None
        if room is not None and (options.max_tokens or 0) > room:
            raise ConfigError(f"text max_tokens is {options.max_tokens}; {folder} takes {room}.")
        if recipe.pads and self.tokenizer.pad_token is None:
            raise ConfigError(f"{folder}: its tokenizer has no token to fill captions up with.")
        self._room = room
        return replace(recipe, **{k: v for k, v in hand.items() if v is not None or k == "drop"})

    def _settle_template(self, tokenizer_folder: Path) -> None:
        """Settle how many tokens are left out; raise ConfigError if the tokenizer lacks some."""
        recipe = self.recipe
        if recipe.chat and not self.tokenizer.chat_template:
            raise ConfigError(
                f"{tokenizer_folder} has no chat template, which preset {self.options.preset} "
                "needs. Copy chat_template.jinja or the whole tokenizer of its model."
            )
        if recipe.template == CAPTION_MARK:
            return
        known = self.tokenizer.get_vocab()
        lacking = [mark for mark in MARKS.findall(self._filled("")) if mark not in known]
        if lacking:
            raise ConfigError(
                f"{tokenizer_folder} has no token {lacking[0]}, which the template needs: it is of "
                "another model. Give the model with its own tokenizer, or another template."
            )
        several = zip(*self._ids([self._filled(word) for word in PROBE_WORDS]), strict=False)
        shared = len(list(takewhile(lambda tokens: len(set(tokens)) == 1, several)))
        if recipe.drop is None:
            self.recipe = replace(recipe, drop=shared)
        elif recipe.drop != shared:
            log.warning(
                "the template of preset %s begins with %d tokens in %s; %d are left out, as of its "
                "own tokenizer. Is it another model's?",
                self.options.preset,
                shared,
                tokenizer_folder,
                recipe.drop,
            )


def glyphs_of(caption: str) -> str:
    """Return what a caption says is to be read in the picture: `Text "A". Text "B". `, or nothing.

    It stands between double quotes, straight or curly; each is named once.
    """
    found = re.findall(r'"([^"\n]*)"|\u201c([^\u201d\n]*)\u201d', caption)
    return "".join(f'Text "{text}". ' for text in dict.fromkeys(a or b for a, b in found))


def _find(options: TextOptions, column: str) -> tuple[TextRecipe, Path, dict[str, Any]]:
    """Return how a column's text is made, and where its model is; raise ConfigError for none."""
    model, recipes = options.model_of(column), recipes_of(options.preset, text_name(column))
    for recipe in recipes:
        folder = find_model(model or recipe.hub, part=recipe.part)
        if folder.is_file():
            raise ConfigError(f"{folder} is a file; give the folder of a text encoder.")
        config = read_config(folder)
        kind = str(config.get("model_type"))
        if kind in recipe.models or not recipe.models:
            break
    else:
        wanted = " or ".join(dict.fromkeys(kind for row in recipes for kind in row.models))
        raise ConfigError(
            f"preset {options.preset} has column {column} made by a model of type {wanted}; "
            f"{folder} holds {kind!r}. Give its own text encoder, or leave the preset out."
        )
    if not options.preset and kind == "t5":
        recipe = T5
    if column.endswith(POOLED_SUFFIX) and not recipe.pooled:
        projected = PROJECTED in (config.get("architectures") or [])
        recipe = replace(recipe, pooled=True, projected=projected)
    if recipe.pooled and not kind.startswith("clip"):
        raise ConfigError(
            f"{folder} holds {kind!r}, which has no pooled vector: {column} needs a CLIP model."
        )
    return recipe, folder, config


def _text_config(transformers: Any, folder: Path) -> Any:
    """Return the library's config of the text model, which may be a part of the whole model's."""
    try:
        return transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        ).get_text_config()
    # Foreign code reads foreign files here; whatever it raises says the same of the folder.
    except Exception as err:
        raise WeightsError(
            f"{folder} cannot be loaded as a text encoder: {first_line(err)}. Give the folder of "
            "one of transformers."
        ) from err


def _load_model(
    transformers: Any, folder: Path, config: Mapping[str, Any], recipe: TextRecipe
) -> Any:
    """Load what turns tokens into vectors, in float32; of a model of pictures too, that part."""
    name = ENCODER_CLASSES.get(str(config.get("model_type")), "AutoModel")
    model = load_strictly(
        getattr(transformers, PROJECTED if recipe.projected else name).from_pretrained,
        folder,
        allowed=BESIDE_PROJECTED if recipe.projected else BESIDE_ENCODER,
        dtype=torch.float32,
        trust_remote_code=False,
    )
    return model.get_decoder() if name == "AutoModel" and "text_config" in config else model


def _load_tokenizer(transformers: Any, folder: Path) -> tuple[Any, Path]:
    """Load the tokenizer in `folder`, or of a pipeline the one in the folder beside it."""
    beside = folder.with_name(folder.name.replace("text_encoder", "tokenizer"))
    places = [place for place in (folder, beside) if _has_tokenizer(place)]
    if not places:  # the library would make one up that knows no word
        raise ConfigError(
            f"{folder} has no tokenizer: no tokenizer.json, *.model or vocab file, there or in "
            f"{beside}. Copy the tokenizer's files beside the text encoder."
        )
    place = places[0]
    try:
        require_files(place)
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            place, local_files_only=True, trust_remote_code=False
        )
    # Foreign code reads foreign files here; whatever it raises says the same of the folder.
    except Exception as err:
        raise ConfigError(
            f"{place} has no tokenizer that can be loaded: {first_line(err)}. Copy the tokenizer's "
            "files beside the text encoder."
        ) from err
    return tokenizer, place


def _has_tokenizer(folder: Path) -> bool:
    if any(next(folder.glob(name), None) for name in VOCABULARIES):
        return True
    settings = folder / "tokenizer_config.json"
    told = read_config(folder, settings.name) if settings.is_file() else {}
    return str(told.get("tokenizer_class")).startswith("ByT5")  # whose tokens are bytes


def _groups(order: Sequence[int], ids: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Cut captions, shortest first, into passes of at most `MAX_BATCH_TOKENS` padded tokens."""
    group: list[int] = []
    for i in order:
        if group and (len(group) + 1) * len(ids[i]) > MAX_BATCH_TOKENS:
            yield group
            group = []
        group.append(i)
    if group:
        yield group

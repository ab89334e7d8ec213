"""Text encoders of transformers: captions in, token vectors out, unpadded."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
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
from reducio_latents.conditioning.options import TextOptions
from reducio_latents.conditioning.precision import place_encoder
from reducio_latents.core.devices import usable_device
from reducio_latents.core.libraries import first_line, import_library
from reducio_latents.errors import ConfigError
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
BESIDE_ENCODER = (
    r"decoder\.",
    r"lm_head\.",
    r"vision_model\.",
    r"visual_projection\.",
    r"text_projection\.",
    r"logit_scale",
    r".*position_ids$",
)
"""Keys of a whole model that its text encoder does not have."""
VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*")
TOKENIZER_FILES = (*VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "merges.txt")
MAX_BATCH_TOKENS = 8192
"""Tokens in one pass, padding included; bounds memory."""
PROBE_CAPTION = "a red fox runs through fresh snow at sunrise, slow motion"


class TextEncoder:
    """A frozen text encoder and its tokenizer, on one device."""

    model: Any

    def __init__(self, options: TextOptions, device: torch.device | str = "cpu") -> None:
        folder = find_model(options.model, part="text_encoder")
        if folder.is_file():
            raise ConfigError(f"{folder} is a file; give the folder of a text encoder.")
        config = read_config(folder)
        transformers = import_library("transformers")
        name = ENCODER_CLASSES.get(str(config.get("model_type")), "AutoModel")
        model = load_strictly(
            getattr(transformers, name).from_pretrained,
            folder,
            allowed=BESIDE_ENCODER,
            dtype=torch.float32,
            trust_remote_code=False,
        )
        self.tokenizer, tokenizer_folder = _load_tokenizer(transformers, folder)
        vocabulary = model.get_input_embeddings().num_embeddings
        if len(self.tokenizer) > vocabulary:
            raise ConfigError(
                f"{tokenizer_folder} knows {len(self.tokenizer)} tokens, {folder} only "
                f"{vocabulary}: it is another model's tokenizer. Copy the right one."
            )
        self.name = f"transformers:{type(model).__name__}"
        self.options = options
        self._clean = get_cleaning(options.cleaning)
        self._warned = False
        self._identity = {
            "model": describe_config(config),
            "weights_sha256": digest_of(model),
            "tokenizer_sha256": digest_of_files(tokenizer_folder, TOKENIZER_FILES),
            "cleaning": REVISIONS.get(options.cleaning, options.cleaning),
            "max_tokens": options.max_tokens,
        }
        model = model.eval().requires_grad_(False)
        where = usable_device(device)
        self.model, self.dtype, self.error = place_encoder(model, options.dtype, where, self._probe)
        self.empty = self._encode_cleaned([""])[""]

    @property
    def dim(self) -> int:
        """Length of a token's vector."""
        config = self.model.config
        return int(getattr(config, "d_model", None) or config.hidden_size)

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def config(self) -> dict[str, Any]:
        """All that changes numbers, as JSON."""
        precision = {"dtype": str(self.dtype).removeprefix("torch."), "device": self.device.type}
        return {**self._identity, "precision": precision}

    def encode(self, captions: Sequence[str]) -> list[CaptionTokens]:
        """Return the token vectors of each caption; equal captions are encoded once.

        Captions are cleaned, cut to `max_tokens` (the tokenizer keeps its end mark), and encoded
        beside others of about their length; padding takes no part. One that nothing is left of is
        `empty`, to the bit.
        """
        cleaned = [self._clean(caption) for caption in captions]
        found = self._encode_cleaned([c for c in dict.fromkeys(cleaned) if c]) | {"": self.empty}
        return [found[caption] for caption in cleaned]

    def _encode_cleaned(self, unique: Sequence[str]) -> dict[str, CaptionTokens]:
        if not unique:
            return {}
        ids, lengths = self._tokenize(unique)
        found: dict[str, CaptionTokens] = {}
        order = sorted(range(len(unique)), key=lambda i: (len(ids[i]), i))
        for group in _groups(order, ids):
            vectors = _forward(self.model, [ids[i] for i in group])
            for i, values in zip(group, vectors, strict=True):
                found[unique[i]] = CaptionTokens(values.cpu().numpy(), lengths[i])
        return found

    def _tokenize(self, captions: Sequence[str]) -> tuple[list[list[int]], list[int]]:
        limit = self.options.max_tokens
        ids: list[list[int]] = self._ids(captions, truncation=True, max_length=limit)
        lengths = [len(tokens) for tokens in ids]
        for i, caption in enumerate(captions):
            if lengths[i] == limit:
                lengths[i] = len(self._ids([caption], verbose=False)[0])
                if lengths[i] > limit and not self._warned:
                    self._warned = True
                    log.warning(
                        "a caption has %d tokens, the first %d are kept; the share of cut captions "
                        "is among the store's statistics. It begins: %.60s",
                        lengths[i],
                        limit,
                        caption,
                    )
        return ids, lengths

    def _ids(self, captions: Sequence[str], **settings: Any) -> list[list[int]]:
        found: list[list[int]] = self.tokenizer(list(captions), **settings)["input_ids"]
        return found

    def _probe(self, model: Any) -> Tensor:
        return _forward(model, self._tokenize([PROBE_CAPTION])[0])[0]


def _load_tokenizer(transformers: Any, folder: Path) -> tuple[Any, Path]:
    """Load the tokenizer in `folder`, or of a pipeline the one in the folder beside it."""
    beside = folder.with_name(folder.name.replace("text_encoder", "tokenizer"))
    places = [p for p in (folder, beside) if any(next(p.glob(v), None) for v in VOCABULARIES)]
    if not places:  # the library would make one up that knows no word
        raise ConfigError(
            f"{folder} has no tokenizer: no tokenizer.json, *.model or vocab file, there or in "
            f"{beside}. Copy the tokenizer's files beside the text encoder."
        )
    place = places[0]
    try:
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


@torch.inference_mode()
def _forward(model: Any, ids: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return the vectors of each caption, float32 (its tokens, dim)."""
    lengths = [len(tokens) for tokens in ids]
    longest = max(lengths)
    if longest == 0:
        dim = int(getattr(model.config, "d_model", None) or model.config.hidden_size)
        return [torch.zeros(0, dim) for _ in ids]
    tokens = np.zeros((len(ids), longest), np.int64)
    mask = np.zeros((len(ids), longest), np.int64)
    for row, caption in enumerate(ids):
        tokens[row, : len(caption)] = caption
        mask[row, : len(caption)] = 1
    device = next(model.parameters()).device
    hidden = model(
        input_ids=torch.from_numpy(tokens).to(device),
        attention_mask=torch.from_numpy(mask).to(device),
    ).last_hidden_state.float()
    return [hidden[row, :length] for row, length in enumerate(lengths)]

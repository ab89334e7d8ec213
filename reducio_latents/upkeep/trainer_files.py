"""What other trainers read in place of videos: one row a format, and how a clip becomes its files.

Where a trainer normalises latents itself, it is given them raw, and where it does not, final. The
layouts are those of the trainers' own readers: FastVideo's LatentsParquetMapStyleDataset,
musubi-tuner's VideoDataset, finetrainers' PrecomputedOnceDataIterable (a folder for
`--precomputation_dir`, with `--precomputation_reuse`), the PrecomputedDataset of LTX-Video-Trainer
and of LTX-2's trainer, and, as `diffusers-pt`, the tensors that CogVideoX-factory's scripts for
diffusers take with `--load_tensors`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from reducio_latents.core.choices import TextPreset, TrainerFormat
from reducio_latents.core.gaussian import FinalRule, apply_final_rule
from reducio_latents.core.geometry import Bucket

Latents = Literal["moments", "mean", "final"]
"""Raw mean and log-variance; the raw mean; the mean as a diffusion model sees it."""
SAFETENSORS_TYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
JOINED_CLIPS = 32
"""Clips in a file that holds several, all in memory at once."""


@dataclass(frozen=True)
class TrainedFamily:
    """Models that share an autoencoder, as trainers tell them apart."""

    name: str
    tokens: tuple[str, ...] = ()
    """Classes of transformers whose token vectors the model is conditioned on."""
    pooled: tuple[str, ...] = ()
    """Classes of those whose one vector a caption it takes beside them."""
    preset: TextPreset | None = None
    """How text has to be made, where another layer or template would be taken unseen."""
    pads: bool = False
    """Whether it is given the vectors of padding, too."""


TRAINED_FAMILIES = {
    "AutoencoderKLWan": TrainedFamily("Wan", tokens=("UMT5EncoderModel",), preset="wan"),
    "AutoencoderKLLTXVideo": TrainedFamily("LTX-Video", tokens=("T5EncoderModel",)),
    "AutoencoderKLLTX2Video": TrainedFamily("LTX-2"),
    "AutoencoderKLHunyuanVideo": TrainedFamily(
        "HunyuanVideo", tokens=("LlamaModel",), pooled=("CLIPTextModel",), preset="hunyuan"
    ),
    "AutoencoderKLCogVideoX": TrainedFamily("CogVideoX", tokens=("T5EncoderModel",), pads=True),
}
"""diffusers' class of the autoencoder -> who trains on its latents."""


@dataclass(frozen=True, kw_only=True)
class ClipFacts:
    """What is known of a clip without reading its rows."""

    clip_id: str
    number: int
    """Among the clips that the format numbers."""
    bucket: Bucket
    rate_fps: float
    video: str
    caption: str
    has_text: bool

    @property
    def frames(self) -> int:
        return self.bucket.frames


@dataclass(frozen=True, kw_only=True)
class ClipTensors:
    """Its rows."""

    moments: Tensor
    """Raw, (2D, t, h, w), as they are stored."""
    rule: FinalRule
    tokens: Tensor | None = None
    """(tokens, dim) of the first caption, unpadded."""
    pooled: Tensor | None = None
    """(dim,)."""

    def latents(self, kind: Latents) -> Tensor:
        """Return moments or raw mean as they are stored, or final latents as float32."""
        if kind == "moments":
            return self.moments
        mean = self.moments[: len(self.moments) // 2]
        return mean if kind == "mean" else apply_final_rule(self.rule, mean[None])[0]

    def padded(self, length: int) -> tuple[Tensor, Tensor]:
        """Return token vectors (length, dim), zeros after the last, and which are there (length,).

        Those beyond `length` are cut off.
        """
        assert self.tokens is not None
        kept = self.tokens[:length]
        vectors = kept.new_zeros(length, kept.shape[1])
        vectors[: len(kept)] = kept
        return vectors, torch.arange(length) < len(kept)


@dataclass(frozen=True)
class Recipe:
    """What a format holds of one family."""

    latents: Latents
    tokens: int = 0
    """Length that token vectors are padded to; 0: they are not."""
    without_text: bool = False
    """Whether a store's text is not what the trainer takes."""
    needs_pooled: bool = True
    """Whether text is of use only together with the pooled vector, where the family has one."""


Named = Mapping[str, bytes]
Listed = Iterable[ClipFacts]


@dataclass(frozen=True, kw_only=True)
class TrainerFiles:
    """A format: who reads it, for which families, and its files."""

    trainer: str
    recipes: Mapping[str, Recipe]
    """By name of the family."""
    files: tuple[str, ...] = ()
    """Of a clip, as `str.format` fills them in; the last one is that of its text."""
    pack: Callable[[ClipFacts, ClipTensors, str, Recipe], Sequence[Any]]
    """Return what is in each of them; of a format with `join`, what `join` takes."""
    join: Callable[[Sequence[Any]], bytes] | None = None
    """Make one file of several clips of a size."""
    lists: Callable[[Listed], Named] = field(default=lambda clips: {})
    """Return the files that name all clips."""
    numbered: bool = False
    """Whether files are named by number, so that no clip may come or go."""
    lost: str = ""
    """What has no place in it, beyond `ALWAYS_LOST`."""
    without_text: str = ""
    """What to do where the store has no text that fits."""

    def names(self, clip: ClipFacts, family: str) -> list[str]:
        """Return the files of a clip of a family."""
        short, _ = _MUSUBI.get(family, ("", ""))
        return [name.format(c=clip, short=short) for name in self.files[: 1 + clip.has_text]]


ALWAYS_LOST = (
    "content images, scores, frame times, checksums and fingerprints; captions after the first"
)


def torch_file(value: Any) -> bytes:
    """Return what torch.save writes of tensors and plain values; torch.load reads it with
    weights_only."""
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def safetensors_file(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return a safetensors file, the same bytes at every call: the library orders its metadata at
    random."""
    head: dict[str, Any] = {"__metadata__": dict(metadata)}
    data = b""
    for name, tensor in tensors.items():
        values = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        dtype = SAFETENSORS_TYPES.get(tensor.dtype, "I64")
        offsets = [len(data), len(data) + len(values)]
        head[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        data += values
    text = json.dumps(head, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def _type_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _json(value: Any, indent: int | None = None) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=indent).encode()


# FastVideo: rows of Parquet, every tensor float32, whatever its `_dtype` says.

_FASTVIDEO_TENSORS = ("vae_latent", "text_embedding")
FASTVIDEO_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        *(
            (f"{name}_{what}", kind)
            for name in _FASTVIDEO_TENSORS
            for what, kind in (
                ("bytes", pa.binary()),
                ("shape", pa.list_(pa.int64())),
                ("dtype", pa.string()),
            )
        ),
        ("file_name", pa.string()),
        ("caption", pa.string()),
        ("media_type", pa.string()),
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("num_frames", pa.int64()),
        ("duration_sec", pa.float64()),
        ("fps", pa.float64()),
    ]
)


def _fastvideo(clip: ClipFacts, rows: ClipTensors, family: str, recipe: Recipe) -> list[Any]:
    text = rows.tokens if rows.tokens is not None else torch.zeros(0, 4096)
    record: dict[str, Any] = {
        "id": clip.clip_id,
        "file_name": clip.video,
        "caption": clip.caption,
        "media_type": "video" if clip.frames > 1 else "image",
        "width": clip.bucket.width,
        "height": clip.bucket.height,
        "num_frames": clip.frames,
        "duration_sec": clip.frames / clip.rate_fps,
        "fps": clip.rate_fps,
    }
    tensors = (rows.latents(recipe.latents), text)
    for name, tensor in zip(_FASTVIDEO_TENSORS, tensors, strict=True):
        values: NDArray[np.float32] = tensor.float().contiguous().numpy()
        record |= {
            f"{name}_bytes": values.tobytes(),
            f"{name}_shape": list(values.shape),
            f"{name}_dtype": "float32",
        }
    return [record]


def _fastvideo_file(records: Sequence[Any]) -> bytes:
    out = io.BytesIO()
    table = pa.Table.from_pylist(list(records), FASTVIDEO_SCHEMA)
    # Its reader takes a whole row group for each row.
    pq.write_table(table, out, row_group_size=1, compression="none")
    return out.getvalue()


# musubi-tuner: the names say item, first frame and frames, width and height, architecture.

_MUSUBI = {"Wan": ("wan", "wan"), "HunyuanVideo": ("hv", "hunyuan_video")}
"""Its short and its long name of a family."""


def _musubi(clip: ClipFacts, rows: ClipTensors, family: str, recipe: Recipe) -> list[bytes]:
    latents = rows.latents(recipe.latents)
    steps = "x".join(map(str, latents.shape[1:]))
    about = {"architecture": _MUSUBI[family][1], "format_version": "1.0.1"}
    size = {
        "width": str(clip.bucket.width),
        "height": str(clip.bucket.height),
        "frame_count": str(clip.frames),
    }
    named = {f"latents_{steps}_{_type_name(latents)}": latents}
    files = [safetensors_file(named, {**about, **size})]
    if rows.tokens is not None:
        if recipe.tokens:
            vectors, mask = rows.padded(recipe.tokens)
            text = {f"llm_{_type_name(vectors)}": vectors, "llm_mask": mask.long()}
        else:
            text = {f"varlen_t5_{_type_name(rows.tokens)}": rows.tokens}
        if rows.pooled is not None:
            text[f"clipL_{_type_name(rows.pooled)}"] = rows.pooled
        files.append(safetensors_file(text, {**about, "caption1": clip.caption}))
    return files


# finetrainers: what its processors return, each with a batch axis of 1.


def _finetrainers(clip: ClipFacts, rows: ClipTensors, family: str, recipe: Recipe) -> list[bytes]:
    latents = rows.latents(recipe.latents)[None]
    _, channels, steps, height, width = latents.shape
    scale, shift = (
        torch.as_tensor(rows.rule[key], dtype=torch.float32).expand(channels // 2).clone()
        for key in ("scale", "shift")
    )
    found: dict[str, Any] = {"latents": latents}
    if family == "CogVideoX":
        found["latents"] = latents.transpose(1, 2).contiguous()
    elif family == "Wan":  # whose latents_std is what latents are multiplied by
        found |= {"latents_mean": shift, "latents_std": scale}
    elif family == "LTX-Video":
        found |= {"num_frames": steps, "height": height, "width": width}
        found |= {"latents_mean": shift, "latents_std": 1 / scale}
    files = [torch_file(found)]
    if rows.tokens is not None:
        vectors, mask = rows.padded(recipe.tokens)
        text = {"encoder_hidden_states": vectors[None]}
        if family in ("LTX-Video", "HunyuanVideo"):
            text["encoder_attention_mask"] = mask[None]
        if rows.pooled is not None:
            text["pooled_projections"] = rows.pooled[None]
        files.append(torch_file(text))
    return files


# LTX-Video-Trainer and LTX-2's: a file a clip in a folder a modality.


def _ltx(clip: ClipFacts, rows: ClipTensors, family: str, recipe: Recipe) -> list[bytes]:
    latents = rows.latents(recipe.latents)
    channels, steps, height, width = latents.shape
    if family == "LTX-Video":  # its reader takes them as they lie: a row a latent cell
        latents = latents.reshape(channels, -1).T.contiguous()
    found = {"latents": latents, "num_frames": steps, "height": height, "width": width}
    files = [torch_file({**found, "fps": clip.rate_fps})]
    if rows.tokens is not None:
        vectors, mask = rows.padded(recipe.tokens)
        files.append(torch_file({"prompt_embeds": vectors, "prompt_attention_mask": mask}))
    return files


# diffusers: plain tensors.


def _diffusers(clip: ClipFacts, rows: ClipTensors, family: str, recipe: Recipe) -> list[bytes]:
    files = [torch_file(rows.latents(recipe.latents))]
    if rows.tokens is not None:
        files.append(torch_file(rows.padded(recipe.tokens)[0]))
    return files


def _diffusers_lists(clips: Listed) -> Named:
    # Both lists are read without their empty lines.
    lines = [(" ".join(c.caption.split()) or "-", f"videos/{c.clip_id}.mp4") for c in clips]
    names = ("prompts.txt", "videos.txt")
    columns = zip(*lines, strict=True) if lines else ((), ())
    return {n: "".join(f"{x}\n" for x in c).encode() for n, c in zip(names, columns, strict=True)}


TRAINER_FILES: dict[TrainerFormat, TrainerFiles] = {
    "fastvideo": TrainerFiles(
        trainer="FastVideo",
        recipes={
            "Wan": Recipe("mean"),
            "HunyuanVideo": Recipe("mean", needs_pooled=False),
        },
        pack=_fastvideo,
        join=_fastvideo_file,
        lost="log-variance",
        without_text="a text of no tokens is written, as for training without captions",
    ),
    "musubi": TrainerFiles(
        trainer="musubi-tuner",
        recipes={
            "Wan": Recipe("final"),
            "HunyuanVideo": Recipe("mean", tokens=256),
        },
        files=(
            "{c.clip_id}_00000-{c.frames:03d}_{c.bucket.width:04d}x{c.bucket.height:04d}_{short}"
            ".safetensors",
            "{c.clip_id}_{short}_te.safetensors",
        ),
        pack=_musubi,
        lists=lambda clips: {
            "dataset.jsonl": b"".join(
                _json({"video_path": f"{c.clip_id}.mp4", "caption": c.caption}) + b"\n"
                for c in clips
            )
        },
        lost="log-variance",
        without_text="let its cache_text_encoder_outputs script take the captions of dataset.jsonl",
    ),
    "finetrainers": TrainerFiles(
        trainer="finetrainers",
        recipes={
            "Wan": Recipe("moments", tokens=512),
            "LTX-Video": Recipe("moments", tokens=128),
            "HunyuanVideo": Recipe("moments", tokens=256),
            "CogVideoX": Recipe("moments", tokens=226),
        },
        files=tuple(
            f"finetrainers-precomputed-data/{kind}-{{c.number}}.pt"
            for kind in ("latent", "condition")
        ),
        pack=_finetrainers,
        numbered=True,
        lost="captions as text; names of clips",
        without_text="its reader needs condition-N.pt beside each latent-N.pt",
    ),
    "ltx": TrainerFiles(
        trainer="the LTX trainers",
        recipes={
            "LTX-Video": Recipe("final", tokens=256),
            "LTX-2": Recipe("final", without_text=True),
        },
        files=("latents/{c.clip_id}.pt", "conditions/{c.clip_id}.pt"),
        pack=_ltx,
        lists=lambda clips: {
            "dataset.json": _json(
                [{"caption": c.caption, "media_path": f"{c.clip_id}.mp4"} for c in clips], 1
            )
        },
        lost="log-variance; sound",
        without_text="let its process_captions script take dataset.json, --output-dir conditions",
    ),
    "diffusers-pt": TrainerFiles(
        trainer="scripts for diffusers",
        recipes={
            "Wan": Recipe("moments", tokens=512),
            "LTX-Video": Recipe("moments", tokens=128),
            "LTX-2": Recipe("moments", without_text=True),
            "HunyuanVideo": Recipe("moments", tokens=256, needs_pooled=False),
            "CogVideoX": Recipe("moments", tokens=226),
        },
        files=("video_latents/{c.clip_id}.pt", "prompt_embeds/{c.clip_id}.pt"),
        pack=_diffusers,
        lists=_diffusers_lists,
        lost="masks of padding",
        without_text="prompt_embeds/ is left out: encode the lines of prompts.txt",
    ),
}

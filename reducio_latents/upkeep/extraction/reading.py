"""The safetensors that the published Reducio extraction script writes, one a video, checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reducio_latents.core.geometry import Bucket
from reducio_latents.core.regular import open_regular
from reducio_latents.errors import StoreError
from reducio_latents.store.text_rows import CaptionTokens, pack_text_row

KEYS = ("z", "z_2d", "z_clip")
DTYPES = {"F16": "float16", "F32": "float32"}
RATE_FPS = 16.0
"""Of a file that does not say."""


class MisfitError(ValueError):
    """Why a file is left out."""


@dataclass(frozen=True)
class ExtractedFile:
    """One file, as its header tells; the clips of one video."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    """Key -> shape, the first axis being clips: z (n, channels, t, h, w)."""
    dtypes: Mapping[str, str]
    """Key -> numpy name."""
    rate_fps: float

    @property
    def video(self) -> str:
        """The video's path, its folders joined by `_`, as the script names its files."""
        return self.path.stem

    @property
    def clips(self) -> int:
        return self.shapes["z"][0]

    def bucket(self, temporal_stride: int, spatial_stride: int) -> Bucket:
        _, _, t, h, w = self.shapes["z"]
        return Bucket(t * temporal_stride, h * spatial_stride, w * spatial_stride)

    def tensor(self, key: str) -> NDArray[Any]:
        """Return a tensor of all clips, read anew each time."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, framework="np") as file:
                tensor: NDArray[Any] = file.get_tensor(key)
        except (SafetensorError, OSError) as err:
            raise StoreError(f"{self.path} cannot be read any more: {err}.") from err
        return tensor


def read_header(path: Path) -> ExtractedFile:
    """Raise MisfitError for a file that the script cannot have written."""
    from safetensors import SafetensorError, safe_open

    try:
        open_regular(path).close()
        with safe_open(path, framework="np") as file:
            there = set(file.keys())
            parts = {key: file.get_slice(key) for key in KEYS if key in there}
            rate_fps = float(file.get_tensor("fps")) if "fps" in there else RATE_FPS
    except (SafetensorError, OSError, TypeError, ValueError) as err:
        raise MisfitError(f"it cannot be read: {err}") from err
    shapes = {key: tuple(part.get_shape()) for key, part in parts.items()}
    dtypes = {key: part.get_dtype() for key, part in parts.items()}
    if "z" not in shapes:
        raise MisfitError("it has no z")
    if len(shapes["z"]) != 5 or 0 in shapes["z"]:
        raise MisfitError(f"z is {shapes['z']}, not (clips, channels, t, h, w)")
    for key, shape in shapes.items():
        if dtypes[key] not in DTYPES:
            raise MisfitError(f"{key} is {dtypes[key]}, not of half or single precision")
        if shape[:1] != shapes["z"][:1]:
            raise MisfitError(f"{key} is {shape}, but z has {shapes['z'][0]} clips")
    if not 0 < rate_fps <= 1000:
        raise MisfitError(f"fps is {rate_fps}")
    names = {key: DTYPES[dtype] for key, dtype in dtypes.items()}
    return ExtractedFile(path, shapes, names, rate_fps)


def read_text(path: Path) -> bytes:
    """Return a T5 file's vectors as a row of text; raise MisfitError if there are none."""
    from safetensors import SafetensorError, safe_open

    try:
        open_regular(path).close()
        with safe_open(path, framework="np") as file:
            vectors = np.asarray(file.get_tensor("caption_embs"), np.float32)
            mask = np.asarray(file.get_tensor("emb_masks")).astype(bool)
    except (SafetensorError, OSError, TypeError) as err:
        raise MisfitError(f"{path.name} has no T5 vectors: {err}") from err
    vectors = vectors.reshape(-1, vectors.shape[-1])
    if mask.size != len(vectors):
        raise MisfitError(f"{path.name} has {len(vectors)} T5 vectors and {mask.size} mask values")
    kept = vectors[mask.reshape(-1)]
    if not np.isfinite(kept.astype(np.float16)).all():
        raise MisfitError(f"{path.name} has T5 vectors beyond float16")
    return pack_text_row([CaptionTokens(kept, len(kept))], "float16")


def agreeing(
    paths: Iterable[Path], temporal_stride: int, spatial_stride: int
) -> tuple[list[ExtractedFile], dict[str, str]]:
    """Return the files that agree with those before them, and why each of the others does not.

    All must have the same rate and number of latent steps, and of a bucket the same shapes.
    """
    kept: list[ExtractedFile] = []
    failed: dict[str, str] = {}
    shapes: dict[tuple[Bucket, str], tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    for path in paths:
        try:
            file = read_header(path)
            bucket = file.bucket(temporal_stride, spatial_stride)
            first = kept[0] if kept else file
            if (file.rate_fps, file.shapes["z"][2]) != (first.rate_fps, first.shapes["z"][2]):
                raise MisfitError(
                    f"it has {file.shapes['z'][2]} latent steps a clip at {file.rate_fps:g} fps, "
                    f"{first.path.name} {first.shapes['z'][2]} at {first.rate_fps:g}"
                )
            for key, shape in file.shapes.items():
                one = shapes.get((bucket, key), shape[1:]), dtypes.get(key, file.dtypes[key])
                if one != (shape[1:], file.dtypes[key]):
                    raise MisfitError(
                        f"{key} is {file.dtypes[key]} {shape[1:]}, in files before it "
                        f"{one[1]} {one[0]}"
                    )
        except MisfitError as err:
            failed[path.name] = str(err)
            continue
        kept.append(file)
        for key, shape in file.shapes.items():
            shapes[bucket, key], dtypes[key] = shape[1:], file.dtypes[key]
    return kept, failed

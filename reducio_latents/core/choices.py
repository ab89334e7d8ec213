"""Settings that are one of a few words. Plain types: `get_args` lists the words."""

from __future__ import annotations

import os
from typing import Literal

Dtype = Literal["float32", "bfloat16", "float16"]
DtypeOrAuto = Literal["auto", "float32", "bfloat16", "float16"]
Compile = Literal["none", "norms", "all"]
Container = Literal["zarr", "webdataset"]
TrainerFormat = Literal["fastvideo", "musubi", "finetrainers", "ltx", "diffusers-pt"]
"""What other trainers read in place of videos."""
ImageCodec = Literal["webp", "png", "jpeg", "raw"]
"""webp (lossless here), png and raw keep every bit of a picture; jpeg does not."""
ResizeMode = Literal["bicubic", "bilinear"]
Duplicates = Literal["refer", "encode"]
"""Of files with equal bytes `refer` encodes one, `encode` each."""
Label = Literal["none", "folder"]
"""`folder`: the folder that a video is in is its class."""
Deinterlace = Literal["auto", "bwdif", "none"]
Colours = Literal["auto", "exact", "swscale"]
VideoBackendName = Literal["pyav", "decord", "torchcodec"]
TextValues = Literal["float16", "bfloat16", "int8"]
"""In the order of their numbers in a row of text vectors."""
TextCleaning = Literal["none", "whitespace", "pixart"]
TextPreset = Literal["reducio", "wan", "ltx2", "hunyuan", "hunyuan15", "qwen-image", "cogvideox"]
TextLayer = int | Literal["all"]
"""Index into the hidden states of a text encoder, or all of them side by side."""
ProtocolName = Literal["standard", "paper"]
LpipsNet = Literal["alex", "vgg"]
MetricName = Literal["psnr", "psnr-clip", "ssim", "lpips-alex", "lpips-vgg", "flicker", "fvd"]


def usable_cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

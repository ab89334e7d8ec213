"""Decode latents to videos with the model that made the store.

    python examples/decode_samples.py pexels.latents samples/ --weights FILE

Here the latents are the store's own; a diffusion model's samples are decoded in the same way, given
the content image of the clip that they were sampled for.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from einops import rearrange

from reducio_latents import LatentDataset, load_autoencoder, open_store
from reducio_latents.video.write import write_mp4


def main(store: str, out: Path, weights: str | None = None, count: int = 4) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    meta = open_store(store).meta
    # The store names the model; `reducio-latents decode` also proves that the weights are the same.
    vae = load_autoencoder(meta.columns["motion"].encoder, weights, device=device, parts="decoder")
    columns = ("motion", "content_image", "clip_id")
    dataset = LatentDataset(store, columns, batch_size=1, latents="mean", seed=0)

    out.mkdir(parents=True, exist_ok=True)
    for clip in islice(dataset, count):
        latents = clip["latents"].to(device)  # (1, D, t, h, w) final latents
        image = clip["content_image"].to(device) / 127.5 - 1  # (1, 3, H, W) in [-1, 1]
        with torch.no_grad():
            video = vae.decode(latents, image)[0]  # (3, T, H, W), about [-1, 1]
        frames = ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        frames_THWC = np.ascontiguousarray(rearrange(frames, "c t h w -> t h w c").cpu().numpy())
        path = out / f"{clip['clip_id'][0]}.mp4"
        write_mp4(path, frames_THWC, meta.clip.rate_fps)
        print(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("store")
    parser.add_argument("out", type=Path)
    parser.add_argument("--weights", help="the model's, if it does not come with the package")
    parser.add_argument("--count", type=int, default=4)
    arguments = parser.parse_args()
    main(arguments.store, arguments.out, arguments.weights, arguments.count)

"""Decode latents to videos with the model that made the store.

    python examples/decode_samples.py pexels.latents samples/ --weights FILE

Here the latents are the store's own; a diffusion model's samples are decoded in the same way, given
the content image of the clip that they were sampled for.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

from reducio_latents import LatentDataset


def main(store: str, out: Path, weights: str | None = None, count: int = 4) -> None:
    columns = ("motion", "content_image", "clip_id")
    dataset = LatentDataset(store, columns, batch_size=1, latents="mean", seed=0)
    decoder = dataset.decoder(
        weights
    )  # loads the model at first use, and no other than the store's

    for clip in islice(dataset, count):
        frames = decoder.decode(clip["latents"], clip["content_image"])  # uint8 (1, T, H, W, 3)
        path = out / f"{clip['clip_id'][0]}.mp4"
        decoder.write(path, frames[0])
        print(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("store")
    parser.add_argument("out", type=Path)
    parser.add_argument("--weights", help="the model's, if they are not where they were")
    parser.add_argument("--count", type=int, default=4)
    arguments = parser.parse_args()
    main(arguments.store, arguments.out, arguments.weights, arguments.count)

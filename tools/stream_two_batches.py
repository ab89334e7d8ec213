"""Print what a training job gets from a store: python tools/stream_two_batches.py STORE"""

from __future__ import annotations

import sys
from itertools import islice

import torch

from reducio_latents import LatentDataset


def main(store: str) -> None:
    dataset = LatentDataset(store, columns=("motion", "content_image", "caption"), batch_size=4)
    for number, batch in enumerate(islice(dataset, 2)):
        print(f"batch {number}")
        for name, value in batch.items():
            if isinstance(value, torch.Tensor):
                print(f"  {name:<14} {value.dtype!s:<14} {tuple(value.shape)}")
            else:
                print(f"  {name:<14} {value}")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    main(sys.argv[1])

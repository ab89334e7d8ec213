"""Encode a folder of videos, and look at what is stored of one clip.

    python examples/encode_and_look.py videos/ pexels.latents

The model is the small one that comes with the package; for the published one say
`model="reducio-ft4-fs32", weights="reducio-ft4-fs32-attn23.ckpt"`.
"""

from __future__ import annotations

import sys

from reducio_latents import LatentTable, encode_corpus


def main(videos: str, store: str, resolution: int = 192) -> None:
    report = encode_corpus(videos, store, model="reducio-tiny-ft4-fs32", resolution=resolution)
    print(f"videos  {report.videos}")
    print(f"clips   {report.clips}")
    for reason, count in report.failed.items():
        print(f"  failed {count}: {reason}")

    table = LatentTable(store)
    clip = table[0]
    print(f"{len(table)} clips; the first is {clip['video']} at {clip['start_s']:g} s:")
    for name in table.columns:
        value = clip[name]
        shown = f"{value.dtype} {tuple(value.shape)}" if hasattr(value, "shape") else repr(value)
        print(f"  {name:<14} {shown}")


if __name__ == "__main__":
    # Videos are decoded in processes of their own, so the script must not run when it is imported.
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))

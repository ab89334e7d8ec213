"""Train on a store of tars with the stock webdataset, and nothing of Reducio-Latents.

    reducio-latents convert pexels.latents pexels.tars --format webdataset
    python examples/train_by_webdataset.py pexels.tars/16x256x256

The JSON of each sample says what `motion` holds, and by which rule it becomes what a model trains
on. Ranks and workers take different tars here; a `LatentDataset` of the same store shares out
clips, every one once an epoch, and its order can be resumed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import webdataset
from torch import Tensor, nn


def per_channel(value: Any, z: Tensor) -> Tensor:
    """Return a number, one a channel, or one a channel and frame, against z (D, t, h, w)."""
    values = torch.tensor(value)
    values = values[:, : z.shape[1]] if values.ndim == 2 else values
    return values.reshape(*values.shape, *[1] * (z.ndim - values.ndim))


RULES: dict[str, Callable[..., Tensor]] = {
    "layer_norm": lambda z, eps: nn.functional.layer_norm(z, z.shape, eps=eps),
    "scale_shift": lambda z, scale, shift: (z - per_channel(shift, z)) * per_channel(scale, z),
}


def final_latents(sample: dict[str, Any], noise: float = 1.0) -> Tensor:
    """Draw from the posterior of a sample, and apply its rule; float32 (D, t, h, w)."""
    mean, logvar = torch.from_numpy(sample["motion.npy"]).float().chunk(2)
    rule = dict(sample["json"]["latents"]["motion"]["final"])
    z = mean + noise * (logvar / 2).exp() * torch.randn_like(mean)
    return RULES[rule.pop("rule")](z, **rule)


def main(folder: str, steps: int = 100, batch_size: int = 16) -> None:
    tars = sorted(map(str, Path(folder).glob("shard-??????.tar")))
    data = webdataset.WebDataset(tars, shardshuffle=100, nodesplitter=webdataset.split_by_node)
    there = data.select(lambda sample: "motion.npy" in sample).shuffle(1000).decode()
    drawn = there.map(lambda sample: {"latents": final_latents(sample)})
    batches = drawn.repeat().batched(batch_size)
    model = nn.LazyConv3d(1, 1)  # stands for yours
    for step, batch in zip(range(1, steps + 1), batches, strict=False):
        latents = batch["latents"]  # (B, D, t, h, w)
        loss = model(latents).square().mean()
        loss.backward()
        print(f"step {step}  latents {tuple(latents.shape)}  loss {loss.item():.4f}")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))

"""Train a diffusion transformer on a store, in one screen: flow matching, exact resume.

    python examples/train_a_dit.py pexels.latents checkpoint.pt

Run it again to go on where it stopped: the next batch is the one that would have come next. Every
500 steps it writes sampled videos beside the checkpoint. `tools/train_dit.py` is a trainer with
conditions, guidance, EMA, several GPUs and samples of held-out clips.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from reducio_latents import LatentDataset, LatentLoader


class TinyDiT(nn.Module):
    """Predicts the velocity of latents (B, D, t, h, w), a token for each of the t*h*w places."""

    def __init__(self, channels: int, places: int, width: int = 128) -> None:
        super().__init__()
        self.take, self.give = nn.Linear(channels, width), nn.Linear(width, channels)
        self.place = nn.Parameter(0.02 * torch.randn(places, width))
        self.time = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        _, _, t, h, w = x.shape
        tokens: Tensor = self.take(rearrange(x, "b d t h w -> b (t h w) d"))
        tokens = tokens + self.place + self.time(time[:, None])[:, None]
        tokens = self.give(self.blocks(tokens))
        return rearrange(tokens, "b (t h w) d -> b d t h w", t=t, h=h, w=w)


@torch.no_grad()
def sample(model: nn.Module, shape: torch.Size, device: str, steps: int = 20) -> Tensor:
    """Follow the velocity from noise to latents, by Euler's method."""
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    for step in range(steps):
        z = z + model(z, torch.full((len(z),), step / steps, device=device)) / steps
    return z


def main(
    store: str, checkpoint: str, steps: int = 1000, batch_size: int = 16, every: int = 500
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    columns = ("motion", "content_image")
    dataset = LatentDataset(store, columns, batch_size=batch_size, seed=0)
    loader = LatentLoader(dataset, device=device)
    decoder = dataset.decoder(device=device)  # of the store's own model, loaded at first use

    torch.manual_seed(0)
    channels, *grid = dataset.batch(0, 0)["latents"].shape[1:]
    model = TinyDiT(channels, torch.Size(grid).numel()).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step = 0
    if Path(checkpoint).exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        loader.load_state_dict(saved["loader"])
        torch.set_rng_state(saved["random"].cpu())
        step = saved["step"]

    while step < steps:
        for batch in loader:  # one epoch
            x = batch["latents"]  # (B, D, t, h, w) float32: what the model's decoder takes
            noise = torch.randn(x.shape).to(device)
            time = torch.rand(len(x)).to(device)
            mix = time[:, None, None, None, None]
            loss = (model((1 - mix) * noise + mix * x, time) - (x - noise)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            print(f"step {step}  loss {loss.item():.4f}")
            if step % every == 0:
                frames = decoder.decode(
                    sample(model, x[:4].shape, device), batch["content_image"][:4]
                )
                decoder.write(Path(checkpoint).with_name(f"step-{step}.mp4"), frames)
            if step >= steps:
                break
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        state |= {"loader": loader.state_dict(), "random": torch.get_rng_state()}
        torch.save(state, checkpoint)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))

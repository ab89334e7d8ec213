"""`reducio-latents import-checkpoint`."""

from __future__ import annotations

from pathlib import Path

import click

from reducio_latents.cli.options import command
from reducio_latents.cli.show import count, pairs


@command("import-checkpoint")
@click.argument("checkpoint")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--ema/--no-ema",
    default=None,
    help="Take the averaged or the plain weights, if the checkpoint holds both.",
)
def import_checkpoint(checkpoint: str, folder: Path, ema: bool | None) -> None:
    """Turn a published CHECKPOINT into FOLDER/model.safetensors with its config beside it.

    Nothing in the checkpoint is executed, and what only training needs is left out.

    \b
    reducio-latents import-checkpoint reducio-ft4-fs32-attn23.ckpt weights/reducio-ft4
    reducio-latents import-checkpoint hf://OWNER/NAME/FILE weights/mine
    """
    from reducio_latents.autoencoders.checkpoint import import_checkpoint as run

    found = run(checkpoint, folder, ema=ema)
    config = found.config
    pairs(
        {
            "temporal stride": config.temporal_stride,
            "widths": f"{config.width} video encoder, {config.content_width} content encoder, "
            f"{config.decoder_width} decoder",
            "latent channels": config.latent_channels,
            "parameters": count(found.parameters),
            "weights sha256": found.weights_sha256,
            "fingerprint": found.fingerprint,
            "dropped": f"{found.dropped} keys that inference does not need",
            "written": folder,
        }
    )

"""How well an autoencoder gives clips back that it has encoded."""

from __future__ import annotations

from torch import Tensor

from reducio_latents.autoencoders.protocol import Autoencoder
from reducio_latents.core.clips import centre_frame
from reducio_latents.core.gaussian import final_latents
from reducio_latents.core.values import Posterior
from reducio_latents.metrics.psnr import frame_psnr


def decoded_psnr(autoencoder: Autoencoder, posterior: Posterior, video_BCTHW: Tensor) -> Tensor:
    """Return the PSNR in dB of each frame, (B, T), of clips decoded from their posterior's mean."""
    latents = final_latents(posterior, None, autoencoder.final_rule).to(autoencoder.device)
    content = video_BCTHW[:, :, centre_frame(video_BCTHW.shape[2])]
    decoded = autoencoder.decode(latents, content if autoencoder.needs_content else None)
    return frame_psnr(video_BCTHW, decoded)

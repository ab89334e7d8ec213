"""Reading a store: batches for training, single clips for looking at. No VAE, no video library."""

from reducio_latents.dataset.dataset import LatentDataset
from reducio_latents.dataset.loader import LatentLoader
from reducio_latents.dataset.moving import move_ahead
from reducio_latents.dataset.sampling import mean_of_moments, sample_moments
from reducio_latents.dataset.table import LatentTable

__all__ = [
    "LatentDataset",
    "LatentLoader",
    "LatentTable",
    "mean_of_moments",
    "move_ahead",
    "sample_moments",
]

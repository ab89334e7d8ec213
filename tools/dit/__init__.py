"""A small diffusion transformer over motion latents; `tools/train_dit.py` trains it on a store."""

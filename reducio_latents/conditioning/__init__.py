"""What a diffusion model is conditioned on: codes of the content image, codes of the text."""

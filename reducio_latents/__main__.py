"""`python -m reducio_latents`, which is also how torchrun starts a rank."""

from reducio_latents.cli import main

if __name__ == "__main__":
    main(prog_name="reducio-latents")

"""Train Reducio-VAE: losses, discriminators, data, one step, one loop. See `loop.train`."""

"""The store: its description, its commits, its containers, its health."""

from reducio_latents.store.store import Store, open_store

__all__ = ["Store", "open_store"]

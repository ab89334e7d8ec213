"""What a run tells while it goes on."""

from __future__ import annotations


class Progress:
    """Told from the calling thread, often; must return at once. This one says nothing."""

    def probed(self, done: int, total: int) -> None:
        """So many of the videos that are new have been probed."""

    def planned(self, clips: int, done: int) -> None:
        """The run is about `clips` clips, of which `done` are stored already."""

    def encoded(self, clips: int, failed: int) -> None:
        """So many more clips are encoded, and so many more have failed."""

    def spent(self, stage: str, seconds: float) -> None:
        """So many more seconds went to a stage: `WAIT` or `BUSY` of `shards`."""

    def checked(self, psnr: float) -> None:
        """The clips that were decoded on the spot so far have this mean PSNR, in dB."""

"""What this package raises on purpose.

Every message has three clauses: what is wrong with the value, where it came from, how to fix it.
Each class is also the builtin that a caller would expect; catch `LatentsError` to catch them all.
"""

from __future__ import annotations


class LatentsError(Exception):
    """Raised on purpose by this package. Its message is meant for the person at the terminal."""


class ConfigError(LatentsError, ValueError):
    """A setting is missing, misspelt or out of range, or a package it needs is not installed."""


class GeometryError(LatentsError, ValueError):
    """A size does not fit the VAE's strides."""


class PixelError(LatentsError, ValueError):
    """Pixels have another type or range than the model takes."""


class CorpusError(LatentsError, OSError):
    """The corpus as a whole cannot be listed; nothing of it can be encoded."""


class VideoError(LatentsError, OSError):
    """One video, or one clip of it, cannot be read; the others can."""


class WeightsError(LatentsError, ValueError):
    """A weights file is not what it is said to be."""


class StoreError(LatentsError, OSError):
    """A store is missing, damaged, made by something else, or in use for something else."""


class QualityError(LatentsError, RuntimeError):
    """Decoded clips fell below the floor that the run was given."""


class TrainingError(LatentsError, RuntimeError):
    """A training run cannot go on; its last checkpoint is as it was."""

    def __init__(self, message: str = "", *, signal: int = 0) -> None:
        super().__init__(message)
        self.signal = signal
        """Number of the signal that ended the run, if one did."""

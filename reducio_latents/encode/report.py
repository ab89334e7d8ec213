"""What became of every video and clip: found = encoded + skipped + failed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from reducio_latents.store.whole import Tally


@dataclass(frozen=True, kw_only=True)
class EncodeReport:
    """The end of a run."""

    videos: Tally = field(default_factory=Tally)
    clips: Tally = field(default_factory=Tally)
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Reason -> clips or videos, as the text says."""
    captions_changed: int = 0
    """Clips of which the corpus has other captions than those that the run found in the plan."""
    captions_updated: bool = False
    """Whether the run has taken them."""
    videos_gone: int = 0
    """Videos of the plan that the corpus does not list any more; what is stored of them stays."""
    failed: Mapping[str, int] = field(default_factory=dict)
    """Reason, without the names and numbers in it -> how often."""
    statistics: Mapping[str, Mapping[str, Mapping[str, list[float]]]] = field(default_factory=dict)
    """As in `StoreMeta.statistics`."""
    seconds: float = 0.0
    stages: Mapping[str, float] = field(default_factory=dict)
    """Seconds of the encoding thread by stage."""
    shards_left: int = 0
    """Shards without a commit, of the plan or of this rank's share."""
    max_failed: float = 0.1
    signal: int = 0
    """Number of the signal that ended the run early, else 0."""
    share: str = ""
    """Whose share of the run this is about, such as `rank 1 of 4`; empty for the whole."""
    psnr: float | None = None
    """Mean PSNR in dB of the clips that the store has decoded on the spot, if there are any."""

    @property
    def failed_share(self) -> float:
        """The larger of the shares of failed videos and of failed clips."""
        shares = [t.failed / t.found for t in (self.videos, self.clips) if t.found]
        return max(shares, default=0.0)

    @property
    def exit_code(self) -> int:
        """0 if all is done; 3 if it is done, but more than `max_failed` of it failed; 1 if shards
        are left; 128 and the number of the signal that ended it."""
        if self.signal:
            return 128 + self.signal
        if self.shards_left:
            return 1
        return 3 if self.failed_share > self.max_failed else 0


def kind_of(reason: str, *names: str) -> str:
    """Return a reason without a leading path, `names` (video, clip id) and numbers.

    What is left is the same for all videos that fail in the same way, and can be counted.
    """
    head, colon, rest = reason.partition(": ")
    if colon and any(head.endswith(name) for name in names):
        reason = rest
    for name in names:
        reason = reason.replace(name, "it")
    return re.sub(r"(?<![\w.])\d+(\.\d+)?(?![\w.]*\w)", "N", reason)


def count_kinds(reasons: Iterable[tuple[str, ...]]) -> dict[str, int]:
    """Count (reason, *names) by kind, the most frequent first."""
    return dict(Counter(kind_of(*reason) for reason in reasons).most_common())

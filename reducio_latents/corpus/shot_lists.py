"""Lists of the shots of one video, which are named after it, as detectors of others write them."""

from __future__ import annotations

import posixpath
import re
from itertools import chain

from reducio_latents.core.text import printable
from reducio_latents.corpus.entry import CorpusSpan, CorpusVideo, extension, file_columns, storable
from reducio_latents.corpus.readers import BEGINNING, TABLE_READERS, open_table, table_ending
from reducio_latents.corpus.spans import find_times, read_spans
from reducio_latents.corpus.table import SAMPLE
from reducio_latents.corpus.trees import Tree
from reducio_latents.errors import CorpusError
from reducio_latents.files.source import VideoSource, join_url, public_url

_NAMED_AFTER = re.compile(r"(.+?)(?:[-_.](?:scenes|shots))?\.[a-z]+", re.IGNORECASE)
_FRAMES = re.compile(r"\s*(\d{1,12})\s+(\d{1,12})\s*", re.ASCII)
MAX_PAIRS_BYTES = 1 << 22


def read_shots(tree: Tree, name: str) -> CorpusVideo | None:
    """Return the video after which a table is named, with the shots that it lists; None for a table
    that names videos itself.

    `NAME-Scenes.csv`, `NAME_shots.json`, `NAME.mp4.scenes.txt`, `NAME.csv`: what stands before is
    the video's name, with or without its ending. In a text each line is the first and the last
    frame of a shot. Raise CorpusError for a table that gives neither videos nor times.
    """
    where = printable(public_url(join_url(tree.root, name)))
    match = _NAMED_AFTER.fullmatch(name)
    assert match is not None, "a table has an ending"
    video, source = storable(match[1]), VideoSource(join_url(tree.root, match[1]))
    if extension(name) == ".txt":
        with tree.open(name) as file:
            data = file.read(MAX_PAIRS_BYTES + 1)
        if len(data) > MAX_PAIRS_BYTES:
            raise CorpusError(
                f"{where} is larger than {MAX_PAIRS_BYTES >> 20} MiB, and no list of shots."
            )
        lines = data.decode("utf-8", "replace").splitlines()
        pairs = [_FRAMES.fullmatch(line) for line in lines if line.strip()]
        if not all(pairs):
            return None
        found = [tuple(map(int, pair.groups())) for pair in pairs if pair]
        # The last frame is still of the shot.
        frames = tuple(CorpusSpan(first, last + 1, in_frames=True) for first, last in found)
        return CorpusVideo(video, source, spans=frames)
    batches = TABLE_READERS[table_ending(name)](open_table(tree, name), where, BEGINNING)
    first = next(batches, None)
    if first is None:
        return CorpusVideo(video, source)
    columns = list(first.columns)
    if file_columns(columns):
        return None
    sample = [first.row(i) for i in range(min(SAMPLE, len(first.numbers)))]
    times = find_times(columns, sample, where)
    if times is None:
        raise CorpusError(
            f"{where} is no table of shots: it names no videos, and gives no times of the one that "
            f"it is named after, {printable(posixpath.basename(video))}. Write one shot a row: "
            "video, start and end."
        )
    told, spans = [times.start, times.end, times.both], list[CorpusSpan]()
    for batch in chain([first], batches):
        for i in range(len(batch.numbers)):
            row = {k: cell for k, cell in batch.row(i).items() if k in told}
            spans += read_spans(row, times, None, f"{where}, {batch.place(i)}", [])
    return CorpusVideo(video, source, spans=tuple(spans))

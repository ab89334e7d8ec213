"""Taking a column out of a store. The other columns' files are not touched."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import replace

from reducio_latents.errors import StoreError
from reducio_latents.files import Files
from reducio_latents.files.lock import hold
from reducio_latents.store import index
from reducio_latents.store.commit import commit_path, list_commits
from reducio_latents.store.limits import column_folder
from reducio_latents.store.meta import StoreMeta

LOCK = "drop.lock"


def drop_column(files: Files, meta: StoreMeta, name: str) -> None:
    """Remove the column as `meta` has it: its commits, then its data, then its description.

    Killed in between, the column counts as not done, and dropping it again ends what was begun. In
    a tar that other columns share its rows stay, unread. Of two who replace a column at once, the
    second one finds another in its place and leaves that.
    """
    with hold(files, LOCK, f"removing column {name}", wait=True):
        if StoreMeta.read(files).columns.get(name) == meta.columns[name]:
            _drop(files, meta, name)


def sweep_lock(files: Files) -> None:
    """Remove the lock of a process that was killed when it had removed a column."""
    if files.size(LOCK) is not None:
        with suppress(StoreError), hold(files, LOCK, "looking for what is left"):
            pass  # refused: somebody is removing one now


def _drop(files: Files, meta: StoreMeta, name: str) -> None:
    files.delete(index.PATH)  # which would go on to say that it is done
    for column, key in list_commits(files):
        if column == name:
            files.delete(commit_path(key, column))
    for bucket in meta.buckets:
        column = re.escape(column_folder(name))
        mine = re.compile(rf"{re.escape(bucket)}/({column}/.*|shard-\d+\.{column}\.tar)")
        own = [path for path in files.list(bucket) if mine.fullmatch(path)]
        for path in own:
            files.delete(path)
    files.delete(index.PATH)  # another run may have ended meanwhile

    def without(stored: StoreMeta | None) -> StoreMeta:
        now = stored or meta
        columns = {other: column for other, column in now.columns.items() if other != name}
        statistics = {
            key: values for key, values in now.statistics.items() if not key.startswith(f"{name}/")
        }
        return replace(now, columns=columns, statistics=statistics)

    StoreMeta.update(files, without)

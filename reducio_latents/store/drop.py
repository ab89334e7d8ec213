"""Taking a column out of a store. The other columns' files are not touched."""

from __future__ import annotations

from dataclasses import replace

from reducio_latents.files import Files
from reducio_latents.store import index
from reducio_latents.store.commit import commit_path, list_commits
from reducio_latents.store.meta import StoreMeta


def drop_column(files: Files, meta: StoreMeta, name: str) -> None:
    """Remove a column: its commits, then its data, then its description.

    Killed in between, the column counts as not done, and dropping it again ends what was begun. In
    a tar that other columns share its rows stay, unread.
    """
    files.delete(index.PATH)  # which would go on to say that it is done
    for column, key in list_commits(files):
        if column == name:
            files.delete(commit_path(key, column))
    for bucket in meta.buckets:
        own = [
            path
            for path in files.list(bucket)
            if path.startswith(f"{bucket}/{name}/") or path.endswith(f".{name}.tar")
        ]
        for path in own:
            files.delete(path)
    columns = {other: column for other, column in meta.columns.items() if other != name}
    statistics = {
        key: values for key, values in meta.statistics.items() if not key.startswith(f"{name}/")
    }
    replace(meta, columns=columns, statistics=statistics).write(files)

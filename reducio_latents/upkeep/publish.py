"""A store as a data set of the Hugging Face Hub: with a card and a preview, without what is local.

What is published lies first in a folder beside the store: its shards as hard links, and what names
this machine's folders written anew without them. That folder is proven, and then uploaded. Its
description goes last, so that no reader takes for a store what is half there.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from reducio_latents.core.libraries import first_line, import_library
from reducio_latents.errors import ConfigError, StoreError
from reducio_latents.files import LocalFiles
from reducio_latents.files.lock import hold
from reducio_latents.store import Store, index
from reducio_latents.store.commit import Commit, Failure, commit_path, list_commits
from reducio_latents.store.container import array_rows
from reducio_latents.store.meta import ROOT, StoreMeta
from reducio_latents.store.plan import edit_part
from reducio_latents.store.plan.parts import PART_KINDS, part_path
from reducio_latents.store.reports import QUALITY, Reports
from reducio_latents.store.writer import StoreWriter
from reducio_latents.upkeep.card import CARD, PREVIEW, card, preview
from reducio_latents.upkeep.verify import verify

STAGED, STAGED_FILES, LOCK = "staged.txt", "files", "publishing.lock"
"""In the folder beside the store: what says that it is ours, and what is uploaded."""
HUB_URL = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)/?", re.ASCII)
LICENCE = re.compile(r"[A-Za-z0-9.+-]{1,60}")
LOCAL_PATH = re.compile(r"(?<![\w:/.~-])(?:file://)?/(?:[^\s/'\"]+/)+")
"""Folders before a name, in a text of any kind; those of URLs are none."""
ITS_OWN = re.compile(r"(?:\d+x\d+x\d+|commits|plan|preview)/.*")
"""Files of a repository that a store has laid there."""
WAYS_IN = "log in by `hf auth login`, or set HF_TOKEN, to a token that may write"


@dataclass(frozen=True)
class PublishReport:
    """What was published, or with `dry_run` would be."""

    repository: str
    folder: Path
    """Where it lies on this machine; gone once it is uploaded."""
    files: int
    bytes: int
    pictures: int
    """In the preview."""
    deleted: int = 0
    """Files of the repository that the store does not have any more."""


def publish_store(
    source: Store,
    url: str,
    *,
    licence: str | None = None,
    private: bool = False,
    dry_run: bool = False,
    progress: Callable[[str, int], None] = lambda what, done: None,
) -> PublishReport:
    """Upload `source` to hf://datasets/USER/NAME, or with `dry_run` do all but that.

    Call again to go on with an upload that was broken off, or to publish what has changed.
    `progress` is told what is being done, and to how many files. Raise ConfigError for a URL of
    another kind or where there is no token, StoreError for a store that is damaged or not on this
    machine, or where the Hub refuses.
    """
    match = HUB_URL.fullmatch(url)
    if match is None:
        raise ConfigError(f"{url} is no data set of the Hub; write hf://datasets/USER/NAME.")
    if licence is not None and not LICENCE.fullmatch(licence):
        raise ConfigError(
            f"the licence is {licence!r}; give one of the Hub's names, such as cc-by-4.0, or other."
        )
    if not isinstance(source.files, LocalFiles):
        raise StoreError(f"{source.files.url} is not on this machine. Copy it to a folder first.")
    api = None if dry_run else _client(match[1], private)  # before what takes time
    folder = source.files.root.absolute()
    folder = folder.with_name(f"{folder.name}.publish")
    with hold(_home(source, folder), LOCK, "publishing"):
        staged = _stage(source, folder, progress)
        data, pictures = preview(staged)
        staged.files.write(PREVIEW, data)
        staged.files.write(CARD, card(staged, match[1], licence).encode())
        proof = verify(staged, lambda done: progress("verify", done))
        if not proof.ok:
            raise StoreError(
                f"{proof.damage[0]}; {len(proof.damage)} faults in all. Run `verify` on the store, "
                "and mend it before it is published."
            )
        names = list(staged.files.list(""))
        report = PublishReport(
            repository=match[1],
            folder=folder / STAGED_FILES,
            files=len(names),
            bytes=sum(staged.files.size(name) or 0 for name in names),
            pictures=pictures,
        )
        if api is not None:
            report = replace(report, deleted=_upload(api, report, names))
            shutil.rmtree(folder)
    return report


# What is published, in a folder of its own.


def _home(source: Store, folder: Path) -> LocalFiles:
    """Return the files of `folder`; raise StoreError if it holds something else."""
    home = LocalFiles(folder)  # in which a killed run may have left nothing but a temporary file
    if home.size(STAGED) is None and next(iter(home.list("")), None) is not None:
        raise StoreError(f"{folder} is in the way of what is to be published. Move it away.")
    home.write(STAGED, f"{source.files.url}, as it is published. Delete it at will.\n".encode())
    return home


def _stage(source: Store, folder: Path, progress: Callable[[str, int], None]) -> Store:
    """Lay the store's files into `folder`, without what is local; return what lies there."""
    staged = LocalFiles(folder / STAGED_FILES)
    staged.sweep()
    for name in list(staged.list("")):
        staged.delete(name)
    for done, name in enumerate(_files_of(source)):
        _link(source.files.local_path(name), staged.root / name)
        progress("stage", done + 1)
    scrub = Scrubber.of(source)
    for number in range(source.plan.parts):
        edit_part(staged, number, {"part": scrub.table, "videos": scrub.table})
    plan = Store(staged).plan
    reports = Reports()
    for column, key in list_commits(staged):
        commit = Commit.read(staged, key, column)
        clean = replace(commit, failed=tuple(map(scrub.failure, commit.failed)))
        if clean != commit:
            staged.write(commit_path(key, column), clean.to_json())
        reports.add(clean)
    index.write_index(staged, index.build_index(staged, use_cache=False))
    for name, data in reports.files(plan).items():
        staged.write(name, data)
    if not reports.quality:
        staged.delete(QUALITY)
    writer = StoreWriter(staged, source.meta)
    writer.complete(plan, lambda stored: _scrubbed_meta(stored or source.meta, scrub))
    return Store(staged)


def _files_of(source: Store) -> Iterator[str]:
    """Yield the files that make up a store, and nothing of the runs that made it."""
    meta, plan = source.meta, source.plan
    rows = array_rows(plan.shards(), meta.shard_rows)
    yield ROOT
    yield from source.layout.describe(meta, rows, source.columns)
    for number in range(plan.parts):
        yield from (part_path(kind, number) for kind in PART_KINDS)
    seen = set()
    for column, key in list_commits(source.files):
        if column in meta.columns:
            commit = source.commit(key, column)
            yield commit_path(key, column)
            if commit.file not in seen:
                seen.add(commit.file)
                yield commit.file


def _link(source: Path | None, target: Path) -> None:
    """Give a file a second name, or where file systems end between them, copy it."""
    if source is None or not source.is_file():
        raise StoreError(f"{source} is missing. Run `verify`, and mend the store first.")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@dataclass(frozen=True)
class Scrubber:
    """Takes this machine's folders out of names and texts."""

    prefix: str = ""
    """Before the names of videos that a table gave by absolute paths."""
    roots: tuple[str, ...] = ()

    @classmethod
    def of(cls, source: Store) -> Scrubber:
        names = source.plan.video_columns("video")["video"]
        local = names.filter(pc.starts_with(names, "/")).to_pylist()
        roots = {r.rstrip("/"): None for r in (source.meta.corpus, source.meta.root) if r}
        if not local:
            return cls(roots=tuple(roots))
        where = f"{source.files.url} calls videos by paths of this machine, such as {local[0]}"
        if source.meta.container != "zarr":
            raise StoreError(f"{where}, in its tars too. Convert it to Zarr, and publish that.")
        if len(local) < len(names):
            raise StoreError(
                f"{where}, and others by relative ones. List all of them below --root, and encode "
                "again."
            )
        folder = os.path.commonpath([str(Path(name).parent) for name in local])
        return cls(f"{folder.rstrip('/')}/", tuple(roots))

    def name(self, video: str) -> str:
        return video.removeprefix(self.prefix)

    def text(self, text: str) -> str:
        """Return a text with the last parts of its local paths alone."""
        for root in self.roots:
            if root.startswith(("/", "file://")):
                text = text.replace(f"{root}/", "")
        return LOCAL_PATH.sub("", text)

    def failure(self, failure: Failure) -> Failure:
        video, reason = self.name(failure.video), self.text(failure.reason)
        return replace(failure, video=video, reason=reason)

    def table(self, table: pa.Table) -> pa.Table:
        """Return a table of a plan with its names and texts so; captions are left."""
        for number, field in enumerate(table.schema):
            if not pa.types.is_string(field.type):
                continue
            values = table[field.name]
            change: Callable[[str], str] = _last_part
            if field.name in ("video", "duplicate_of"):
                change = self.name
            elif field.name in ("reason", "shots_problem"):
                change = self.text
            elif not pc.any(pc.match_substring_regex(values, "^(/|file://)")).as_py():
                continue
            changed = [v if v is None else change(v) for v in values.to_pylist()]
            table = table.set_column(number, field, pa.array(changed, field.type))
        return table


def _last_part(text: str) -> str:
    """Return the last part of a local path, and any other text as it is."""
    return text.rstrip("/").rpartition("/")[2] if text.startswith(("/", "file://")) else text


def _scrubbed_meta(meta: StoreMeta, scrub: Scrubber) -> StoreMeta:
    versions = {**meta.versions, "pyarrow": pa.__version__}  # which has written the reports anew
    corpus = meta.corpus if "://" in meta.corpus else Path(meta.corpus).name
    columns = {
        name: replace(column, weights=column.weights and _last_part(column.weights))
        for name, column in meta.columns.items()
    }
    return replace(meta, corpus=corpus, root=None, columns=columns, versions=versions)


# The upload.


def _client(repository: str, private: bool) -> Any:
    """Return the Hub's client, sure of a repository that it may write to."""
    hub = import_library("huggingface_hub", "publishing", extra="encode")
    if hub.get_token() is None:
        raise ConfigError(f"publishing needs a token of the Hub: {WAYS_IN} to {repository}.")
    api = hub.HfApi()
    with _told(repository):
        api.create_repo(repository, repo_type="dataset", private=private or None, exist_ok=True)
    return api


def _upload(api: Any, report: PublishReport, names: list[str]) -> int:
    """Bring a folder to the Hub; return how many files of an earlier one were deleted there."""
    with _told(report.repository):
        _send(api, report, ignore_patterns=[ROOT, CARD])
        _send(api, report, allow_patterns=[ROOT, CARD])
        there = set(api.list_repo_files(report.repository, repo_type="dataset"))
        stale = sorted(name for name in there - {*names} if ITS_OWN.fullmatch(name))
        if stale:
            api.delete_files(report.repository, stale, repo_type="dataset")
        return len(stale)


@contextmanager
def _told(repository: str) -> Iterator[None]:
    """Turn what the Hub's client raises into a StoreError of one line."""
    try:
        yield
    # Of its many errors, and those of its transport, each means that it is not done.
    except Exception as err:
        chain = [e for e in (err, err.__cause__) if e is not None]
        answers = [getattr(e, "response", None) for e in chain]
        why = first_line(chain[-1])
        if any(answer is not None and answer.status_code in (401, 403) for answer in answers):
            why = f"the Hub refuses this token: {WAYS_IN} there"
        raise StoreError(
            f"hf://datasets/{repository} is not uploaded yet: {why}. Run the same command again to "
            "go on."
        ) from err


def _send(api: Any, report: PublishReport, **patterns: Any) -> None:
    """Upload part of the folder, in several commits; what is there already is not sent again."""
    # Before 2.0 the Hub's client has one upload for large folders and one for small.
    send = getattr(api, "upload_large_folder", None) or api.upload_folder
    send(repo_id=report.repository, folder_path=report.folder, repo_type="dataset", **patterns)

"""Weights by name: a path, or a file of the Hugging Face Hub, fetched once a machine.

`hf://OWNER/NAME[@REVISION][/FILE]` is of the Hub; so is `OWNER/NAME` that is nothing on this
machine. What is in the Hub's cache is taken as it is and the Hub is not asked; `hf download` brings
a newer one. Places, mirror and token are those of huggingface_hub: HF_HOME, HF_ENDPOINT,
HF_HUB_OFFLINE, HF_TOKEN.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from reducio_latents.core.libraries import first_line, import_library
from reducio_latents.errors import WeightsError

log = logging.getLogger(__name__)

HUB = "hf://"
HUB_TIMEOUT_S = 10.0
"""Longest wait for the Hub's first answer."""
WEIGHT_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".safetensors")

_MODEL_FILE, _CONFIG_FILE = "model.safetensors", "config.json"

WeightsPlace = str | os.PathLike[str]
"""A path, or a name of the Hub; a Path is always a path."""

_REPOSITORY = r"(?P<repository>[\w.-]+/[\w.-]+)"
_BARE = re.compile(rf"{_REPOSITORY}(?:@(?P<revision>[\w./-]+))?")
_FULL = re.compile(
    rf"{HUB}{_REPOSITORY}(?:@(?P<revision>refs/pr/\d+|[^/@]+))?(?:/(?P<file>[^@]+?))?/?"
)


@dataclass(frozen=True)
class HubName:
    """A repository of models on the Hub, or a file or folder in it."""

    text: str
    """As it was given."""
    repository: str
    revision: str = "main"
    file: str = ""

    @property
    def page(self) -> str:
        return f"https://huggingface.co/{self.repository}"

    def snapshot(self, hub: Any) -> Path | None:
        """Return the folder in the Hub's cache that holds what was fetched of it, if any."""
        storage = self.storage(hub)
        reference = storage / "refs" / self.revision
        commit = reference.read_text() if reference.is_file() else self.revision
        folder = storage / "snapshots" / commit
        return folder if folder.is_dir() else None

    def storage(self, hub: Any) -> Path:
        """Return the repository's folder in the Hub's cache."""
        return Path(hub.constants.HF_HUB_CACHE) / f"models--{self.repository.replace('/', '--')}"


def hub_name(text: str) -> HubName | None:
    """Return what `text` names on the Hub; None if it is a path.

    What exists here is a path, and so is what looks like one: a beginning such as `/`, the ending
    of a weights file. Raises WeightsError for another URL, and for a name that is a mistyped path
    as likely: its first part is a folder here.
    """
    if text.startswith(HUB):
        found = _FULL.fullmatch(text)
        kinds = ("datasets/", "spaces/", "buckets/")
        if found is None or text[len(HUB) :].startswith(kinds) or ".." in text.split("/"):
            raise WeightsError(
                f"{text} names no model of the Hub; write hf://OWNER/NAME or hf://OWNER/NAME/FILE."
            )
        revision = unquote(found["revision"] or "main")
        return HubName(text, found["repository"], revision, found["file"] or "")
    if "://" in text:
        raise WeightsError(
            f"weights are not read from {text.partition('://')[0]}://; give a file on this "
            "machine, or hf://OWNER/NAME/FILE."
        )
    bare = _BARE.fullmatch(text)
    if (
        bare is None
        or text.startswith((".", "~"))
        or text.endswith(WEIGHT_SUFFIXES)
        or Path(text).exists()
    ):
        return None
    folder = text.partition("/")[0]
    if Path(folder).is_dir():
        raise WeightsError(
            f"there is no {text}, though there is a folder {folder}. Check the path; if it is a "
            f"model of the Hub, write {HUB}{text}."
        )
    return HubName(text, bare["repository"], bare["revision"] or "main")


def find_weights(place: WeightsPlace, *, usual: Sequence[str] = ()) -> Path:
    """Return the path of weights; those of the Hub are fetched if its cache lacks them.

    Of a repository without a FILE it is the first of `usual` that is there, then
    `model.safetensors`, then its only file of weights. Raises WeightsError where there is none.
    """
    name = hub_name(place) if isinstance(place, str) else None
    return Path(place) if name is None else fetch_file(name, usual=usual)


def fetch_file(name: HubName, *, usual: Sequence[str] = ()) -> Path:
    """Return the path, in the Hub's cache, of a repository's weights; its config lies beside.

    Processes of this machine that ask at once wait for the first. Raises WeightsError, saying why,
    if there is nothing to be had.
    """
    hub = hub_library(name)
    if name.file.endswith(WEIGHT_SUFFIXES):
        wanted = [name.file]
    else:
        inside = f"{name.file}/" if name.file else ""
        wanted = [inside + file for file in (*usual, _MODEL_FILE)]
    found = _cached(hub, name, wanted)
    if found is not None:
        return found
    with one_at_a_time(hub_lock(hub, name)):
        found = _cached(hub, name, wanted)
        if found is not None:
            return found
        try:
            return _download(hub, name, wanted)
        except WeightsError:
            raise
        # Of the many errors of the Hub's client and its transport each means that we have no file.
        except Exception as err:
            found = _fetched_before(hub, name, wanted)
            if found is not None:
                return found
            what = "is no file or folder here, and " if not name.text.startswith(HUB) else ""
            raise WeightsError(
                f"{name.text} {what}could not be fetched from the Hub: {why_not(err, name)}. To do "
                f"without it, take {wanted[0]} from {name.page} and give its path."
            ) from err


def _cached(hub: Any, name: HubName, wanted: Sequence[str]) -> Path | None:
    """Return the first of the files that is there, if the cache knows that none before it is."""
    for file in wanted:
        found = hub.try_to_load_from_cache(name.repository, file, revision=name.revision)
        if isinstance(found, str):
            return Path(found)
        if found is None:
            return None
    return None


def _fetched_before(hub: Any, name: HubName, wanted: Sequence[str]) -> Path | None:
    """Return what the cache has, where the Hub cannot be asked for better."""
    folder = name.snapshot(hub)
    if folder is None:
        return None
    found = [folder / file for file in wanted if (folder / file).is_file()]
    if found or name.file:
        return found[0] if found else None
    others = [path for path in sorted(folder.iterdir()) if path.name.endswith(WEIGHT_SUFFIXES)]
    return others[0] if len(others) == 1 else None


def _download(hub: Any, name: HubName, wanted: Sequence[str]) -> Path:
    # Asked beforehand, as a download without a network would try again for minutes.
    url = hub.hf_hub_url(name.repository, wanted[0], revision=name.revision)
    try:
        hub.get_hf_file_metadata(url, timeout=HUB_TIMEOUT_S)
    except Exception as err:
        unknown = type(err).__name__ in ("RepositoryNotFoundError", "RevisionNotFoundError")
        response = getattr(err, "response", None)
        if unknown or getattr(response, "status_code", 0) != 404:  # of a file, others may be there
            raise
    for file in wanted:
        try:
            return _download_file(hub, name, file)
        except hub.errors.EntryNotFoundError:
            continue
    revision = None if name.revision == "main" else name.revision
    listed = hub.HfApi().model_info(name.repository, revision=revision, timeout=HUB_TIMEOUT_S)
    files = sorted(str(file.rfilename) for file in listed.siblings or ())
    weights = [file for file in files if file.endswith(WEIGHT_SUFFIXES)]
    if not name.file and len(weights) == 1:
        return _download_file(hub, name, weights[0])
    known = f"its weights are {', '.join(weights[:8])}" if weights else "it has no weights at all"
    raise WeightsError(
        f"{name.text}: {name.repository} on the Hub has no {' and no '.join(wanted)}; {known}. "
        f"Write {HUB}{name.repository}/FILE."
    )


def _download_file(hub: Any, name: HubName, file: str) -> Path:
    """Fetch a file, and before it the config beside it: who has the one has the other."""
    settings = {"revision": name.revision, "etag_timeout": HUB_TIMEOUT_S}
    folder, slash, _ = file.rpartition("/")
    with suppress(hub.errors.EntryNotFoundError):
        hub.hf_hub_download(name.repository, f"{folder}{slash}{_CONFIG_FILE}", **settings)
    path = Path(hub.hf_hub_download(name.repository, file, **settings))
    # The Hub's name of a large file is its SHA-256, and its client compares sizes alone.
    stored = path.resolve()
    if re.fullmatch("[0-9a-f]{64}", stored.name):
        with stored.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        if found != stored.name:
            for place in (path, stored):
                place.unlink(missing_ok=True)
            raise WeightsError(
                f"{file} of {name.repository} came damaged: its SHA-256 is {found[:12]}, not "
                f"{stored.name[:12]}. It was removed; fetch it again."
            )
    return path


def why_not(err: Exception, name: HubName) -> str:
    """Return why the Hub gave nothing, in a clause."""
    token = "log in by `hf auth login`, or set HF_TOKEN"
    known = {
        "GatedRepoError": f"its terms must be accepted on {name.page}; then {token}",
        "RepositoryNotFoundError": f"there is no such repository, or it is private: then {token}",
        "RevisionNotFoundError": f"it has no revision {name.revision}",
        "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set, and its cache has none",
    }
    return known.get(type(err).__name__, first_line(err))


def hub_library(name: HubName) -> Any:
    """Import the Hub's client, with the parts that it loads when they are asked for."""
    for part in ("constants", "errors"):
        import_library(f"huggingface_hub.{part}", name.text, extra="encode")
    return import_library("huggingface_hub")


def hub_lock(hub: Any, name: HubName) -> Path:
    """Return the lock of those who fetch from a repository."""
    storage = name.storage(hub)
    return storage.parent / ".locks" / storage.name / "reducio-latents.lock"


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Let one process of this machine at a time through the block.

    Where no lock can be made, as in a cache that may only be read, all go: it saves work, no more.
    """
    from filelock import FileLock

    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(path))
        except (OSError, NotImplementedError) as err:
            log.debug("no lock at %s: %s", path, first_line(err))
        yield

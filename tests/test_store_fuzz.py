"""Hostile values in any field of any file of a store: the right data, or one clear error.

Each edit is made as a stranger would make it, with checksums that fit, and the store is then read,
shown, verified and converted by a process of its own, which may take little memory and time.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import resource
import shutil
import struct
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import google_crc32c
import pytest
import torch
import zarr.codecs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reducio_latents.core.parsing import compact_json
from reducio_latents.dataset import LatentDataset, LatentTable
from reducio_latents.errors import LatentsError
from reducio_latents.files import LocalFiles
from reducio_latents.store import open_store
from reducio_latents.store.meta import ATTRIBUTE, CHECKSUM
from reducio_latents.store.seal import seal
from reducio_latents.upkeep.convert import convert_store
from reducio_latents.upkeep.progress import progress_of, stage_seconds
from reducio_latents.upkeep.verify import verify
from tests.latent_stores import StoreSpec, image_of, numbers_in, write_store

assert zarr.codecs  # imported here once, not by every process that is forked off

COLUMNS = ("motion", "content_image", "caption", "text")
MEMORY = 500 << 20
CPU_S = 2.0
"""For all that is done with a store, which takes a fifth of it on an idle machine."""
TIMES_SOUND = 5.0
"""What a slow or busy machine may take instead: so many times what the sound store takes there."""
DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]
HOSTILE: list[Any] = [
    *(2**63, 2**63 - 1, 2**64, -1, -(2**70), 10**12, 0, 1, 7, 0.5, 1e300, True, None),
    *("", ".", "..", "/etc/passwd", "../secret.txt", "../../victim.latents", "xx", "object", "\0"),
    *("zstd", "bytes", "array", "float64", "16x99999x99999", "zarr", "webdataset", "image/png"),
    *(
        [],
        {},
        [2**40],
        [[-1, 5]],
        ["x"],
        {"..": 1},
        {"16x32x32": [2**31, 2**31]},
        DEEP,
        "a" * 10**6,
    ),
]


@pytest.fixture(scope="module", params=["zarr", "webdataset"])
def template(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small store, and files beside it that are none of its business."""
    folder = tmp_path_factory.mktemp(request.param)
    container: Literal["zarr", "webdataset"] = request.param
    spec = StoreSpec(videos=2, columns=COLUMNS, shard_rows=4, container=container)
    write_store(folder / "s", spec, compression="zstd" if container == "zarr" else "none")
    (folder / "secret.txt").write_text("secret " * 1000)
    (folder / "victim.latents").mkdir()
    return folder


@pytest.fixture(scope="module")
def most_s(template: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    """Seconds of CPU that a hostile store may take: a store that nobody edited keeps them, too."""
    folder = tmp_path_factory.mktemp("sound") / "copy"
    shutil.copytree(template, folder)
    wrong, sound_s = run_bounded(folder / "s", 60)
    assert wrong == ""
    return max(CPU_S, TIMES_SOUND * sound_s)


def leaves(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of every value in parsed JSON, also of those that hold others."""
    yield place
    pairs: Any = value.items() if isinstance(value, dict) else ()
    pairs = enumerate(value[:3]) if isinstance(value, list) else pairs
    for key, item in pairs:
        yield from leaves(item, (*place, key))


def put(value: Any, place: tuple[Any, ...], hostile: Any) -> Any:
    if not place:
        return hostile
    value[place[0]] = put(value[place[0]], place[1:], hostile)
    return value


def edit_json(path: Path, data: st.DataObject) -> None:
    record = json.loads(path.read_bytes())
    sealed = record.pop("crc32c", None) is not None
    places = [place for place in leaves(record) if place]
    place = data.draw(st.sampled_from(places), label="place")
    hostile = data.draw(st.sampled_from(HOSTILE), label="value")
    key = place[-1]
    if isinstance(key, str) and data.draw(st.booleans(), label="the name, not the value"):
        holder = record
        for step in place[:-1]:
            holder = holder[step]
        holder[str(hostile)[:200]] = holder.pop(key)
    else:
        record = put(record, place, hostile)
    described = record.get("attributes")
    if isinstance(described, dict) and isinstance(described.get(ATTRIBUTE), dict):
        described[CHECKSUM] = google_crc32c.value(compact_json(described[ATTRIBUTE]))
    body = compact_json(record)
    path.write_bytes(seal(body) if sealed else body)


def edit_bytes(path: Path, data: st.DataObject) -> None:
    whole = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(whole) - 1), label="at")
    if data.draw(st.booleans(), label="near the end"):
        at = max(0, len(whole) - 1 - at % 90)
    elif data.draw(st.booleans(), label="near the start"):
        at %= 90
    new = data.draw(
        st.sampled_from(
            [b"\xff" * 8, struct.pack("<Q", 2**63), b"", b"\0", b"\x28\xb5\x2f\xfd\xe0"]
        )
    )
    whole[at : at + max(1, len(new))] = new
    if "/c/" in path.as_posix() and len(whole) > 68:  # the checksum of where a shard's rows lie
        index = slice(-68, -4) if "/motion/" in path.as_posix() else slice(0, 64)
        end = (index.stop + 4) or None
        whole[index.stop : end] = struct.pack("<I", google_crc32c.value(bytes(whole[index])))
    path.write_bytes(whole)


def reseal_plan(root: Path) -> None:
    sums = [
        f"{hashlib.sha256((root / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("plan/part-00000.parquet", "plan/videos-00000.parquet")
    ]
    (root / "plan/sha256-00000.txt").write_text("".join(sums))


def use(root: Path) -> None:
    """Do with a store what can be done; raise AssertionError if it gives wrong data."""

    def attempt(action: Any) -> Any:
        try:
            return action()
        except LatentsError:
            return None

    def batches(**options: Any) -> None:
        dataset = LatentDataset(
            root, (*COLUMNS, "clip_id"), batch_size=5, latents="moments", drop_last=False, **options
        )
        for batch in dataset:
            for number, caption, image in zip(
                numbers_in(batch["motion"]), batch["caption"], batch["content_image"], strict=True
            ):
                if isinstance(caption, str):
                    assert caption == f"video {number // 4}"
                if not isinstance(image, bytes):
                    expected = image_of(number, "16x32x32")
                    assert (image.numpy().transpose(1, 2, 0) == expected).all()

    def latents(**options: Any) -> None:
        dataset = LatentDataset(root, batch_size=5, drop_last=False, **options)
        for batch in dataset:
            assert batch["latents"].dtype == torch.float32

    def look() -> None:
        store = open_store(root)
        assert "s" in store.files.url
        progress_of(store)
        stage_seconds(store)
        store.plan.counts()

    def show() -> None:
        table = LatentTable(root)
        for name in table.clip_ids:
            attempt(lambda name=name: table[name])

    attempt(batches)
    attempt(lambda: batches(on_error="skip"))
    attempt(lambda: latents(require_caption=True, split="train", clips_per_sample=2))
    attempt(latents)
    attempt(lambda: latents(latents="mean", normalize="channel"))
    attempt(look)
    attempt(show)
    attempt(lambda: verify(open_store(root)))
    for container in ("zarr", "webdataset"):
        target = LocalFiles(root.parent / f"converted-{container}")
        attempt(lambda c=container, t=target: convert_store(open_store(root), t, c))


def run_bounded(root: Path, most_s: float) -> tuple[str, float]:
    """Run `use` in a forked process within bounds.

    Return what went wrong, or nothing, and the seconds of CPU that it took.
    """
    report = root.parent / "report"
    child = os.fork()
    if child == 0:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        ends_s = math.ceil(most_s) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (ends_s, ends_s))
        status = 1
        try:
            begun_s = time.process_time()
            use(root)
            report.write_text(str(time.process_time() - begun_s))
            status = 0
        except BaseException:
            report.write_text(traceback.format_exc())
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    told = report.read_text() if report.exists() else "killed"
    return ("", float(told)) if status == 0 else (f"status {status}: {told}", 0.0)


def outside(folder: Path) -> dict[str, bytes]:
    known = ("s", "converted-zarr", "converted-webdataset")
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.relative_to(folder).parts[0] not in known
    }


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_hostile_store_gives_the_right_data_or_one_clear_error(
    template: Path, most_s: float, tmp_path: Path, data: st.DataObject
) -> None:
    folder = tmp_path / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder)
    root = folder / "s"
    before = outside(folder)
    files = sorted(path for path in root.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files), label="file")
    if path.suffix == ".json":
        edit_json(path, data)
    else:
        edit_bytes(path, data)
    if data.draw(st.booleans(), label="without an index"):
        (root / "index.json").unlink(missing_ok=True)
    if path.suffix == ".parquet" and data.draw(st.booleans(), label="plan sealed again"):
        reseal_plan(root)
    wrong, took_s = run_bounded(root, most_s)
    assert wrong == ""
    assert took_s < most_s
    (folder / "report").unlink()
    assert outside(folder) == before

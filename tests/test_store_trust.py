"""What a store from elsewhere can do: nothing but be right, or be refused by one clear error."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numcodecs import zstd
from PIL import Image

from reducio_latents.core.parsing import compact_json, parse_json
from reducio_latents.dataset import LatentDataset, LatentTable
from reducio_latents.errors import StoreError
from reducio_latents.files import LocalFiles
from reducio_latents.store import Store, open_store
from reducio_latents.store.commit import Commit, ShardKey, commit_path
from reducio_latents.store.index import PATH, build_index, same_clips
from reducio_latents.store.limits import MAX_ROW_BYTES, checked_ranges
from reducio_latents.store.meta import ATTRIBUTE, CHECKSUM
from reducio_latents.store.plan.bounded import bounded_table
from reducio_latents.store.reports import ERRORS, QUALITY, Reports
from reducio_latents.store.row_kinds import row_kind, zstd_size
from reducio_latents.store.seal import seal, unseal
from reducio_latents.store.writer import ColumnRows, StoreWriter
from reducio_latents.upkeep.convert import convert_store
from reducio_latents.upkeep.verify import verify
from tests.latent_stores import StoreSpec, meta_of, numbers_in, write_store
from tests.stores import MemoryFiles, make_store

BUCKET = "16x32x32"
KEY = ShardKey(BUCKET, 0)
ALL = ("motion", "content_image", "caption", "text")
SPEC = StoreSpec(videos=4, columns=ALL, shard_rows=4)


def change_index(root: Path, **changes: Any) -> None:
    record = unseal((root / PATH).read_bytes())
    record["commits"][0].update(changes)
    del record["crc32c"]
    (root / PATH).write_bytes(seal(compact_json(record)))


def change_meta(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Edit the description as a stranger would: with a checksum that fits."""
    from reducio_latents.store.meta import _checksum

    group = json.loads((root / "zarr.json").read_text())
    change(group["attributes"][ATTRIBUTE])
    group["attributes"][CHECKSUM] = _checksum(group["attributes"][ATTRIBUTE])
    (root / "zarr.json").write_text(json.dumps(group))


def read(root: Path, columns: tuple[str, ...] = ALL, **options: Any) -> list[int]:
    dataset = LatentDataset(
        root, columns, batch_size=8, latents="moments", shuffle=False, **options
    )
    return [number for batch in dataset for number in numbers_in(batch["motion"])]


@pytest.mark.parametrize(
    "changes",
    [
        {"file": "/etc/passwd", "file_bytes": 100},
        {"file": "../x"},
        {"shard": -1},
        {"shard": 10**30},
        {"rows": 10**12},
        {"rows": 10},
        {"failed": [4]},
        {"failed": [-1]},
        {"column": "../../victim.latents"},
        {"bucket": ".."},
        {"bucket": "16x99999x99999"},
        {"file_bytes": 2**63},
        {"file_sha256": "../../x"},
    ],
)
def test_an_index_that_says_what_cannot_be_is_refused(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    write_store(tmp_path, SPEC)
    change_index(tmp_path, **changes)
    with pytest.raises(StoreError):
        read(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["columns"].update({"../../victim.latents": d["columns"]["motion"]}),
        lambda d: d["columns"].update({"": d["columns"]["motion"]}),
        lambda d: d["columns"]["motion"].update(dtype="xx"),
        lambda d: d["columns"]["motion"].update(dtype="object"),
        lambda d: d["columns"]["motion"].update(row_shapes={BUCKET: [2**31, 2**31]}),
        lambda d: d["columns"]["motion"].update(row_shapes={BUCKET: [4, -1]}),
        lambda d: d["columns"]["motion"].update(row_shapes={"../x": [4]}),
        lambda d: d.update(shard_rows=10**12),
        lambda d: d.update(shard_rows=0),
        lambda d: d.update(buckets=["../.."]),
        lambda d: d.update(corpus="\ud800"),
    ],
)
def test_a_description_that_says_what_cannot_be_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    write_store(tmp_path, SPEC)
    with pytest.raises(StoreError):
        _changed(tmp_path, change)


def _changed(root: Path, change: Callable[[dict[str, Any]], object]) -> Store:
    change_meta(root, change)
    return open_store(root)


@pytest.mark.parametrize("name", ["zarr.json", PATH, commit_path(KEY, "motion")])
@pytest.mark.parametrize("depth", [40, 200_000])
def test_brackets_without_end_are_refused(tmp_path: Path, name: str, depth: int) -> None:
    write_store(tmp_path, SPEC)
    body = b'{"attributes":{"reducio_latents":' + b"[" * depth + b"]" * depth + b"}}"
    (tmp_path / name).write_bytes(seal(body))
    with pytest.raises(StoreError):
        read(tmp_path)


def test_json_is_parsed_to_a_depth() -> None:
    assert parse_json(b'[[1, {"a": []}]]', 4) == [[1, {"a": []}]]
    for text in (b"[[[[[]]]]]", b'{"a":{"a":{"a":{"a":{}}}}}', b"[" * 10**6, b"{", b"\xff"):
        with pytest.raises(ValueError, match=r"nests|JSON|Expecting|decode"):
            parse_json(text, 4)


@pytest.mark.parametrize("offset", [2**63, 2**63 - 8, 2**64 - 2, 2**62, 1 << 20])
@pytest.mark.parametrize("column", ["motion", "caption"])
def test_a_row_beyond_its_file_is_refused(tmp_path: Path, column: str, offset: int) -> None:
    store = write_store(tmp_path, SPEC)
    commit = store.commit(KEY, column)
    data = bytearray((tmp_path / commit.file).read_bytes())
    begin = len(data) - (4 * 16 + 4) if column == "motion" else 0
    index = data[begin:][: 4 * 16]
    index[:8] = offset.to_bytes(8, "little")
    data[begin : begin + 4 * 16 + 4] = index + np.uint32(_crc(bytes(index))).tobytes()
    (tmp_path / commit.file).write_bytes(data)
    for checksums in ("index", "full"):
        with pytest.raises(StoreError):
            read(tmp_path, checksums=checksums)
        found = read(tmp_path, checksums=checksums, on_error="skip", drop_last=False)
        assert found == list(range(4, 16))


def _crc(data: bytes) -> int:
    import google_crc32c

    return int(google_crc32c.value(data))


@pytest.mark.parametrize(
    "ranges", [[(2**63, 1)], [(-5, 1)], [(0, -1)], [(2**62, 2**62)], [(0, 101)], [("a", 1)], [(1,)]]
)
def test_ranges_are_inside_their_file(ranges: Any) -> None:
    assert checked_ranges([(-1, 0), (90, 10)], 100, "x").tolist() == [[-1, 0], [90, 10]]
    with pytest.raises(StoreError):
        checked_ranges(ranges, 100, "x")
    with pytest.raises(StoreError):
        checked_ranges([(0, MAX_ROW_BYTES + 1)], 1 << 40, "x")


def put_row(root: Path, column: str, payload: bytes, container: Any = "zarr") -> Store:
    """Write a store whose row 1 of a column is `payload` as it is stored, checksums and all."""
    compression: Any = "zstd" if column == "text" else "none"
    store = write_store(root, SPEC, container=container, compression=compression)
    commit = store.commit(KEY, column)
    rows: list[Any] = [
        store.files.read_range(commit.file, *map(int, place)) for place in store.ranges(commit)
    ]
    rows[1] = payload
    clips = [{"clip_id": name} for name in store.plan.shard_clips(*KEY)["clip_id"].to_pylist()]
    writer = StoreWriter(store.files, store.meta)
    writer.drop_commit(KEY, column)
    writer.write_payloads(KEY, clips, {column: ColumnRows(rows=rows)})
    store.files.delete(PATH)
    return store


def png(width: int, height: int) -> bytes:
    """Return a small file that says that it has so many pixels."""
    out = io.BytesIO()
    Image.new("1", (8, 8)).save(out, "PNG")
    data = bytearray(out.getvalue())
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = __import__("zlib").crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def head(size: int) -> bytes:
    """Return how a file begins that zstd unpacks to so many bytes."""
    return b"\x28\xb5\x2f\xfd" + bytes([0b11100000]) + size.to_bytes(8, "little")


HEAD_OF_4_TB = head(4 << 40) + b"\1"
ZEROS_128_KIB = (2 | 1 << 17 << 3).to_bytes(3, "little") + b"\0"
BOMB = head(1 << 30) + 8191 * ZEROS_128_KIB + b"\3" + ZEROS_128_KIB[1:]


@pytest.mark.parametrize(
    ("column", "payload"),
    [
        ("content_image", png(60_000, 60_000)),
        ("content_image", png(33, 32)),
        ("text", HEAD_OF_4_TB),
        ("text", BOMB),
        ("text", bytes(zstd.compress(b"\1\0\0\0\7\0\0\0\0\0\0\0", 3))),
        ("caption", b"\xff"),
    ],
)
@pytest.mark.parametrize("container", ["zarr", "webdataset"])
def test_a_row_that_would_unpack_to_too_much_costs_only_itself(
    tmp_path: Path, container: Any, column: str, payload: bytes
) -> None:
    put_row(tmp_path, column, payload, container)
    with pytest.raises(StoreError):
        read(tmp_path)
    table = LatentTable(tmp_path)
    assert len(table) == 16
    with pytest.raises(StoreError):
        table[1]
    assert read(tmp_path, on_error="skip", drop_last=False) == [0, *range(2, 16)]


def test_a_compressed_array_unpacks_to_its_own_size() -> None:
    column = replace(meta_of(SPEC).columns["motion"], compression="zstd")
    kind = row_kind(column)
    row = np.ones(kind.shape(BUCKET), np.float16)
    assert np.array_equal(kind.decode(kind.store(row), BUCKET), row)
    for bad in (b"", b"\x28\xb5\x2f\xfd", zstd.compress(bytes(33), 3), HEAD_OF_4_TB, BOMB):
        with pytest.raises(StoreError):
            kind.decode(bytes(bad), BUCKET)
    for size in (1, 255, 256, 65_791, 65_792, 1 << 20):
        assert zstd_size(bytes(zstd.compress(bytes(size), 3))) == size


@pytest.mark.parametrize(
    "texts",
    [
        lambda: pa.DictionaryArray.from_arrays(pa.array([0] * 9000), ["a" * 10**6]),
        lambda: pa.array(["a" * (65 << 20)]),
    ],
)
def test_a_table_that_unpacks_to_too_much_is_refused(texts: Callable[[], pa.Array]) -> None:
    table = pa.table({"caption": texts()})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", store_schema=False)
    data = sink.getvalue().to_pybytes()
    assert len(data) < 1 << 20
    with pytest.raises(ValueError, match=r"unpacks|rows in"):
        bounded_table(data)


# --- commits of other clips


def of_other_clips(files: Any, column: str, key: ShardKey = KEY) -> None:
    """Change a commit as the loser of a race leaves it: sound, but of another plan's clips."""
    write_again(files, replace(Commit.read(files, key, column), clips_sha256="0" * 64))


def write_again(files: Any, commit: Commit) -> None:
    files.write(commit_path(commit.key, commit.column), commit.to_json())


@pytest.mark.parametrize("container", ["zarr", "webdataset"])
@pytest.mark.parametrize("keeps_index", [True, False])
def test_rows_of_other_clips_are_not_read(
    tmp_path: Path, container: Any, keeps_index: bool
) -> None:
    store = write_store(tmp_path / "s", SPEC, container=container)
    of_other_clips(store.files, "motion")
    if not keeps_index:
        store.files.delete(PATH)
    for attempt in (
        lambda: read(tmp_path / "s"),
        lambda: LatentTable(tmp_path / "s")[1],
        lambda: open_store(tmp_path / "s").read_row(KEY, 1, "motion"),
        lambda: build_index(LocalFiles(tmp_path / "s"), use_cache=False),
    ):
        with pytest.raises(StoreError, match="other clips"):
            attempt()
    assert read(tmp_path / "s", on_error="skip", drop_last=False) == list(range(4, 16))
    other: Any = "zarr" if container == "webdataset" else "webdataset"
    with pytest.raises(StoreError, match="other clips"):
        convert_store(open_store(tmp_path / "s"), LocalFiles(tmp_path / "t"), other)
    assert not verify(open_store(tmp_path / "s")).ok


def test_shards_of_other_clips_count_as_not_done_when_a_run_goes_on(tmp_path: Path) -> None:
    store = write_store(tmp_path, SPEC)
    of_other_clips(store.files, "caption")
    assert ("caption", KEY) not in same_clips(store.files)
    StoreWriter(store.files, store.meta).drop_bad_commits(store.plan, [])
    assert not (tmp_path / commit_path(KEY, "caption")).exists()
    assert (tmp_path / commit_path(KEY, "motion")).exists()
    assert not (tmp_path / PATH).exists()


def test_identity_is_proven_without_the_plans_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reducio_latents.store.plan import parts

    write_store(tmp_path, SPEC, videos=40)

    def refuse(*_: object) -> None:
        raise AssertionError("a table of the plan was read")

    monkeypatch.setattr(parts.StoredPart, "group", refuse)
    assert read(tmp_path) == list(range(160))


def test_checksums_of_the_plan_that_are_no_text_are_one_clear_error(tmp_path: Path) -> None:
    write_store(tmp_path, SPEC)
    (tmp_path / "plan/sha256-00000.txt").write_bytes(b"\xff" * 8)
    for act in (lambda: open_store(tmp_path).plan.clips, lambda: read(tmp_path)):
        with pytest.raises(StoreError, match=r"^[^\n]*sha256-00000\.txt: [^\n]*$"):
            act()


# --- reports and files that nobody knows


@pytest.fixture
def reported() -> MemoryFiles:
    """A store with both of its reports, one clip having failed and one having been decoded."""
    from reducio_latents.store.commit import ClipQuality

    files = MemoryFiles()
    writer = make_store(files, failed={0: [1]})
    files.write("zarr.json", replace(writer.meta, versions={"pyarrow": pa.__version__}).to_json())
    commit = Commit.read(files, ShardKey("16x32x64", 1), "motion")
    quality = ClipQuality(row=0, clip_id="x", psnr=30.0, psnr_frames=(30.0,) * 16)
    write_again(files, replace(commit, quality=(quality,)))
    reports, store = Reports(), Store(files)
    for column, key in sorted(store.index.entries, key=lambda e: (e[1].bucket, *e)):
        reports.add(Commit.read(files, key, column))
    for name, data in reports.files(store.plan).items():
        files.write(name, data)
    files.write("README.md", b"# A store")
    return files


def test_every_flipped_byte_of_the_reports_is_found(reported: MemoryFiles) -> None:
    assert verify(Store(reported)).ok
    for name in (ERRORS, QUALITY):
        whole = reported.data[name]
        for position in range(0, len(whole), 61):
            changed = bytearray(whole)
            changed[position] ^= 1 << (position % 8)
            reported.data[name] = bytes(changed)
            assert [d.where for d in verify(Store(reported)).damage] == [f"memory/{name}"]
        reported.data[name] = whole
    assert verify(Store(reported)).ok


def test_a_report_of_another_run_is_found(reported: MemoryFiles) -> None:
    commit = Commit.read(reported, ShardKey("16x32x64", 0), "content_image")
    [failure] = commit.failed
    write_again(reported, replace(commit, failed=(replace(failure, reason="another"),)))
    reported.delete(PATH)
    make_index = build_index(reported, use_cache=False)
    reported.write(PATH, make_index.to_json())
    [damage] = verify(Store(reported)).damage
    assert damage.what.startswith("it is not what plan and commits say")


@pytest.mark.parametrize(
    "path", ["stray.bin", "16x32x64/motion/c/9/0/0/0/0", "commits/x", "plan/part-00009.parquet.bak"]
)
def test_files_that_nobody_knows_are_named(reported: MemoryFiles, path: str) -> None:
    reported.write("runs/1/order.json", b"{}")
    assert verify(Store(reported)).ok
    reported.write(path, b"?")
    assert [damage.where for damage in verify(Store(reported)).damage] == [f"memory/{path}"]

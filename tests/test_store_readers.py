"""What others read of a store: each column, each library that is here, and without a warning."""

from __future__ import annotations

import json
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import obstore.store
import pyarrow as pa
import pytest
import zarr
from zarr.storage import ObjectStore

from reducio_latents.store import Store
from reducio_latents.store.commit import ShardKey
from reducio_latents.store.container import ZarrLayout
from reducio_latents.store.plan import Plan
from reducio_latents.store.plan.parts import ShardRange
from tests.latent_stores import StoreSpec, write_store
from tests.stores import clip_ids, make_meta, plan_part, row_in

ROOT = Path(__file__).resolve().parents[1]
BUCKET = "16x32x32"
COLUMNS = ("motion", "content_latent", "scores", "content_image", "caption", "text")
SHARD_ROWS, CLIPS = 4, 12
ZARRITA = ROOT / ".venv/node/node_modules/zarrita"
ReadFrom = Callable[[Path], Any]
"""Opens an array, which can be sliced."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    spec = StoreSpec(videos=3, columns=COLUMNS, shard_rows=SHARD_ROWS, failed=frozenset({5}))
    return write_store(tmp_path_factory.mktemp("store"), spec)


def root_of(store: Store) -> Path:
    found = store.files.local_path("zarr.json")
    assert found is not None
    return found.parent


@pytest.fixture
def _strict() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def walk(group: Any) -> set[str]:
    """Return the names of all arrays, after reading each of them whole."""
    assert list(group) == list(dict(group.members()))
    assert group.tree() is not None
    found = dict(group.members(max_depth=None))
    arrays = {name: node for name, node in found.items() if isinstance(node, zarr.Array)}
    assert all(node[:].shape == node.shape for node in arrays.values())
    return set(arrays)


@pytest.mark.usefixtures("_strict")
def test_zarr_finds_all_arrays_and_warns_of_nothing(store: Store) -> None:
    root, wanted = root_of(store), {*COLUMNS, "clip_id", "video", "start_s"}
    objects = ObjectStore(obstore.store.LocalStore(root), read_only=True)  # as a bucket is listed
    for place in (root, objects):
        assert walk(zarr.open_group(place, mode="r")) == {f"{BUCKET}/{name}" for name in wanted}
        bucket = zarr.open_group(place, path=BUCKET, mode="r", use_consolidated=False)
        assert {name for name, _ in bucket.members()} == wanted


@pytest.mark.usefixtures("_strict")
def test_a_store_of_tars_says_that_it_holds_no_array(tmp_path: Path) -> None:
    write_store(tmp_path, StoreSpec(videos=1, container="webdataset"))
    assert list(zarr.open_group(tmp_path, mode="r").members()) == []


@pytest.mark.usefixtures("_strict")
def test_xarray_opens_a_store_with_clips_named_along_its_first_axis(store: Store) -> None:
    xarray = pytest.importorskip("xarray")
    root = root_of(store)
    tree = xarray.open_datatree(root, engine="zarr")
    for data in (
        xarray.open_zarr(root, group=BUCKET, chunks=None),
        xarray.open_dataset(root / BUCKET, engine="zarr"),
        tree[BUCKET].dataset,
    ):
        assert data.motion.dims == ("clip", "channel", "t", "y", "x")
        assert data.content_latent.dims[-2:] == ("content_latent_y", "content_latent_x")
        assert (data.scores.dims, data.scores.names) == (
            ("clip", "score"),
            ["motion", "brightness"],
        )
        assert data.caption.dims == ("shard", "caption_byte")
        assert set(data.coords) == {"clip_id", "video", "start_s"}
        clips = store.plan.clips
        for name in data.coords:
            assert data[name].dims == ("clip",)
            assert data[name].values.tolist() == clips[name].to_pylist()
        wanted = store.read_row(ShardKey(BUCKET, 1), 2, "motion")
        [found] = data.motion[data.clip_id == clips["clip_id"][6].as_py()].values
        np.testing.assert_array_equal(found, wanted)


def test_clips_stand_where_their_rows_do_when_a_plan_has_grown() -> None:
    """A part of a plan may end within a shard; the next begins with a shard."""
    first, more = plan_part(6, 4), plan_part(9, 4)
    clips = more.clips.slice(6)
    for name, values in (("shard", [2, 2, 2]), ("row", [0, 1, 2])):
        at = clips.schema.get_field_index(name)
        field = clips.schema.field(at)
        clips = clips.set_column(at, field, pa.array(values, field.type))
    shards = {"16x32x64": ShardRange(2, 3)}
    plan = Plan([first, replace(more, number=1, clips=clips, shards=shards)])
    texts = dict(ZarrLayout().coordinates(make_meta(), plan))["16x32x64/clip_id/c/0"]
    at = 4
    for name in [*clip_ids(6), "", "", *clip_ids(9)[6:]]:
        size = int.from_bytes(texts[at : at + 4], "little")
        assert texts[at + 4 : at + 4 + size].decode() == name
        at += 4 + size
    assert at + 4 * (16 * 4 - 11) == len(texts)


def by_zarr(path: Path) -> Any:
    return zarr.open_array(path, mode="r")


def by_zarrs(path: Path) -> Any:
    zarrs = pytest.importorskip("zarrs")
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        array = zarr.open_array(path, mode="r")
    assert isinstance(array.async_array.codec_pipeline, zarrs.ZarrsCodecPipeline)
    return array


def by_xarray(path: Path) -> Any:
    xarray = pytest.importorskip("xarray")
    return xarray.open_dataset(path.parent, engine="zarr", mask_and_scale=False)[path.name]


def by_tensorstore(path: Path) -> Any:
    tensorstore = pytest.importorskip("tensorstore")
    place = {"driver": "file", "path": f"{path}/"}
    return tensorstore.open({"driver": "zarr3", "kvstore": place}).result()


READERS: dict[str, ReadFrom] = {
    "zarr": by_zarr,
    "zarrs": by_zarrs,
    "xarray": by_xarray,
    "tensorstore": by_tensorstore,
}


def read_by(read_from: ReadFrom, path: Path, row: int) -> Any:
    """Return a row of a column as a library reads it; bytes of one that holds no numbers."""
    array = read_from(path)
    if path.name in ("content_image", "caption", "text"):
        return row_in(array, row, SHARD_ROWS)
    return np.asarray(array[row])


def test_who_reads_what_is_what_the_table_says(store: Store) -> None:
    lines = (ROOT / "docs/store.md").read_text().splitlines()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if line[:1] == "|"
    ]
    names = [cell.split() for cell in rows[0][1:]]
    libraries = [name for name, _ in names]
    table = {row[0].split("`")[1]: dict(zip(libraries, row[1:], strict=True)) for row in rows[2:]}
    assert table.keys() == {*COLUMNS, "clip_id", "video", "start_s"} - {"content_latent"}
    for name, number in names:
        if name != "zarrita":
            assert number == version(name), f"{name}: read with it, and say so in docs/store.md"
    clips = store.plan.clips
    for column, cells in table.items():
        for name, read_from in READERS.items():
            found, refused = [], ""
            for row in (0, 5, 7):
                try:
                    found.append(read_by(read_from, root_of(store) / BUCKET / column, row))
                except ValueError as err:
                    refused = str(err)
            assert found or "string" in refused, (column, name)
            assert cells[name] == ("yes" if found else "no"), (column, name)
            for row, value in zip((0, 5, 7), found, strict=False):
                if column in store.meta.columns:
                    wanted = store.read_row(ShardKey(BUCKET, row // 4), row % 4, column)
                    if wanted is None:  # it failed
                        assert value is None or np.isnan(value).all()
                        continue
                    same = isinstance(wanted, bytes) and value == wanted
                    assert same or np.array_equal(value, wanted, equal_nan=True), (column, name)
                else:
                    assert value == clips[column][row].as_py(), (column, name)


@pytest.mark.skipif(not ZARRITA.is_dir() or not shutil.which("node"), reason="zarrita is not here")
def test_zarrita_reads_all_but_float16(store: Store) -> None:
    """In JavaScript, in place of Python's libraries; `tools/setup dev` puts it there."""
    script = """
    const [zarrita, root, ...names] = process.argv.slice(1);
    const zarr = await import(zarrita + "/dist/src/index.js");
    const {default: Files} = await import(zarrita + "/../@zarrita/storage/dist/src/fs.js");
    const found = {};
    for (const name of names) {
      try {
        const place = zarr.root(new Files(root)).resolve(name);
        const array = await zarr.open(place, {kind: "array"});
        if (array.shape[1] > 1000) {
          const head = await zarr.get(array, [1, zarr.slice(48, 64)]);
          const pair = new BigUint64Array(head.data.slice().buffer);
          const end = Number(pair[0] + pair[1]);
          const row = await zarr.get(array, [1, zarr.slice(Number(pair[0]), end)]);
          found[name] = [...row.data];
        } else {
          const all = (await zarr.get(array)).data;
          found[name] = all.constructor.name.startsWith("Float") ? [...all].map(Number) : [...all];
        }
      } catch (err) { found[name] = "" + err; }
    }
    console.log(JSON.stringify([typeof Float16Array, found]));
    """
    names = ("motion", "scores", "content_image", "caption", "text", "clip_id", "video", "start_s")
    root = root_of(store) / BUCKET
    command = ["node", "--input-type=module", "-e", script, str(ZARRITA), str(root), *names]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    has_float16, found = json.loads(done.stdout)
    assert isinstance(found.pop("motion"), str) == (has_float16 == "undefined")
    for name in ("content_image", "caption", "text"):
        assert bytes(found[name]) == store.read_row(ShardKey(BUCKET, 1), 3, name)
    for name in ("clip_id", "video", "start_s"):
        assert found[name] == store.plan.clips[name].to_pylist()
    assert found["scores"][14] == 7

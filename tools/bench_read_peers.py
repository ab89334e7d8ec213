"""Other formats for `bench_read`: how each is written, and read at its best setting known to us.

Every function takes the clips and a folder, writes its files there unless they are there already,
and returns what gives one shuffled epoch. It raises ImportError if its library is not installed.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from bench_read_clips import Clips, Reader, Sample

BUFFER = 2048
"""Clips that a shuffle buffer holds, for formats that are read in order."""
BATCHES_PER_FILE = 16
"""Record batches of an Arrow file, where a data set is many files."""


def batched(samples: Iterator[tuple[NDArray[np.float16], str]], clips: Clips) -> Iterator[Sample]:
    """Stack single samples into batches, as a collate function would."""
    arrays: list[NDArray[np.float16]] = []
    captions: list[str] = []
    for array, caption in samples:
        arrays.append(array)
        captions.append(caption)
        if len(arrays) == clips.batch_size:
            yield torch.from_numpy(np.stack(arrays)), captions if clips.text else []
            arrays, captions = [], []


def order_of(clips: Clips) -> Iterator[NDArray[np.int64]]:
    order = np.random.default_rng(0).permutation(clips.count)
    for start in range(0, clips.count - clips.batch_size + 1, clips.batch_size):
        yield order[start : start + clips.batch_size]


def arrow(clips: Clips, folder: Path) -> Reader:
    """A memory-mapped Arrow file, one record batch, rows taken by number."""
    import pyarrow as pa

    path = folder / "clips.arrow"
    fields = [("motion", pa.binary(clips.row_bytes)), ("caption", pa.string())]
    if not path.exists():
        rows = [(block.data, first, len(block)) for first, block in clips.blocks()]
        motion = b"".join(bytes(data) for data, _, _ in rows)
        column = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(clips.row_bytes), clips.count, [None, pa.py_buffer(motion)]
        )
        captions = pa.array([clips.caption(n) for n in range(clips.count)])
        table = pa.record_batch([column, captions], schema=pa.schema(fields))
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_batch(table)
    table = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    if not clips.text:
        table = table.select(["motion"])

    def epoch() -> Iterator[Sample]:
        for chosen in order_of(clips):
            rows = table.take(pa.array(chosen))
            data = np.frombuffer(rows.column(0).buffers()[1], np.float16)
            captions = rows.column(1).to_pylist() if clips.text else []
            yield torch.from_numpy(data.reshape(len(chosen), *clips.shape)), captions

    return epoch


def arrow_files(clips: Clips, folder: Path) -> list[str]:
    """Write Arrow files of 16 record batches of 512 clips, and return where they are."""
    import pyarrow as pa

    root = folder / "arrow"
    schema = pa.schema([("motion", pa.binary(clips.row_bytes)), ("caption", pa.string())])
    if not root.exists():
        root.mkdir()
        blocks = clips.blocks()
        while some := list(islice(blocks, BATCHES_PER_FILE)):
            path = root / f"{some[0][0]:07d}.arrow"
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
                for first, block in some:
                    motion = pa.FixedSizeBinaryArray.from_buffers(
                        schema.field("motion").type, len(block), [None, pa.py_buffer(block.data)]
                    )
                    captions = pa.array([clips.caption(first + i) for i in range(len(block))])
                    writer.write_batch(pa.record_batch([motion, captions], schema=schema))
    return sorted(map(str, root.iterdir()))


def arrow_table(clips: Clips, folder: Path) -> Reader:
    """Files of many record batches, memory-mapped as one table, rows taken by number."""
    import pyarrow as pa

    files = [pa.ipc.open_file(pa.memory_map(path)) for path in arrow_files(clips, folder)]
    table = pa.concat_tables([file.read_all() for file in files])
    return taken(table if clips.text else table.select(["motion"]), clips)


def arrow_batches(clips: Clips, folder: Path) -> Reader:
    """The same files; rows are taken from each record batch by itself, and put together."""
    import pyarrow as pa

    files = [pa.ipc.open_file(pa.memory_map(path)) for path in arrow_files(clips, folder)]
    batches = [file.get_batch(i) for file in files for i in range(file.num_record_batches)]
    if not clips.text:
        batches = [batch.select(["motion"]) for batch in batches]
    size = len(batches[0])

    def epoch() -> Iterator[Sample]:
        for chosen in order_of(clips):
            numbers, rows = np.divmod(np.sort(chosen), size)  # a batch has no order of its own
            starts = np.flatnonzero(np.diff(numbers, prepend=-1))
            parts = [
                batches[number].take(pa.array(part))
                for number, part in zip(numbers[starts], np.split(rows, starts[1:]), strict=True)
            ]
            motion = pa.concat_arrays([part.column(0) for part in parts])
            data = np.frombuffer(motion.buffers()[1], np.float16)
            captions = (
                [text for p in parts for text in p.column(1).to_pylist()] if clips.text else []
            )
            yield torch.from_numpy(data.reshape(len(chosen), *clips.shape)), captions

    return epoch


def arrow_dataset(clips: Clips, folder: Path) -> Reader:
    """The same files as a `pyarrow.dataset`, rows taken by number."""
    import pyarrow.dataset as ds

    return taken(ds.dataset(arrow_files(clips, folder), format="arrow"), clips)


def taken(table: Any, clips: Clips) -> Reader:
    """Take the rows of shuffled batches from a table or a dataset."""
    import pyarrow as pa

    def epoch() -> Iterator[Sample]:
        for chosen in order_of(clips):
            rows = table.take(pa.array(chosen)).combine_chunks()
            motion = rows.column("motion").chunk(0)
            data = np.frombuffer(motion.buffers()[1], np.float16)
            captions = rows.column("caption").to_pylist() if clips.text else []
            yield torch.from_numpy(data.reshape(len(chosen), *clips.shape)), captions

    return epoch


def arrow_rows(clips: Clips, folder: Path) -> Reader:
    """One record batch, row by row, as a map-style dataset with a collate function gives it."""
    import pyarrow as pa

    arrow(clips, folder)
    table = pa.ipc.open_file(pa.memory_map(str(folder / "clips.arrow"))).get_batch(0)
    motion, captions = table.column(0), table.column(1)

    def rows() -> Iterator[tuple[NDArray[np.float16], str]]:
        for chosen in order_of(clips):
            for number in chosen.tolist():
                data = np.frombuffer(motion[number].as_buffer(), np.float16)
                caption = captions[number].as_py() if clips.text else ""
                yield data.reshape(clips.shape), caption

    return lambda: batched(rows(), clips)


def hf_datasets(clips: Clips, folder: Path) -> Reader:
    """Hugging Face datasets, map-style, a batch of rows asked for at once."""
    import datasets  # type: ignore[import-not-found]

    path = folder / "hf"
    if not path.exists():

        def rows() -> Iterator[dict[str, Any]]:
            for number, array in clips.clips():
                yield {"motion": array.tobytes(), "caption": clips.caption(number)}

        cache = str(folder / "hf_cache")
        datasets.Dataset.from_generator(rows, cache_dir=cache).save_to_disk(str(path))
    dataset = datasets.load_from_disk(str(path))
    if not clips.text:
        dataset = dataset.select_columns(["motion"])

    def epoch() -> Iterator[Sample]:
        for chosen in order_of(clips):
            batch = dataset[chosen.tolist()]
            arrays = [np.frombuffer(data, np.float16) for data in batch["motion"]]
            moments = torch.from_numpy(np.stack(arrays)).view(-1, *clips.shape)
            yield moments, batch["caption"] if clips.text else []

    return epoch


def parquet(clips: Clips, folder: Path) -> Reader:
    """Parquet, uncompressed: a row group is read whole and shuffled inside."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "clips.parquet"
    schema = pa.schema([("motion", pa.binary(clips.row_bytes)), ("caption", pa.string())])
    if not path.exists():
        with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
            for first, block in clips.blocks():
                motion = pa.FixedSizeBinaryArray.from_buffers(
                    pa.binary(clips.row_bytes), len(block), [None, pa.py_buffer(block.tobytes())]
                )
                captions = pa.array([clips.caption(first + i) for i in range(len(block))])
                writer.write_table(pa.table([motion, captions], schema=schema))
    columns = ["motion", "caption"] if clips.text else ["motion"]

    def epoch() -> Iterator[Sample]:
        file = pq.ParquetFile(path, memory_map=True)
        rng = np.random.default_rng(0)
        for group in rng.permutation(file.num_row_groups).tolist():
            table = file.read_row_group(group, columns=columns).combine_chunks()
            column = table["motion"].chunk(0)
            rows = np.frombuffer(column.buffers()[1], np.float16).reshape(-1, *clips.shape)
            order = rng.permutation(len(rows))
            for start in range(0, len(rows) - clips.batch_size + 1, clips.batch_size):
                chosen = order[start : start + clips.batch_size]
                captions = table["caption"].take(chosen).to_pylist() if clips.text else []
                yield torch.from_numpy(rows[chosen]), captions

    return epoch


def safetensors(clips: Clips, folder: Path) -> Reader:
    """One safetensors file a clip, as the published extraction writes them."""
    from safetensors.torch import load, save_file

    root = folder / "safetensors"
    if not root.exists():
        root.mkdir()
        for number, array in clips.clips():
            metadata = {"caption": clips.caption(number)}
            save_file({"z": torch.from_numpy(array)}, root / f"{number:07d}.safetensors", metadata)

    def epoch() -> Iterator[Sample]:
        for chosen in order_of(clips):
            files = [(root / f"{n:07d}.safetensors").read_bytes() for n in chosen.tolist()]
            captions = [clips.caption(n) for n in chosen.tolist()] if clips.text else []
            yield torch.stack([load(file)["z"] for file in files]), captions

    return epoch


def zarr_python(clips: Clips, folder: Path) -> Reader:
    """Our own store through zarr-python, row by row."""
    import zarr
    from bench_read_clips import write_store

    if not (folder / "zarr").exists():
        write_store(clips, folder, "zarr")
    bucket = f"16x{clips.size}x{clips.size}"
    motion = zarr.open_array(folder / "zarr" / bucket / "motion", mode="r")
    captions = zarr.open_array(folder / "zarr" / bucket / "caption", mode="r")

    def rows() -> Iterator[tuple[Any, str]]:
        for chosen in order_of(clips):
            for number in chosen.tolist():
                caption = captions[number : number + 1][0].decode() if clips.text else ""
                yield motion[number], caption

    return lambda: batched(rows(), clips)


def webdataset(clips: Clips, folder: Path) -> Reader:
    """The stock reader on our tars: shards in random order, and a shuffle buffer."""
    import webdataset as wds
    from bench_read_clips import write_store

    if not (folder / "webdataset").exists():
        write_store(clips, folder, "webdataset")
    tars = sorted(map(str, (folder / "webdataset").glob("*/*.tar")))
    wanted = {"motion.npy", "caption.txt"}

    def epoch() -> Iterator[Sample]:
        pipeline = wds.DataPipeline(
            wds.SimpleShardList(tars),
            wds.detshuffle(),
            wds.tarfile_to_samples(select_files=lambda name: name.split(".", 1)[-1] in wanted),
            wds.shuffle(BUFFER),
        )

        def rows() -> Iterator[tuple[NDArray[np.float16], str]]:
            for sample in pipeline:
                array = np.load(io.BytesIO(sample["motion.npy"]), allow_pickle=False)
                yield array, sample["caption.txt"].decode() if clips.text else ""

        return batched(rows(), clips)

    return epoch


def streaming(workers: int) -> Callable[[Clips, Path], Reader]:
    """mosaicml-streaming: MDS shards, shuffled by its own algorithm."""

    def open_reader(clips: Clips, folder: Path) -> Reader:
        from streaming import MDSWriter, StreamingDataset
        from streaming.base.util import clean_stale_shared_memory

        root = folder / "mds"
        if not root.exists():
            with MDSWriter(out=str(root), columns={"motion": "bytes", "caption": "str"}) as writer:
                for number, array in clips.clips():
                    writer.write({"motion": array.tobytes(), "caption": clips.caption(number)})
        clean_stale_shared_memory()
        dataset = StreamingDataset(
            local=str(root), shuffle=True, batch_size=clips.batch_size, shuffle_seed=0
        )

        def collate(samples: list[dict[str, Any]]) -> Sample:
            arrays = [np.frombuffer(s["motion"], np.float16) for s in samples]
            moments = torch.from_numpy(np.stack(arrays)).view(-1, *clips.shape)
            return moments, [s["caption"] for s in samples] if clips.text else []

        loader = torch.utils.data.DataLoader(
            dataset,
            batch_size=clips.batch_size,
            num_workers=workers,
            collate_fn=collate,
            drop_last=True,
        )
        return lambda: iter(loader)

    return open_reader


def litdata(workers: int) -> Callable[[Clips, Path], Reader]:
    """litdata: chunks of 64 MB, shuffled by its own loader."""

    def open_reader(clips: Clips, folder: Path) -> Reader:
        from litdata import StreamingDataLoader, StreamingDataset
        from litdata.streaming.writer import BinaryWriter

        root = folder / "litdata"
        if not root.exists():
            root.mkdir()
            writer = BinaryWriter(str(root), chunk_bytes="64MB")
            for number, array in clips.clips():
                writer[number] = {"motion": array.tobytes(), "caption": clips.caption(number)}
            writer.done()
            writer.merge()

        def collate(samples: list[dict[str, Any]]) -> Sample:
            arrays = [np.frombuffer(s["motion"], np.float16) for s in samples]
            moments = torch.from_numpy(np.stack(arrays)).view(-1, *clips.shape)
            return moments, [s["caption"] for s in samples] if clips.text else []

        loader = StreamingDataLoader(
            StreamingDataset(str(root), shuffle=True),
            batch_size=clips.batch_size,
            num_workers=workers,
            collate_fn=collate,
            drop_last=True,
        )
        return lambda: iter(loader)

    return open_reader


PEERS: dict[str, Callable[[Clips, Path], Reader]] = {
    "Arrow, one record batch, take": arrow,
    "Arrow, many record batches, Table.take": arrow_table,
    "Arrow, many record batches, take from each": arrow_batches,
    "Arrow, many files, Dataset.take": arrow_dataset,
    "Arrow, by row": arrow_rows,
    "Hugging Face datasets, map-style": hf_datasets,
    "Parquet, whole row groups": parquet,
    "WebDataset, stock reader": webdataset,
    "safetensors, one per clip": safetensors,
    "zarr-python": zarr_python,
    "mosaicml-streaming (MDS)": streaming(0),
    "mosaicml-streaming (MDS), 2 workers": streaming(2),
    "litdata": litdata(0),
    "litdata, 2 workers": litdata(2),
}

if __name__ == "__main__":
    sys.exit(__doc__)

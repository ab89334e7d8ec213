"""What a batch holds is what the store holds, whatever the container, and as documented."""

from __future__ import annotations

import pickle
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from reducio_latents.dataset import (
    LatentDataset,
    LatentLoader,
    mean_of_moments,
    sample_moments,
    sampling,
)
from reducio_latents.dataset import philox as philox_module
from reducio_latents.dataset.mapped import MappedColumn
from reducio_latents.dataset.memory_view import MemoryView
from reducio_latents.dataset.philox import philox, philox_numbers
from reducio_latents.dataset.sampling import Undrawn, normal
from reducio_latents.dataset.zarr_rows import ZarrColumn
from reducio_latents.errors import ConfigError, StoreError
from reducio_latents.files import open_files
from reducio_latents.files.cache import CachedFiles
from reducio_latents.store import Store
from tests.latent_stores import (
    CHANNELS,
    StoreSpec,
    image_of,
    moments_of,
    numbers_in,
    text_of,
    write_store,
)
from tests.stores import MemoryFiles

EVERYTHING = StoreSpec(
    videos=6,
    clips_per_video=3,
    buckets=("16x32x32", "16x64x32"),
    columns=("motion", "content_latent", "content_image", "caption", "text"),
    failed=frozenset({4}),
    captions=lambda video: tuple(f"caption {i} of {video} 🎬" for i in range(video % 3)),
)


@pytest.fixture(scope="module", params=["zarr", "webdataset"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("store")
    compression = "zstd" if request.param == "zarr" else "none"
    return write_store(
        folder / "latents", EVERYTHING, container=request.param, compression=compression
    )


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages of files are Linux's")
def test_the_kernel_is_asked_to_map_shards_in_huge_pages(tmp_path: Path) -> None:
    path = tmp_path / "latents"
    dataset = LatentDataset(write_store(path, EVERYTHING), batch_size=2, latents="moments")
    dataset.batch(0, 0)
    ours, flags = False, []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            ours = str(path) in line
        elif ours and line.startswith("VmFlags:"):
            flags.append(line.split())
    assert flags
    assert all("hg" in each for each in flags)


def number_of(store: Store) -> dict[str, int]:
    return {name: i for i, name in enumerate(store.plan.clips["clip_id"].to_pylist())}


def test_every_column_of_a_batch_is_that_of_its_clips(store: Store) -> None:
    columns = (*EVERYTHING.columns, "clip_id", "video", "start_s")
    dataset = LatentDataset(store, columns, batch_size=3, latents="moments")
    numbers, seen = number_of(store), 0
    for batch in dataset:
        shape = store.meta.columns["motion"].row_shapes[batch["bucket"]]
        height, width = map(int, batch["bucket"].split("x")[1:])
        clips = [numbers[name] for name in batch["clip_id"]]
        assert batch["motion"].dtype == torch.float16
        assert batch["motion"].shape == (3, *shape)
        assert batch["content_image"].shape == (3, 3, height, width)
        assert batch["content_image"].dtype == torch.uint8
        assert batch["text_mask"].dtype == torch.bool
        for i, number in enumerate(clips):
            video = number // EVERYTHING.clips_per_video
            assert np.array_equal(batch["motion"][i], moments_of(number, shape))
            picture = image_of(number, batch["bucket"]).transpose(2, 0, 1)
            assert np.array_equal(batch["content_image"][i], picture)
            found = video_number(batch["video"][i])
            captions = EVERYTHING.captions(found) or ("",)
            which = captions.index(batch["caption"][i])
            tokens = batch["text"][i][batch["text_mask"][i]]
            assert np.array_equal(tokens, text_of(number, which))
            assert not batch["text"][i][~batch["text_mask"][i]].any()
            assert video >= 0
        seen += len(clips)
    assert seen == 15  # 18, one failed, and each bucket's last batch is not full
    assert dataset.num_samples == 17


def video_number(name: str) -> int:
    return int(Path(name).stem)


def test_only_the_columns_that_were_asked_for_are_read(tmp_path: Path) -> None:
    store = write_store(tmp_path, EVERYTHING)
    for column in ("content_image", "caption", "text", "content_latent"):
        for path in list(store.files.list("")):
            if f"/{column}/c/" in path:
                store.files.delete(path)
    (batch, *_) = LatentDataset(tmp_path, batch_size=3, latents="moments")
    assert batch.keys() == {"bucket", "motion"}


def test_final_latents_follow_the_rule_in_the_store(store: Store) -> None:
    columns = ("motion", "content_latent")
    raw = LatentDataset(store, columns, batch_size=4, latents="moments").batch(0, 1)
    mean = LatentDataset(store, columns, batch_size=4, latents="mean").batch(0, 1)
    rules = {name: store.meta.columns[name].final or {} for name in columns}
    assert torch.equal(mean["latents"], mean_of_moments(raw["motion"], rules["motion"]))
    flat = mean["latents"].flatten(1)
    assert mean["latents"].dtype == torch.float32
    assert torch.allclose(flat.mean(1), torch.zeros(4), atol=1e-5)
    expected = (raw["content_latent"][:, :4].float() - 0.25) * 0.5
    assert torch.equal(mean["content_latent"], expected)
    assert "motion" not in mean


def test_a_draw_is_decided_by_seed_epoch_and_clip_alone(tmp_path: Path) -> None:
    write_store(tmp_path, videos=8)

    def draws(batch_size: int, epoch: int = 0, **keywords: Any) -> dict[str, torch.Tensor]:
        dataset = LatentDataset(tmp_path, ("motion", "clip_id"), batch_size=batch_size, **keywords)
        found: dict[str, torch.Tensor] = {}
        for k in range(dataset.num_batches(epoch)):
            batch = dataset.batch(epoch, k)
            found |= dict(zip(batch["clip_id"], batch["latents"], strict=True))
        return found

    one, other = draws(4), draws(2, rank=1, world_size=4)
    assert other
    assert all(torch.equal(one[name], other[name]) for name in other)
    name = next(iter(one))
    assert not torch.equal(one[name], draws(4, epoch=1)[name])
    assert not torch.equal(one[name], draws(4, seed=1)[name])


PUBLISHED_BLOCKS = [
    # Random123 1.14, tests/kat_vectors, philox4x64 10: counter, key, words.
    ([0] * 4, [0] * 2, "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"),
    (
        [2**64 - 1] * 4,
        [2**64 - 1] * 2,
        "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0",
    ),
    (
        [0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89],
        [0x452821E638D01377, 0xBE5466CF34E90C6C],
        "a528f45403e61d95 38c72dbd566e9788 a5a1610e72fd18b5 57bd43b5e52b7fe6",
    ),
]


def int64(values: list[Any]) -> torch.Tensor:
    return torch.from_numpy(np.array(values, np.uint64).view(np.int64))


FIRST_NUMBERS = [-2994, -15687, -4786, 17256]
FIRST_NORMAL = [0.4312805, -0.4663959, 2.3499811, -0.8892911]


def test_noise_is_philox_as_published() -> None:
    counters, keys, words = zip(*PUBLISHED_BLOCKS, strict=True)
    expected = [[int(word, 16) for word in block.split()] for block in words]
    found = philox(int64(list(counters)).T, int64(list(keys)).T)
    assert torch.equal(found.T, int64(expected))


def test_noise_is_the_same_integers_by_numpy_and_by_torch() -> None:
    """These values must never change: a seed means them, on the CPU and on a GPU."""
    keys = [0, 1, 2**63, 2**64 - 1, 0x452821E638D01377]
    found = philox_numbers(int64(keys), 67)
    by_torch = philox_module._words_by_torch(int64(keys), 5)
    assert torch.equal(by_torch.view(torch.int16)[:, :67], found)
    assert found.shape == (5, 67)
    assert torch.equal(philox_numbers(int64(keys[2:3]), 9), found[2:3, :9])
    assert found[4, :4].tolist() == FIRST_NUMBERS
    assert normal(found)[4, :4].tolist() == pytest.approx(FIRST_NORMAL, abs=1e-6)


def test_noise_is_normal_and_without_correlation() -> None:
    keys = np.arange(2000, dtype=np.uint64) * np.uint64(2**63 + 77)
    noise = normal(philox_numbers(torch.from_numpy(keys.view(np.int64)), 128)).double()
    flat = noise.flatten()
    for power, (moment, error) in enumerate([(0, 1), (1, 2**0.5), (0, 15**0.5), (3, 96**0.5)], 1):
        assert abs(float((flat**power).mean()) - moment) < 5 * error / len(flat) ** 0.5
    ranks = torch.special.ndtr(flat.sort().values) - torch.linspace(0, 1, len(flat)).double()
    assert float(ranks.abs().max()) < 2 / len(flat) ** 0.5  # Kolmogorov and Smirnov's, 1 in 1500
    between_clips = torch.corrcoef(noise[:256]).fill_diagonal_(0) * 256**0.5
    between_places = torch.corrcoef(noise.T).fill_diagonal_(0) * 2000**0.5
    for found in (between_clips, between_places):
        assert float(found.abs().max()) < 6
        assert abs(float((found**2).mean()) - 1) < 0.05
    assert float(flat.max()) > 4.2


def test_noise_is_normal_along_every_line_of_the_plane() -> None:
    every = torch.arange(2**16).to(torch.int16)[None]
    points = normal(every).double().view(-1, 2)
    assert torch.allclose(points.mean(0), torch.zeros(2).double(), atol=1e-7)
    assert torch.allclose(torch.cov(points.T, correction=0), torch.eye(2).double(), atol=1e-6)
    middles = (torch.arange(len(points)) + 0.5).double() / len(points)
    for angle in torch.linspace(0, torch.pi, 13).double():
        along = (points @ torch.stack([angle.cos(), angle.sin()])).sort().values
        assert float((torch.special.ndtr(along) - middles).abs().max()) < 3.4e-4
        assert float((along**4).mean()) == pytest.approx(3, abs=0.01)


def test_a_draw_is_the_same_in_pieces_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = {"rule": "scale_shift", "scale": 2.0, "shift": 0.5}
    moments = torch.randn((7, 6, 3, 5, 5), generator=torch.Generator().manual_seed(0)).half()
    keys = int64([3, 1, 4, 1, 5, 9, 2])
    undrawn = [Undrawn(moments, k, rule, ([0.0] * 3, [2.0] * 3)) for k in (keys, None)]
    whole = [each.draw() for each in undrawn]
    monkeypatch.setattr(sampling, "PIECE_VALUES", moments[0].numel())
    assert all(torch.equal(each.draw(), w) for each, w in zip(undrawn, whole, strict=True))
    assert undrawn[0].to(torch.device("cpu")).draw().shape == (7, 3, 3, 5, 5)
    assert Undrawn(moments[:0], keys[:0], rule).draw().shape == (0, 3, 3, 5, 5)


def test_a_draw_is_of_the_noise_of_its_keys() -> None:
    rule = {"rule": "layer_norm", "eps": 1e-5}
    moments = torch.randn((5, 4, 3, 9, 9), generator=torch.Generator().manual_seed(0)).half()
    keys = int64([3, 1, 4, 1, 5])
    drawn = Undrawn(moments, keys, rule).draw()
    noise = normal(philox_numbers(keys, 3 * 9 * 9)).view(5, 2, 3, 9, 9)
    assert torch.allclose(drawn, sample_moments(moments, rule, noise=noise), atol=1e-6)
    assert torch.equal(noise[1], noise[3])
    assert Undrawn(moments, keys, rule, clips=5).draw().shape == (1, 5, 2, 3, 9, 9)


def test_given_noise_is_scaled_by_the_posterior() -> None:
    moments = torch.stack([torch.full((16, 1, 2, 2), 3.0), torch.full((16, 1, 2, 2), 2.0)], 1)
    rule = {"rule": "scale_shift", "scale": 1.0, "shift": 0.0}
    flat = moments.flatten(1, 2)
    drawn = sample_moments(flat, rule, torch.Generator().manual_seed(0))
    assert drawn.shape == (16, 1, 2, 2)
    given_noise = sample_moments(flat, rule, noise=torch.ones(16, 1, 2, 2))
    assert torch.allclose(given_noise, torch.full((16, 1, 2, 2), 3 + np.exp(1)))


def test_normalised_latents_have_zero_mean_and_unit_variance_per_channel(tmp_path: Path) -> None:
    write_store(tmp_path, videos=40)
    dataset = LatentDataset(
        tmp_path, batch_size=160, latents="mean", normalize="channel", shuffle=False
    )
    (batch,) = dataset
    latents = batch["latents"].transpose(0, 1).flatten(1)
    assert torch.allclose(latents.mean(1), torch.zeros(CHANNELS), atol=1e-3)
    assert torch.allclose(latents.std(1), torch.ones(CHANNELS), atol=1e-2)


def test_text_can_be_padded_and_cut_to_one_length(store: Store) -> None:
    for length in (1, 7):
        dataset = LatentDataset(store, ("text",), batch_size=4, text_tokens=length)
        assert {tuple(b["text"].shape) for b in dataset} == {(4, length, 5)}
        assert all(b["text_mask"].sum(1).max() <= length for b in dataset)


def test_a_clip_gets_another_of_its_captions_in_another_epoch(tmp_path: Path) -> None:
    write_store(tmp_path, columns=("caption",), captions=lambda v: ("a", "b"), videos=8)
    dataset = LatentDataset(tmp_path, ("caption", "clip_id"), batch_size=32)
    epochs = [dict(zip(b["clip_id"], b["caption"], strict=True)) for b in (*dataset, *dataset)]
    assert epochs[0].keys() == epochs[1].keys()
    changed = sum(epochs[0][name] != epochs[1][name] for name in epochs[0])
    assert 0 < changed < 32


def test_images_can_be_left_encoded(store: Store) -> None:
    dataset = LatentDataset(store, ("content_image",), batch_size=2, images="bytes")
    assert all(data.startswith(b"\x89PNG") for batch in dataset for data in batch["content_image"])


def test_sequences_are_consecutive_clips_of_one_video(tmp_path: Path) -> None:
    spec = StoreSpec(videos=9, clips_per_video=7, shard_rows=20, failed=frozenset({8}))
    write_store(tmp_path, spec, columns=("motion", "caption"))
    columns = ("motion", "caption", "video", "start_s", "clip_id")
    dataset = LatentDataset(
        tmp_path, columns, batch_size=2, clips_per_sample=3, latents="moments", drop_last=False
    )
    seen: set[str] = set()
    for batch in dataset:
        count = len(batch["video"])
        assert batch["motion"].shape == (count, 3, 2 * CHANNELS, 4, 1, 1)
        assert batch["start_s"].shape == (count, 3)
        for videos, starts, ids, captions in zip(
            batch["video"], batch["start_s"], batch["clip_id"], batch["caption"], strict=True
        ):
            assert len(set(videos)) == 1
            assert len(captions) == 3
            assert torch.equal(starts, starts[0] + torch.arange(3))
            assert not seen & set(ids)
            seen |= set(ids)
    # 7 clips give 2 sequences; the failed one, and borders of shards, cost some of them.
    assert dataset.num_samples == len(seen) / 3
    assert 13 <= dataset.num_samples <= 17
    drawn = LatentDataset(tmp_path, batch_size=2, clips_per_sample=3).batch(0, 0)
    assert drawn["latents"].shape == (2, 3, CHANNELS, 4, 1, 1)


def test_overlapping_clips_make_no_sequences(tmp_path: Path) -> None:
    write_store(tmp_path, policy="stride:0.5")
    with pytest.raises(ConfigError, match="no sample"):
        LatentDataset(tmp_path, batch_size=1, clips_per_sample=2)


def test_a_job_sees_the_commits_that_there_were_when_it_began(tmp_path: Path) -> None:
    from reducio_latents.files import LocalFiles
    from reducio_latents.store.commit import ShardKey
    from tests.latent_stores import plan_store, write_shard

    spec = StoreSpec(videos=8)
    writer = plan_store(LocalFiles(tmp_path), spec)
    write_shard(writer, spec, ShardKey("16x32x32", 1))
    dataset = LatentDataset(tmp_path, batch_size=4, latents="moments")
    write_shard(writer, spec, ShardKey("16x32x32", 2))
    again = pickle.loads(pickle.dumps(dataset))
    for each in (dataset, again):
        assert sorted(n for b in each for n in numbers_in(b["motion"])) == list(range(8, 16))
    assert LatentDataset(tmp_path, batch_size=4).num_samples == 16


def test_remote_files_are_read_without_a_map() -> None:
    files = MemoryFiles()
    write_store(files, EVERYTHING)
    dataset = LatentDataset(Store(files), ("motion", "caption"), batch_size=3, latents="moments")
    numbers = [n for batch in dataset for n in numbers_in(batch["motion"])]
    assert len(set(numbers)) == 15


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the URL of a store that is not on this machine's disk."""
    monkeypatch.setenv("REDUCIO_CACHE", str(tmp_path / "cache"))
    url = f"memory://{uuid.uuid4().hex}"
    write_store(open_files(url), EVERYTHING, videos=16, shard_rows=4)
    return url


def test_a_remote_store_is_read_through_a_cache_of_whole_shards(
    remote: str, tmp_path: Path
) -> None:
    columns = ("motion", "caption", "clip_id")
    options: dict[str, Any] = {"batch_size": 3, "latents": "moments", "window_shards": 2}
    dataset = LatentDataset(remote, columns, **options)
    write_store(tmp_path / "near", EVERYTHING, videos=16, shard_rows=4)
    near = LatentDataset(tmp_path / "near", columns, **options)
    dataset.batch(0, 0)
    files = dataset.sources[0].store.files
    assert isinstance(files, CachedFiles)
    files.close()  # wait for what is fetched ahead
    blobs = list((tmp_path / "cache").glob("*.blob"))
    # One window of each bucket was asked for, and the next one of that of the first batch.
    shards = sum(len(part.shards) for part in dataset.sources[0].selection.values())
    assert 4 <= len(blobs) < 2 * shards
    for ours, theirs in zip(dataset, near, strict=True):
        assert torch.equal(ours["motion"], theirs["motion"])
        assert ours["clip_id"] == theirs["clip_id"]
    fetched = len(list((tmp_path / "cache").glob("*.blob")))
    assert [b["caption"] for b in LatentDataset(remote, columns, **options)]
    assert len(list((tmp_path / "cache").glob("*.blob"))) == fetched


def test_a_cache_that_cannot_be_is_an_error_at_open(
    remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("REDUCIO_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(StoreError, match=r"cannot make the cache folder .* Set REDUCIO_CACHE"):
        LatentDataset(remote, batch_size=3)


def test_many_shards_that_cannot_be_read_are_one_short_error(
    remote: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unreachable(files: CachedFiles, path: str) -> Path:
        raise StoreError(f"cannot read {path}: no answer.")

    dataset = LatentDataset(remote, batch_size=12, buckets="16x32x32")
    monkeypatch.setattr(CachedFiles, "local_path", unreachable)
    with pytest.raises(
        StoreError, match=r"no answer\. Of the batch \d+ more shards cannot be read"
    ):
        list(dataset)
    files = dataset.sources[0].store.files
    assert isinstance(files, CachedFiles)
    deadline = time.monotonic() + 300
    while "cannot fetch ahead" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.01)  # threads fetch
    files.close()
    assert caplog.text.count("cannot fetch ahead") == 1


def test_a_shard_that_arrives_damaged_is_refused(remote: str) -> None:
    dataset = LatentDataset(remote, batch_size=3)
    files = open_files(remote)
    for entry in dataset.sources[0].store.index.entries.values():
        files.write(entry.file, files.read(entry.file)[:-1] + b"x")
    with pytest.raises(StoreError, match="sha256"):
        list(dataset)


@pytest.mark.filterwarnings("ignore:The data type")
def test_arrays_rewritten_by_another_tool_are_read_through_it(tmp_path: Path) -> None:
    """A store that someone compressed with zarr-python still gives the same batches."""
    columns = ("motion", "caption", "clip_id")
    spec = StoreSpec(videos=6, columns=("motion", "caption"), captions=lambda v: ("text\0" * v,))
    write_store(tmp_path, spec)
    before = list(LatentDataset(tmp_path, columns, batch_size=4, latents="moments"))
    for name in spec.columns:
        array = zarr.open_array(tmp_path / "16x32x32" / name, mode="r")
        values = array[:]
        copy = zarr.create_array(
            tmp_path / "16x32x32" / name,
            shape=array.shape,
            chunks=(3, *array.shape[1:]),
            dtype=array.metadata.data_type,
            compressors=zarr.codecs.ZstdCodec(),
            overwrite=True,
        )
        copy[:] = values
    dataset = LatentDataset(tmp_path, columns, batch_size=4, latents="moments")
    after = list(dataset)
    for name in spec.columns:
        reader = dataset.sources[0].reader(name, "16x32x32", window_shards=64, check_rows=False)
        assert isinstance(reader, ZarrColumn)
    for ours, theirs in zip(before, after, strict=True):
        assert torch.equal(ours["motion"], theirs["motion"])
        assert ours["caption"] == theirs["caption"]
        assert ours["clip_id"] == theirs["clip_id"]


def mapped(store: Store, column: str = "motion", capacity: int = 256) -> MappedColumn:
    shards = sorted({key.shard for _, key in store.index.entries})
    return MappedColumn(store, column, "16x32x32", shards, capacity=capacity, check_rows=False)


def test_few_shards_stay_open_and_every_row_is_still_found(tmp_path: Path) -> None:
    store = write_store(tmp_path, videos=20, shard_rows=4, columns=("motion", "caption"))
    rng = np.random.RandomState(0)
    motion, caption = mapped(store, capacity=3), mapped(store, "caption", capacity=3)
    for size in (1, 2, 3, 5, 40):
        for _ in range(20):
            shards, rows = rng.randint(0, 20, size), rng.randint(0, 4, size)
            assert numbers_in(motion.arrays(shards, rows)) == (4 * shards + rows).tolist()
            texts = caption.payloads(shards, rows)
            assert texts == [b"video %d" % shard for shard in shards]
        # No more than three, unless one batch needs them.
        assert len(motion._open) == 3 if size <= 3 else len(motion._open) >= 5


def test_threads_may_read_while_others_make_shards_go(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    store = write_store(tmp_path, videos=30, shard_rows=4)
    reader = mapped(store, capacity=2)

    def read(seed: int) -> bool:
        rng = np.random.RandomState(seed)
        good = True
        for _ in range(60):
            shards, rows = rng.randint(0, 30, 6), rng.randint(0, 4, 6)
            good &= numbers_in(reader.arrays(shards, rows)) == (4 * shards + rows).tolist()
        return good

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(8)))


@settings(max_examples=20)
@given(
    st.lists(st.integers(0, 2000), min_size=1, max_size=20),
    st.sampled_from([1, 2, 4, 64, 512]),
    st.sampled_from(["<f2", "<f4", "|u1"]),
)
def test_rows_at_any_addresses_are_gathered(places: list[int], unit: int, dtype: str) -> None:
    data = np.random.RandomState(0).randint(0, 256, 2**21, dtype=np.uint8)
    kind = np.dtype(dtype)
    offsets = np.array(places) * unit
    base = data.ctypes.data
    view = MemoryView((2, 3), kind)
    for offset in offsets:  # one by one, so that it has to grow
        view = view.covering(np.array([base + offset]))
    aligned = all((base + offset) % kind.itemsize == 0 for offset in offsets)
    assert view.can_gather or not aligned
    if view.can_gather:
        rows = view.gather(base + offsets).numpy()
        expected = [np.frombuffer(data, kind, 6, offset).reshape(2, 3) for offset in offsets]
        assert rows.tobytes() == np.stack(expected).tobytes()


def test_rows_at_odd_addresses_are_read_too(tmp_path: Path) -> None:
    store = write_store(tmp_path, videos=4)
    reader = mapped(store)
    shape = store.meta.columns["motion"].row_shapes["16x32x32"]
    reader._view = MemoryView(shape, np.dtype(np.float16), 0, 1 << 40, 1)
    assert not reader._view.can_gather
    assert numbers_in(reader.arrays(np.array([1, 0]), np.array([2, 3]))) == [10, 3]


def test_a_mixture_gives_each_store_its_weight(tmp_path: Path) -> None:
    write_store(tmp_path / "a", videos=8)
    write_store(tmp_path / "b", videos=4)
    stores = [tmp_path / "a", tmp_path / "b"]
    dataset = LatentDataset.mix(
        stores, weights=[1, 2], columns=("motion", "clip_id"), batch_size=8, latents="moments"
    )
    batches = list(dataset)
    assert len(batches) == len(dataset.sources) * 4
    assert dataset.num_samples == 48
    names = [name for batch in batches for name in batch["clip_id"]]
    shared = number_of(Store(dataset.sources[1].store.files))
    assert sorted(names.count(name) for name in shared) == [3] * 16  # once, and twice
    for batch in batches:
        numbers = number_of(dataset.sources[0].store)
        assert numbers_in(batch["motion"]) == [numbers[name] for name in batch["clip_id"]]


def test_a_mixture_of_different_encoders_is_refused(tmp_path: Path) -> None:
    write_store(tmp_path / "a")
    write_store(tmp_path / "b", weights="b")
    with pytest.raises(ConfigError, match="different encoders"):
        LatentDataset.mix([tmp_path / "a", tmp_path / "b"], batch_size=2)


def test_statistics_of_a_mixture_are_those_of_all_its_clips(tmp_path: Path) -> None:
    write_store(tmp_path / "a", videos=30)
    write_store(tmp_path / "b", videos=10)
    dataset = LatentDataset.mix(
        [tmp_path / "a", tmp_path / "b"], batch_size=160, latents="mean", normalize="channel"
    )
    (batch,) = dataset
    latents = batch["latents"].transpose(0, 1).flatten(1)
    assert torch.allclose(latents.std(1), torch.ones(CHANNELS), atol=1e-2)


def test_buckets_that_only_one_store_has_are_read_from_it(tmp_path: Path) -> None:
    write_store(tmp_path / "a", buckets=("16x32x32",))
    write_store(tmp_path / "b", buckets=("16x32x32", "16x64x32"))
    dataset = LatentDataset.mix([tmp_path / "a", tmp_path / "b"], batch_size=4)
    assert dataset.buckets == ["16x32x32", "16x64x32"]
    assert {batch["bucket"] for batch in dataset} == set(dataset.buckets)


def test_a_rank_without_a_sample_gets_an_empty_batch_of_the_right_shape(store: Store) -> None:
    columns = ("motion", "content_image", "caption", "text", "clip_id")
    dataset = LatentDataset(
        store, columns, global_batch_size=8, rank=0, world_size=8, drop_last=False
    )
    sizes = [len(batch["caption"]) for batch in dataset]
    assert 0 in sizes
    batch = dataset.batch(0, sizes.index(0))
    assert batch["latents"].shape[0] == 0
    assert batch["latents"].ndim == 5
    assert batch["content_image"].shape[:2] == (0, 3)


def test_moving_ahead_to_a_device_keeps_what_is_no_tensor(store: Store) -> None:
    dataset = LatentDataset(store, ("motion", "caption"), batch_size=3)
    plain = [dataset.batch(0, k) for k in range(len(dataset))]
    moved = list(LatentLoader(dataset, device="cpu"))
    for ours, theirs in zip(plain, moved, strict=True):
        assert torch.equal(ours["latents"], theirs["latents"])
        assert ours["caption"] == theirs["caption"]
    meta = next(iter(LatentLoader(dataset, device="meta")))
    assert meta["latents"].device.type == "meta"
    assert meta["latents"].shape == dataset.batch(1, 0)["latents"].shape


def test_a_loader_brings_moments_to_the_device_and_draws_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is the CPU, on which the numbers are made as on a GPU."""
    write_store(tmp_path, videos=6, clips_per_video=4, columns=("motion", "content_latent"))
    columns = ("motion", "content_latent", "clip_id")
    moved: list[torch.Tensor] = []

    def stay(undrawn: Undrawn, device: torch.device) -> Undrawn:
        assert device.type == "meta"
        moved.append(undrawn.moments)
        return undrawn

    monkeypatch.setattr(Undrawn, "to", stay)
    several: list[dict[str, Any]] = [
        {},
        {"latents": "mean"},
        {"clips_per_sample": 2},
        {"normalize": "channel"},
    ]
    for options in several:
        dataset = LatentDataset(tmp_path, columns, batch_size=4, **options)
        drawn = [dataset.batch(0, k) for k in range(len(dataset))]
        moved.clear()
        with monkeypatch.context() as patch:
            patch.setattr(philox_module, "_words_by_numpy", philox_module._words_by_torch)
            found = list(LatentLoader(dataset, device="meta"))
        assert all(moments.dtype == torch.float16 for moments in moved)
        assert len(moved) == 2 * len(drawn) == 2 * len(found)
        for ours, theirs in zip(found, drawn, strict=True):
            assert ours["clip_id"] == theirs["clip_id"]
            for name in ("latents", "content_latent"):
                assert ours[name].shape == theirs[name].shape
                assert torch.allclose(ours[name], theirs[name], atol=1e-5)

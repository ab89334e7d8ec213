"""Whoever takes which shard, the store has the same bytes, and the end says what is left."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from reducio_latents.encode.engines.local import Request, run_ranks
from reducio_latents.encode.options import EncodeOptions
from reducio_latents.encode.pipeline import ShardDone
from tests.corpora import write_corpus
from tests.test_encode_flow import files_of

SETTINGS = {
    "model": "reducio-random:8",
    "resolution": 32,
    "shard_rows": 1,
    "batch_size": 2,
    "workers": 1,
    "rank_timeout_s": 20.0,
}


def command(corpus: Path, store: Path, **settings: object) -> list[str]:
    words = [sys.executable, "-m", "reducio_latents", "encode-corpus", str(corpus), str(store)]
    for name, value in {**SETTINGS, **settings}.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def start_rank(number: int, of: int, corpus: Path, store: Path) -> subprocess.Popen[bytes]:
    ranks = {"RANK": str(number), "WORLD_SIZE": str(of), "LOCAL_RANK": str(number)}
    return subprocess.Popen(
        command(corpus, store),
        env={**os.environ, **ranks, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process makes of the corpus."""
    store = tmp_path_factory.mktemp("one") / "store"
    subprocess.run(command(corpus, store), check=False, capture_output=True, timeout=120)
    return files_of(store)


def test_ranks_that_find_each_other_make_the_same_bytes(
    corpus: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    ranks = [start_rank(number, 3, corpus, store) for number in (2, 1, 0)]
    said = [rank.communicate(timeout=120)[0].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 3], said  # 1 of 6 videos is no video
    assert "rank 1 of 3: 1 clips encoded" in said[1]
    assert "5 found = 4 encoded" in said[2]
    assert files_of(store) == expected


def test_ranks_that_this_process_starts_make_the_same_bytes(
    corpus: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    options = EncodeOptions(**SETTINGS)  # type: ignore[arg-type]
    report = run_ranks(Request(str(corpus), str(tmp_path / "store"), options), 2)
    assert report.clips.encoded == 4
    assert report.shards_left == 0
    assert files_of(tmp_path / "store") == expected


def test_a_rank_that_dies_stops_no_other_and_its_shards_are_left(
    corpus: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    lead, other = (start_rank(number, 2, corpus, store) for number in (0, 1))
    orders = store / "runs"
    while not list(orders.glob("*/rank-00001.json")):  # it lives, and has not encoded yet
        time.sleep(0.02)
    other.kill()
    said = lead.communicate(timeout=120)[0].decode()
    other.communicate()
    assert lead.returncode == 1, said
    assert "2 shards are not done; run the same command again" in said
    assert "rank 1 has shown no sign of life" in said
    again = subprocess.run(command(corpus, store), check=False, capture_output=True, timeout=120)
    assert again.returncode == 3
    assert files_of(store) == expected


def test_ray_actors_make_the_same_bytes_though_one_is_killed(
    corpus: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = pytest.importorskip("ray")
    from reducio_latents.encode.engines import ray as engine

    take, killed = engine.Fleet._take, list[object]()

    def take_and_kill(fleet: engine.Fleet, reference: object) -> ShardDone | None:
        done = take(fleet, reference)
        if done is not None and not killed:
            killed.append(fleet._workers[0].actor)
            ray.kill(killed[0])
        return done

    monkeypatch.setattr(engine.Fleet, "_take", take_and_kill)
    options = EncodeOptions(**{**SETTINGS, "engine": "ray", "gpus": 2})  # type: ignore[arg-type]
    # Ray's sockets lie in its folder, and their paths may have 107 bytes.
    with TemporaryDirectory(prefix="ray", dir="/tmp") as short:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=short)
        try:
            report = engine.run_ray(Request(str(corpus), str(tmp_path / "store"), options))
        finally:
            ray.shutdown()
    assert killed
    assert report.clips.encoded == 4
    assert files_of(tmp_path / "store") == expected

"""Whoever takes which shard, the store has the same bytes, and the end says what is left."""

from __future__ import annotations

import logging
import multiprocessing
import threading
import time
import wave
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from reducio_latents import open_store
from reducio_latents.cli.progress import print_report
from reducio_latents.encode import EncodeReport, Tally, encode_corpus
from reducio_latents.encode.batches import MOST_BEGUN
from reducio_latents.encode.columns import ClipBatch, ColumnEncoder
from reducio_latents.encode.engines import local
from reducio_latents.encode.engines.local import run_rank, run_ranks
from reducio_latents.encode.engines.ranks import Rank
from reducio_latents.encode.engines.ray import actor_options, gpus_for
from reducio_latents.encode.job import Job, RunRequest, join, prepare
from reducio_latents.encode.options import EncodeOptions
from reducio_latents.encode.shards import ShardDone
from reducio_latents.video.processes import PRELOAD
from tests.corpora import write_corpus, write_video
from tests.test_encode_flow import files_of

SETTINGS: dict[str, Any] = {
    "model": "reducio-random:8",
    "resolution": 32,
    "shard_rows": 2,
    "batch_size": 2,
    "workers": 1,
    "rank_timeout_s": 200.0,
}
VIDEOS = Tally(found=20, encoded=14, skipped=2, failed=4)
CLIPS = Tally(found=16, encoded=15, skipped=1, failed=0)


def command(corpus: Path, store: Path, **settings: object) -> list[str]:
    words = ["-m", "reducio_latents", "encode-corpus", str(corpus), str(store)]
    for name, value in {**SETTINGS, **settings}.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def request(corpus: Path, store: Path, **settings: Any) -> RunRequest:
    return RunRequest(str(corpus), str(store), EncodeOptions(**{**SETTINGS, **settings}))


def taken_by(rank: int, store: Path) -> int:
    """Return how many shards a rank has taken up."""
    files = (store / "runs" / "run" / "shards").glob("*")
    return sum(path.read_bytes() == b"%d" % rank for path in files)


def until_taken(rank: int, store: Path) -> Callable[[], None]:
    """Return what waits until a rank has taken a shard up."""

    def wait() -> None:
        while not taken_by(rank, store):
            time.sleep(0.02)

    return wait


def nothing() -> None:
    """Do not wait."""


class Slow:
    """An encoder that waits before each batch."""

    def __init__(self, encoder: ColumnEncoder, wait: Callable[[], object]) -> None:
        self._encoder, self._wait = encoder, wait

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def launch(self, batch: ClipBatch) -> Any:
        self._wait()
        return self._encoder.launch(batch)


@contextmanager
def slowed(lead: Callable[[], object], other: Callable[[], object]) -> Iterator[None]:
    """Have the encoders of rank 0, and those of others, wait before each batch."""

    def slowly(make: Callable[..., Job], wait: Callable[[], object]) -> Callable[..., Job]:
        def made(*args: Any) -> Job:
            job = make(*args)
            slow: Any = [Slow(e, wait) for e in job.encoders]
            return replace(job, encoders=slow)

        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "prepare", slowly(prepare, lead))
        patch.setattr(local, "join", slowly(join, other))
        yield


def hang_as_rank(asked: RunRequest, rank: Rank) -> None:
    with slowed(*[lambda: time.sleep(1e6)] * 2):
        run_rank(asked, rank)


def start_hanging(asked: RunRequest, rank: Rank) -> threading.Thread:
    """Start a rank whose encoders hang, and have it killed when it has taken a shard up.

    It shares the tests' fork server, and is there at once.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=hang_as_rank, args=(asked, rank))
    process.start()

    def wait_and_kill() -> None:
        while not taken_by(rank.number, Path(asked.store)) and process.is_alive():
            time.sleep(0.01)
        process.kill()

    thread = threading.Thread(target=wait_and_kill)
    thread.start()
    return thread


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty videos, four of them broken: a text, nothing at all, half a video, sound alone."""
    folder = write_corpus(tmp_path_factory.mktemp("corpus"))
    for number in range(11):
        write_video(folder / "more" / f"{number}.mp4", 1.1, seed=10 + number)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "half.mp4").write_bytes((folder / "more" / "0.mp4").read_bytes()[:-700])
    with wave.open(str(folder / "sound.mp4"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(8000))
    return folder


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process makes of the corpus."""
    store = tmp_path_factory.mktemp("one") / "store"
    check(encode_corpus(corpus, store, **SETTINGS))
    return files_of(store)


def check(report: EncodeReport) -> None:
    """Prove that a run has accounted for everything, to the last video."""
    assert report.videos == VIDEOS
    assert report.clips == CLIPS
    assert report.exit_code == 3  # a fifth of the videos is broken
    assert sum(report.failed.values()) == 4


def test_ranks_that_find_each_other_make_the_same_bytes(
    corpus: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    asked = request(corpus, tmp_path / "store")
    with ThreadPoolExecutor(3) as ranks:
        *others, lead = ranks.map(lambda i: run_rank(asked, Rank(i, 3)), (2, 1, 0))
    check(lead)
    assert [report.exit_code for report in others] == [0, 0]
    assert [report.share for report in others] == ["rank 2 of 3", "rank 1 of 3"]
    assert all(report.clips.found == report.clips.encoded for report in others)
    assert files_of(tmp_path / "store") == expected


def test_no_rank_waits_while_shards_are_left(corpus: Path, tmp_path: Path) -> None:
    """One rank's encoder brings nothing before the other one has made all that can be made."""
    store, shards = tmp_path / "store", 15
    asked = request(corpus, store, shard_rows=1, batch_size=1)

    def wait_for_lead() -> None:
        while len([*store.glob("commits/*/motion/*")]) < shards - taken_by(1, store):
            time.sleep(0.02)

    with slowed(until_taken(1, store), wait_for_lead), ThreadPoolExecutor(2) as ranks:
        slow_one, lead = ranks.map(lambda i: run_rank(asked, Rank(i, 2)), (1, 0))
    check(lead)
    assert 0 < slow_one.clips.encoded <= MOST_BEGUN


def test_ranks_that_this_process_starts_make_the_same_bytes(
    corpus: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    check(run_ranks(request(corpus, tmp_path / "store"), 2))
    assert files_of(tmp_path / "store") == expected


def test_a_rank_that_dies_stops_no_other_and_its_shards_are_left(
    corpus: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = tmp_path / "store"
    asked = request(corpus, store, rank_timeout_s=4.0)
    killing = start_hanging(asked, Rank(1, 2))
    with caplog.at_level(logging.WARNING), slowed(until_taken(1, store), nothing):
        report = run_rank(asked, Rank(0, 2))
    killing.join()
    assert "rank 1 has shown no sign of life" in caplog.text
    assert report.exit_code == 1
    left = report.skipped["clips of shards that are left"]
    assert 1 <= report.shards_left <= MOST_BEGUN
    assert report.clips == Tally(found=16, encoded=15 - left, skipped=1 + left, failed=0)
    assert "clips stored before" not in report.skipped
    assert open_store(store).meta.counts["clips"]["encoded"] == 15 - left
    print_report(report, str(store))
    said = f"{report.shards_left} shards are not done; run the same command again"
    assert said in capsys.readouterr().err
    check_resumed(corpus, store, expected, encoded=left)


def test_without_rank_0_the_others_do_what_it_has_not_begun_and_say_what_is_left(
    corpus: Path, expected: dict[str, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = tmp_path / "store"
    asked = request(corpus, store, rank_timeout_s=4.0)
    killing = start_hanging(asked, Rank(0, 2))
    with caplog.at_level(logging.WARNING), slowed(nothing, until_taken(0, store)):
        report = run_rank(
            replace(asked, options=replace(asked.options, rank_timeout_s=8.0)), Rank(1, 2)
        )
    killing.join()
    assert "rank 0 has shown no sign of life" in caplog.text
    assert report.clips.encoded == report.clips.found
    assert report.shards_left == taken_by(0, store)
    assert report.exit_code == 1
    check_resumed(corpus, store, expected, encoded=15 - report.clips.encoded)


def check_resumed(corpus: Path, store: Path, expected: dict[str, bytes], encoded: int) -> None:
    again = encode_corpus(corpus, store, **SETTINGS)
    assert again.clips.encoded == encoded
    assert again.exit_code == 3
    assert files_of(store) == expected


@pytest.mark.parametrize(
    ("device", "there", "runs_on", "asks_for"),
    [("auto", 0, "auto", 0), ("auto", 2, "cuda", 1), ("cuda", 0, "cuda", 1), ("cpu", 2, "cpu", 0)],
)
def test_an_actor_that_needs_a_gpu_asks_ray_for_one_though_no_node_has_it_yet(
    device: str, there: int, runs_on: str, asks_for: int
) -> None:
    actor = actor_options(EncodeOptions(device=device, engine="ray", gpus=8), there)
    assert (actor.device, gpus_for(actor)) == (runs_on, asks_for)
    assert (actor.engine, actor.gpus) == ("local", 1)


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
    # No Python process before an actor needs one.
    monkeypatch.setenv("RAY_prestart_worker_first_driver", "0")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's sockets lie in its folder, and their paths may have 107 bytes.
    with TemporaryDirectory(prefix="ray", dir="/tmp") as short:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=short)
        try:
            report = engine.run_ray(request(corpus, tmp_path / "store", engine="ray", gpus=2))
        finally:
            ray.shutdown()
    assert killed
    check(report)
    assert files_of(tmp_path / "store") == expected

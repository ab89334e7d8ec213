"""Whoever takes which shard, the store has the same bytes, and the end says what is left."""

from __future__ import annotations

import logging
import multiprocessing
import sys
import threading
import time
import wave
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from reducio_latents import open_store
from reducio_latents.cli.progress import print_report
from reducio_latents.encode import EncodeReport, Tally, encode_corpus
from reducio_latents.encode.engines.local import RunRequest, run_rank, run_ranks
from reducio_latents.encode.engines.ranks import Rank
from reducio_latents.encode.engines.ray import actor_options, gpus_for
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
    words = [sys.executable, "-m", "reducio_latents", "encode-corpus", str(corpus), str(store)]
    for name, value in {**SETTINGS, **settings}.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def request(corpus: Path, store: Path, **settings: Any) -> RunRequest:
    return RunRequest(str(corpus), str(store), EncodeOptions(**{**SETTINGS, **settings}))


def be_rank(asked: RunRequest, rank: Rank) -> None:
    run_rank(asked, rank)


def start_rank(asked: RunRequest, rank: Rank) -> BaseProcess:
    """Start a rank that can be killed; it shares the tests' fork server, and is there at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=be_rank, args=(asked, rank))
    process.start()
    return process


def kill_when(is_time: Callable[[], bool], process: BaseProcess) -> threading.Thread:
    def wait_and_kill() -> None:
        while not is_time() and process.is_alive():
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
    assert [report.clips.encoded for report in others] == [4, 5]  # of 8 shards, the last has 1
    assert files_of(tmp_path / "store") == expected


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
    other = start_rank(asked, Rank(1, 2))
    sign = store / "runs" / "run" / "rank-00001.json"
    killing = kill_when(sign.exists, other)  # it lives, and has not encoded yet
    with caplog.at_level(logging.WARNING):
        report = run_rank(asked, Rank(0, 2))
    killing.join()
    assert "rank 1 has shown no sign of life" in caplog.text
    assert report.exit_code == 1
    assert report.clips == Tally(found=16, encoded=8, skipped=8, failed=0)
    assert report.skipped["clips of shards that are left"] == 7
    assert "clips stored before" not in report.skipped
    assert open_store(store).meta.counts["clips"]["encoded"] == 8
    print_report(report, str(store))
    assert "4 shards are not done; run the same command again" in capsys.readouterr().err
    check_resumed(corpus, store, expected, encoded=7)


def test_without_rank_0_the_others_do_their_share_and_say_what_is_left(
    corpus: Path, expected: dict[str, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = tmp_path / "store"
    asked = request(corpus, store, rank_timeout_s=4.0)
    lead = start_rank(asked, Rank(0, 2))
    order = store / "runs" / "run" / "order.json"
    killing = kill_when(order.exists, lead)
    with caplog.at_level(logging.WARNING):
        report = run_rank(
            replace(asked, options=replace(asked.options, rank_timeout_s=8.0)), Rank(1, 2)
        )
    killing.join()
    assert "rank 0 has shown no sign of life" in caplog.text
    assert report.clips.encoded == 7
    assert report.shards_left == 4
    assert report.exit_code == 1
    check_resumed(corpus, store, expected, encoded=8)


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

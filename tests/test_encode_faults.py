"""A run that is stopped, starved or killed loses nothing; a video that kills it is set aside."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from reducio_latents import open_store
from reducio_latents.encode.attempts import CAREFUL_ATTEMPTS, PLAIN_ATTEMPTS, Attempts, Journal
from reducio_latents.encode.engines.local import run_rank
from reducio_latents.encode.engines.ranks import Rank
from reducio_latents.encode.gpu import BatchEncoder
from reducio_latents.encode.progress import Progress
from reducio_latents.encode.report import EncodeReport
from reducio_latents.encode.stop import stop_on_signals
from reducio_latents.errors import StoreError
from reducio_latents.files import LocalFiles, local, open_files
from reducio_latents.files.protocol import Buffer
from reducio_latents.store.commit import ShardKey
from reducio_latents.train.progress import stop_signal
from reducio_latents.upkeep.verify import verify
from tests.corpora import write_corpus, write_video
from tests.forked import Python
from tests.object_storage import FaultyProxy, s3, s3_server  # noqa: F401
from tests.test_encode_engines import SETTINGS, command, request
from tests.test_encode_flow import encode, files_of

KEY = ShardKey("16x32x32", 0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    store = tmp_path_factory.mktemp("one") / "store"
    encode(corpus, store)
    return files_of(store)


class DeathError(Exception):
    """Stands in for the end of the process: nothing is tidied up after it."""


def dying_at(poison: float, deaths: list[int]) -> Callable[[BatchEncoder, Tensor], object]:
    """Return an encoder's `launch` that ends the process at clips whose mean pixel is `poison`."""
    launch = BatchEncoder.launch

    def fatal(encoder: BatchEncoder, frames: Tensor) -> object:
        means = frames.double().mean(dim=(1, 2, 3, 4))
        if any(abs(float(mean) - poison) < 1e-9 for mean in means):
            deaths.append(len(frames))
            raise DeathError
        return launch(encoder, frames)

    return fatal


def run_until_it_ends(corpus: Path, store: Path) -> EncodeReport:
    """Start the same command again and again, as a cluster does."""
    for _ in range(20):
        try:
            return encode(corpus, store)
        except DeathError:
            continue
    raise AssertionError("the run never came to an end")


def mean_of_clip(corpus: Path, name: str) -> float:
    """Return the mean pixel of a video's first clip, as it is encoded at 32 px."""
    from reducio_latents.core.geometry import Bucket
    from reducio_latents.files.source import VideoSource
    from reducio_latents.video import get_backend
    from reducio_latents.video.planes import fit_planes

    fit = partial(fit_planes, bucket=Bucket(16, 32, 32), mode="bicubic")
    read = get_backend("pyav", as_planes=True).read_clips(
        VideoSource(str(corpus / name)), [0.0], frames=16, rate_fps=16.0, transform=fit
    )
    clip = next(iter(read))
    assert not isinstance(clip, Exception)
    return float(np.stack(clip.frames).mean())


def test_a_video_that_always_ends_the_process_is_quarantined_and_its_neighbours_are_not(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaths: list[int] = []
    poison = mean_of_clip(corpus, "b.mp4")
    monkeypatch.setattr(BatchEncoder, "launch", dying_at(poison, deaths))
    report = run_until_it_ends(corpus, tmp_path / "store")
    # As usual, then its batch of two videos alone, then by itself.
    expected = [2] * (PLAIN_ATTEMPTS + CAREFUL_ATTEMPTS) + [1] * CAREFUL_ATTEMPTS
    assert deaths == expected
    assert report.clips.failed == 1
    assert report.clips.encoded + report.clips.skipped == 4
    assert any("quarantined" in reason for reason in report.failed)
    store = open_store(tmp_path / "store")
    failed = [e for e in store.index.entries.values() if e.failed and e.column == "motion"]
    assert len(failed) == 1
    assert verify(store).ok
    assert not list((tmp_path / "store").glob("attempts/**/*.json"))


def test_shards_that_were_only_unlucky_come_out_the_same(
    corpus: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    deaths: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(BatchEncoder, "launch", dying_at(mean_of_clip(corpus, "a.mp4"), deaths))
        for _ in range(PLAIN_ATTEMPTS + 1):
            with pytest.raises(DeathError):
                encode(corpus, store)
    assert Journal(LocalFiles(store)).suspects([KEY])
    encode(corpus, store)
    assert files_of(store) == expected


def test_an_attempt_counts_when_it_begins_and_is_handed_back_when_it_ends_cleanly(
    tmp_path: Path,
) -> None:
    journal = Journal(LocalFiles(tmp_path))
    for count in (1, 2):
        assert journal.take_up(KEY).taken == count
    journal.hand_back(KEY)
    assert journal.read(KEY) == Attempts(taken=1)
    journal.hand_back(KEY)
    assert journal.read(KEY) == Attempts()
    journal.take_up(KEY)
    journal.sweep({})
    assert list(LocalFiles(tmp_path).list("")) == []


def test_a_full_disk_in_the_middle_of_a_file_is_one_clear_error_and_costs_one_shard(
    corpus: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    write, seen = local._write_durably, list[Path]()
    columns = {name.split("/")[2] for name in expected if name.startswith("commits/")}

    def full(path: Path, parts: Sequence[Buffer]) -> None:
        seen.extend([path] if len(parts) > 1 else [])  # rows, a file for each column of a shard
        if len(seen) > len(columns):
            path.write_bytes(bytes(parts[0])[:7])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, parts)

    with monkeypatch.context() as patch:
        patch.setattr(local, "_write_durably", full)
        with pytest.raises(StoreError, match="the disk is full"):
            encode(corpus, store)
    assert len(seen) > len(columns)
    assert not list((store / ".partial").glob("*"))
    assert {key.shard for _, key in open_store(store).index.entries} == {0}
    encode(corpus, store)
    assert files_of(store) == expected


def test_two_ranks_make_the_same_store_on_s3_though_the_server_fails_and_dawdles(
    corpus: Path,
    expected: dict[str, bytes],
    s3: FaultyProxy,  # noqa: F811
) -> None:
    s3.trouble([None, "500", None, 0.2, "503", None, None, "reset", None, 0.1, None, None])
    url = "s3://latents/faults"
    asked = request(corpus, url, shard_rows=2)  # type: ignore[arg-type]
    with ThreadPoolExecutor(2) as ranks:
        lead, other = ranks.map(lambda i: run_rank(asked, Rank(i, 2)), (0, 1))
    assert lead.clips.encoded == 4
    assert lead.exit_code == 3
    assert other.exit_code == 0
    s3.fail([])
    files = open_files(url)
    found = set(files.list(""))
    assert found == set(expected)
    for name in sorted(found):
        if not name.startswith("commits/"):
            assert files.read(name) == expected[name], name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_shard_in_hand_and_says_what_is_left(
    number: signal.Signals, tmp_path: Path
) -> None:
    corpus, store = tmp_path / "corpus", tmp_path / "store"
    write_video(corpus / "long.mp4", 12.0, seed=5)
    process = Python(command(corpus, store, shard_rows=1), start_new_session=True)
    while not list(store.glob("commits/*/*/000000.json")):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, number)  # all of them, as a machine that is taken away does
    out, err = process.communicate()
    assert process.returncode == 128 + number, err
    assert "stopping" in err
    assert "shards are not done; run the same command again" in err
    assert "0 failed" in out
    assert not processes_of(process.pid)
    assert not list(store.glob("attempts/**/*.json"))
    opened = open_store(store)
    assert all(not entry.failed for entry in opened.index.entries.values())
    shards = {key for _, key in opened.index.entries}
    assert 0 < len(shards) < len(opened.plan.shards())
    assert encode(corpus, store, **{**SETTINGS, "shard_rows": 1}).exit_code == 0
    assert verify(open_store(store)).ok


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_videos_are_probed_ends_the_run_at_once_and_loses_nothing(
    number: signal.Signals, corpus: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    class Signalling(Progress):
        def probed(self, done: int, total: int) -> None:
            if done == 2:
                os.kill(os.getpid(), number)

    store = tmp_path / "store"
    with stop_on_signals() as stop:
        report = encode(corpus, store, progress=Signalling(), stop=stop)
    assert report.exit_code == 128 + number
    assert report.clips.found == 0
    assert not list(store.glob("plan/part-*"))
    assert encode(corpus, store).shards_left == 0
    assert files_of(store) == expected


def test_a_terminal_that_closes_asks_for_an_end_once_and_not_of_who_does_not_listen() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with stop_on_signals() as stop:
            for _ in range(2):  # the shell says so, and then the kernel
                os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signal == signal.SIGHUP
        with stop_signal() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert asked.is_set()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup has it
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_rows_that_are_gone_or_cut_off_are_made_again(
    corpus: Path, expected: dict[str, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = tmp_path / "store"
    encode(corpus, store)
    gone, short = (path for path in store.glob("*/motion/c/*/0/0/0/0") if path.is_file())
    gone.unlink()
    short.write_bytes(short.read_bytes()[:-1])
    report = encode(corpus, store)
    assert "motion: the files of 2 shards are gone" in caplog.text
    assert report.clips.encoded
    assert files_of(store) == expected


def processes_of(group: int) -> list[str]:
    """Return the names of the live processes of a group, given a moment to end."""
    for _ in range(600):
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                name, rest = stat.read_text().rsplit(")", 1)
            except OSError:
                continue
            state, _, of = rest.split()[:3]
            if int(of) == group and state != "Z":
                found.append(name)
        if not found:
            return []
        time.sleep(0.1)
    return found


def test_what_disturbs_a_run_at_random_moments_changes_no_byte() -> None:
    tool = Path(__file__).parents[1] / "tools" / "soak.py"
    process = Python([tool, "--rounds", "1", "--trials", "run,worker,rank,full"])
    printed, errors = process.communicate()
    assert process.returncode == 0, printed + errors
    assert "| failures | 0 |" in printed
    assert "| kills |" in printed

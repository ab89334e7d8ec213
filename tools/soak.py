"""Disturb stores for an hour, and prove that each ends as an undisturbed one.

    python tools/soak.py [--minutes 60] [--seed 1] [--rounds N] [--trials NAMES] [--out FILE]
    python tools/soak.py --seed 1 --only 17

A round draws a small corpus, broken videos among it, and some trials of a store of it. Then it runs
the plain command to its end and compares every byte with an undisturbed store (timings in commits
are the only difference allowed), proves the store by `verify`, flips bits for `verify` to find, and
reads all rows. All is drawn by (seed, round): `--only` repeats a round that failed, as far as the
clock does.

Trials: `run`, `main`, `worker`, `rank` and `actor` kill the process group, the main process alone,
one decode worker, one of two ranks, one of two Ray actors; `same` has two runs of one corpus at
once, `overlap` two of corpora that overlap, `columns` an add-column beside a run, `convert` two
conversions into one place, `reader` a reader beside a run; `full` and `read_only` are what becomes
of the disk; `replaced` gives a video other bytes of the same size; `s3` writes to a server that
fails and dawdles, reads through a cache, and flips bits in that.

Every run is forked from this process, which has imported what it needs: so a kill meets work, not
imports. It needs Linux; a small disk is mounted if root runs it, else imitated by limits.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import util
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # this checkout, installed or not

from broken_corpus import BROKEN, FAULTY_DECODER, contents, differences  # noqa: E402

from reducio_latents import LatentDataset, open_store  # noqa: E402
from reducio_latents.cli import main as command_line  # noqa: E402
from reducio_latents.encode.attempts import CAREFUL_ATTEMPTS, PLAIN_ATTEMPTS  # noqa: E402
from reducio_latents.errors import LatentsError  # noqa: E402
from reducio_latents.files import open_files  # noqa: E402
from reducio_latents.files.cache import BLOB  # noqa: E402
from tests.corpora import write_video  # noqa: E402
from tests.forked import fork_for  # noqa: E402
from tests.object_storage import BUCKET, faulty_proxy, request, start_s3  # noqa: E402

FINISHED = (0, 3)
TINY = ["--model", "reducio-random:8", "--resolution", "32", "--shard-rows", "2", "--workers", "2"]
TINY += ["--clip-timeout-s", "30"]
FRAMES = ["--columns", "motion,content_image"]
BY_ONE = ["--batch-size", "1"]
"""Rows do not depend, by a rounding, on which clips share their shard."""
FORKED = (
    "reducio_latents.autoencoders", "reducio_latents.video.reading", "moto.server",
    "reducio_latents.encode.engines.local", "reducio_latents.corpus.probe",
    "reducio_latents.video.pyav", "reducio_latents.upkeep.convert",
)  # fmt: skip
MOST_DEATHS = PLAIN_ATTEMPTS + CAREFUL_ATTEMPTS - 1
"""Of one store: one more at the same video, and it is set aside, as it should be."""
LONGEST_S = 600.0
"""A run that takes longer has hung."""
MOST_FAILURES = 5
SLOW_KINDS = ("hangs", "eats")
DISK_BYTES = 64 << 20
Environment = Mapping[str, str]
NONE: Environment = {}
context = multiprocessing.get_context("fork")


class WrongError(Exception):
    """A promise that was not kept."""


class Run:
    """One forked process and all that it starts: a process group of its own."""

    def __init__(
        self, work: Callable[[], object], environment: Environment = NONE, most_bytes: int = 0
    ) -> None:
        self._said = tempfile.TemporaryFile()
        arguments = (work, self._said.fileno(), most_bytes, environment)
        self._process = context.Process(target=_be_started, args=arguments)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.is_alive()

    @property
    def code(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout_s: float = LONGEST_S) -> bool:
        """Return whether it has ended by itself within this time."""
        self._process.join(timeout_s)
        return not self.is_running

    def end(self) -> str:
        """Wait for its end, good or refused in a line, and return what it said."""
        if not self.wait():
            self.kill()
            raise WrongError(f"a run did not end:\n{self.said()}")
        said = self.said()
        if self.code not in range(4) or "Traceback" in said:
            raise WrongError(f"a run ended with {self.code}:\n{said}")
        return said

    def finish(self) -> str:
        """Wait for its good end, and return what it said."""
        said = self.end()
        if self.code not in FINISHED:
            raise WrongError(f"a run ended with {self.code}:\n{said}")
        return said

    def kill(self, *, group: bool = True, by: int = signal.SIGKILL) -> None:
        with suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, by)
        if not self.wait():
            os.killpg(self.pid, signal.SIGKILL)
            raise WrongError(f"a run outlived signal {by}:\n{self.said()}")

    def said(self) -> str:
        self._said.seek(0)
        return self._said.read().decode(errors="replace")


def _be_started(
    work: Callable[[], object], said: int, most_bytes: int, environment: Environment
) -> None:
    """Be a process that was started by a shell."""
    os.setsid()
    os.nice(5)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.environ.update(environment)
    util.spawnv_passfds = fork_for  # type: ignore[assignment]
    if most_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    work()


def run(*words: object, environment: Environment = NONE, most_bytes: int = 0) -> Run:
    """Start a command of reducio-latents."""
    said = [str(word) for word in words]
    start = lambda: command_line(said, prog_name="reducio-latents")  # noqa: E731
    return Run(start, environment, most_bytes)


def result_of(work: Callable[[], Any], environment: Environment = NONE) -> Any:
    """Return what `work` returns in a process of its own."""
    with tempfile.NamedTemporaryFile("r+") as file:
        Run(lambda: Path(file.name).write_text(json.dumps(work())), environment).finish()
        return json.load(file)


def rows_of(store: str | Path) -> dict[str, str]:
    """Return a digest of the stored latents of every clip of a store, read as training does."""
    dataset = LatentDataset(
        store, ("motion", "clip_id"), batch_size=2, drop_last=False, latents="moments"
    )
    return {
        name: hashlib.sha256(moments.numpy().tobytes()).hexdigest()
        for batch in dataset
        for name, moments in zip(batch["clip_id"], batch["motion"], strict=True)
    }


def processes() -> dict[int, tuple[int, int]]:
    """Return every living process of this machine, its parent and its group."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent, group = stat.read_text().rsplit(")", 1)[1].split()[:3]
            if state != "Z":
                found[int(stat.parent.name)] = (int(parent), int(group))
    return found


def decode_workers(main: int) -> list[int]:
    """Return the processes whose parent's parent is the main one: those of its fork server."""
    found = processes()
    return [pid for pid, (parent, _) in found.items() if found.get(parent, (0,))[0] == main]


def ray_actors(main: int) -> list[int]:
    """Return the actors of the Ray that the main process has started."""
    alive, found = processes(), []
    for pid, (parent, _) in alive.items():
        while parent not in (main, 0):
            parent = alive.get(parent, (0,))[0]
        with suppress(OSError):
            if parent and Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::ShardActor"):
                found.append(pid)
    return found


@contextmanager
def s3_server(seed: str) -> Iterator[dict[str, str]]:
    """Serve a bucket that fails and dawdles, in a process of its own; yield what names it."""
    ours, theirs = context.Pipe()
    parent, rng = os.getpid(), random.Random(seed)
    faults = [*[None] * 30, "500", "503", "reset", "cut", 0.1, 0.3]

    def serve() -> None:
        _, address = start_s3()
        request(address, "PUT", f"/{BUCKET}")
        with faulty_proxy(address) as proxy:
            proxy.fault = lambda method, path: rng.choice(faults)
            theirs.send(proxy.address)
            while os.getppid() == parent:
                time.sleep(0.5)
        os._exit(0)

    server = Run(serve)
    try:
        if not ours.poll(LONGEST_S):
            raise WrongError(f"the S3 server does not start:\n{server.said()}")
        yield {
            "AWS_ACCESS_KEY_ID": "soak", "AWS_SECRET_ACCESS_KEY": "soak", "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{ours.recv()}",
        }  # fmt: skip
    finally:
        server.kill()


class Round:
    """A corpus, its undisturbed store, and one that is disturbed."""

    def __init__(self, seed: str, folder: Path, figures: Counter[str]) -> None:
        self.rng, self.folder, self.figures = random.Random(seed), folder, figures
        self.seed, self.deaths = seed, 0
        self.disk = folder / "disk"
        self.disk.mkdir(parents=True)
        self.has_disk = self._mount("-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs")
        self.corpus, self.store = self._draw_corpus(), self.disk / "store"
        self.whole = folder / "whole"
        begun = time.monotonic()
        run("encode-corpus", self.corpus, self.whole, *TINY).finish()
        self.took_s = time.monotonic() - begun
        self.rows = result_of(lambda: rows_of(self.whole))

    def _mount(self, *words: str) -> bool:
        done = subprocess.run(["mount", *words, self.disk], check=False, capture_output=True)
        return done.returncode == 0

    def _draw_corpus(self) -> Path:
        """Write videos of one to three clips, a copy of one, and broken ones."""
        folder, rng = self.folder / "corpus", self.rng
        for number in range(rng.randint(3, 5)):
            seconds = rng.choice([1.1, 2.1, 3.1])
            video = write_video(folder / f"{number}.mp4", seconds, seed=rng.randrange(1 << 30))
            video.with_suffix(".txt").write_text(f"caption {rng.random()}")
        shutil.copy(folder / "0.mp4", folder / "copy.mp4")
        quick = [kind for kind in BROKEN if kind not in SLOW_KINDS]
        for number in range(rng.randint(0, 2)):
            kind = rng.choice(SLOW_KINDS if rng.random() < 0.05 else quick)
            BROKEN[kind](folder / f"{number}_{kind}.mp4", rng.randrange(1000))
            self.figures[f"broken videos: {kind}"] += 1
        self.figures["videos"] += len(list(folder.glob("*.mp4")))
        return folder

    def moment(self, most: float = 1.0) -> float:
        return self.rng.uniform(0.05, most) * self.took_s

    def encode(
        self,
        *more: object,
        corpus: Path | None = None,
        store: Path | None = None,
        most_bytes: int = 0,
        environment: Environment = NONE,
    ) -> Run:
        words = (corpus or self.corpus, store or self.store, *TINY, *more)
        return run("encode-corpus", *words, environment=environment, most_bytes=most_bytes)

    def prove(self, trials: list[str]) -> None:
        """Apply trials, run the plain command to its end, and compare everything."""
        for trial in trials:
            self.figures[f"trials: {trial}"] += 1
            TRIALS[trial](self)
        self.encode().finish()
        self.compare(self.store, self.whole)
        self.prove_rows(self.rows)
        for _ in range(2):
            self.flip(self.store)

    def compare(self, store: Path, whole: Path) -> None:
        if wrong := differences(contents(store), contents(whole)):
            raise WrongError(f"{store}: {len(wrong)} files differ: {', '.join(wrong[:5])}")

    def prove_rows(self, expected: dict[str, str], store: Path | None = None) -> None:
        store = store or self.store
        run("verify", store).finish()
        found = result_of(lambda: rows_of(store))
        self.figures["rows read"] += len(found)
        if wrong := [name for name, row in expected.items() if found.get(name) != row]:
            raise WrongError(f"{store}: clips are lost or not their own: {', '.join(wrong)}")

    def flip(self, store: Path) -> None:
        """Flip a bit, which verify must name, and flip it back."""
        path = self.rng.choice(files_in(store))
        data = path.read_bytes()
        flip_bit(path, self.rng)
        self.figures["bits flipped: in the store"] += 1
        name = path.relative_to(store).as_posix()
        names = [name]
        if name.startswith("commits/"):
            _, bucket, column, shard = name.removesuffix(".json").split("/")
            names.append(f"{bucket}/{shard} {column}")
        if name.startswith("plan/sha256-"):  # no telling a bad sum from a bad file
            names += [p.relative_to(store).as_posix() for p in files_in(store / "plan")]
        verify = run("verify", store)
        said = verify.end()
        if not verify.code or not any(name in said for name in names):
            raise WrongError(f"verify is silent about a flipped bit in {name}:\n{said}")
        self.figures["bits found: by verify"] += 1
        path.write_bytes(data)

    def kill(self, victim: str) -> None:
        """Kill the process group of a run, or its main process, once or several times."""
        times = self.rng.randint(1, 2)
        while times and self.deaths < MOST_DEATHS:
            started = self.encode()
            if started.wait(self.moment(1.1)):
                return
            self.end_by_signal(started, victim, group=victim == "run")
            times -= 1

    def end_by_signal(self, started: Run, victim: str, *, group: bool = True) -> None:
        """Kill a run; what it started must end as well."""
        by = self.rng.choice([signal.SIGKILL, signal.SIGTERM])
        started.kill(group=group, by=by)
        self.deaths += 1
        self.figures[f"kills: {victim} ({by.name})"] += 1
        limit = time.monotonic() + 60
        while left := [pid for pid, (_, of) in processes().items() if of == started.pid]:
            if time.monotonic() > limit:
                os.killpg(started.pid, signal.SIGKILL)
                raise WrongError(f"{len(left)} processes outlived a killed {victim}")
            time.sleep(0.05)

    def kill_worker(
        self, find: Callable[[int], list[int]], *more: str, environment: Environment = NONE
    ) -> None:
        """Kill one process that `find` names of a run, which must then end well."""
        by = self.rng.choice([signal.SIGKILL, signal.SIGTERM])
        started = self.encode(*more, environment=environment)
        started.wait(self.moment())
        while started.is_running:
            with suppress(ProcessLookupError):
                if victims := find(started.pid):
                    os.kill(self.rng.choice(victims), by)
                    self.figures[f"kills: {find.__name__[:-1]} ({by.name})"] += 1
                    break
            time.sleep(0.005)
        started.finish()

    def kill_rank(self) -> None:
        """Run two ranks and kill one of them, the other of which must end."""
        if self.deaths < MOST_DEATHS:
            more = ("--rank-timeout-s", "3")
            ranks = [
                self.encode(*more, environment={"RANK": str(i), "WORLD_SIZE": "2"})
                for i in range(2)
            ]
            time.sleep(self.moment())
            victim = ranks.pop(self.rng.randrange(2))
            if victim.is_running:
                self.end_by_signal(victim, "rank", group=False)
            ranks[0].end()

    def kill_actor(self) -> None:
        (self.folder / "sitecustomize.py").write_text(FAULTY_DECODER)  # actors are not forked
        path = os.pathsep.join(filter(None, [str(self.folder), os.environ.get("PYTHONPATH")]))
        environment = {"PYTHONPATH": path, "RAY_TMPDIR": str(self.folder)}
        self.kill_worker(ray_actors, "--engine", "ray", "--gpus", "2", environment=environment)

    def race(self, *starts: Callable[[], Run]) -> None:
        """Start runs at almost the same moment; kill one of them, perhaps."""
        runs = []
        for start in starts:
            runs.append(start())
            time.sleep(self.rng.choice([0.0, self.moment(0.3)]))
        if self.deaths < MOST_DEATHS and self.rng.random() < 0.3:
            victim = runs.pop(self.rng.randrange(len(runs)))
            if not victim.wait(self.moment()):
                self.end_by_signal(victim, "racer")
        for one in runs:
            said = one.end()
            if one.code not in FINISHED:
                self.figures["races: one was refused"] += 1
                print(f"  refused: {said.strip().splitlines()[-1]}", flush=True)

    def race_same(self) -> None:
        self.race(self.encode, self.encode)

    def alone(self, corpus: Path) -> dict[str, str]:
        """Return the rows of a corpus in a store of its own."""
        store = self.folder / f"{corpus.name}.alone"
        self.encode(*BY_ONE, corpus=corpus, store=store).finish()
        rows: dict[str, str] = result_of(lambda: rows_of(store))
        return rows

    def race_overlap(self) -> None:
        """Race two corpora: every clip of both must be there, and its own."""
        other, store = self.folder / "other", self.disk / "overlap"
        for name in self.rng.sample(
            sorted({p.name for p in self.corpus.iterdir()} - {"copy.mp4"}), 4
        ):
            other.mkdir(exist_ok=True)
            shutil.copy2(self.corpus / name, other / name)
        for number in range(self.rng.randint(1, 3)):
            write_video(other / f"other{number}.mp4", 2.1, seed=self.rng.randrange(1 << 30))
        expected = {**self.alone(self.corpus), **self.alone(other)}

        def ours() -> Run:
            return self.encode(*BY_ONE, store=store)

        def theirs() -> Run:
            return self.encode(*BY_ONE, corpus=other, store=store)

        self.race(*self.rng.sample([ours, theirs], 2))
        ours().end()  # which leaves what a killed run over the other corpus has not done
        for again in (theirs, ours):
            again().finish()
        self.prove_rows(expected, store)

    def race_columns(self) -> None:
        """Race add-column and the run whose store it adds to."""
        whole, store = self.folder / "columns", self.disk / "columns"

        def encode(where: Path = store) -> Run:
            return self.encode(*FRAMES, store=where)

        def add(where: Path = store) -> Run:
            until = time.monotonic() + LONGEST_S
            while not (where / "zarr.json").exists() and time.monotonic() < until:
                time.sleep(0.01)
            model = TINY[:2]
            return run("add-column", where, "caption", "frame_times", *model, "--workers", 1)

        for where in (whole, store):
            if where == store:
                self.race(encode, add)
            encode(where).finish()
            add(where).finish()
        self.compare(store, whole)
        self.prove_rows(self.rows, store)

    def race_convert(self) -> None:
        whole, store = self.folder / "tars", self.disk / "tars"

        def convert(where: Path = store) -> Run:
            return run("convert", self.whole, where, "--format", "webdataset")

        self.race(convert, convert)
        for where in (whole, store):
            convert(where).finish()
        self.compare(store, whole)
        self.prove_rows(self.rows, store)
        self.flip(store)

    def race_reader(self) -> None:
        """Read beside a run: what can be read is right."""
        ended = self.folder / "ended"

        def read_on() -> None:
            while not ended.exists():
                with suppress(LatentsError):
                    for name, row in rows_of(self.store).items():
                        if self.rows[name] != row:
                            raise WrongError(f"a reader beside a writer gets a wrong {name}")
                time.sleep(0.02)

        reader = Run(read_on)
        self.race(self.encode)
        ended.touch()
        reader.finish()

    def spoil_disk(self, trial: str) -> None:
        """Let the disk be full, or be read only, from some moment of a run on."""
        if self.deaths >= MOST_DEATHS:
            return
        if not self.has_disk:
            started = self.encode(most_bytes=self.rng.randint(100, 20_000))
        else:
            started = self.encode()
            started.wait(self.moment(0.9))
            used = shutil.disk_usage(self.disk).used + self.rng.choice([0, 4096, 16384])
            option = "ro" if trial == "read_only" else f"size={used + 4096}"
            until = time.monotonic() + 5  # a file that is open for writing forbids it
            while not self._mount("-o", f"remount,{option}") and time.monotonic() < until:
                time.sleep(0.002)
        started.end()
        self.deaths += started.code not in FINISHED
        self.figures[f"faults: {trial}"] += started.code not in FINISHED
        self._mount("-o", f"remount,rw,size={DISK_BYTES}")

    def replace_video(self) -> None:
        """Replace a video by one of the same size: a row is of the one that the plan names."""
        corpus, store, versions = self.folder / "replaced", self.disk / "replaced", {}
        shutil.copytree(self.corpus, corpus)
        videos = [self.folder / name / "replaced.mp4" for name in ("old", "new")]
        for video in videos:
            write_video(video, 2.1, seed=self.rng.randrange(1 << 30))
        size = 8 + max(video.stat().st_size for video in videos)
        for video in videos:
            short = size - video.stat().st_size
            video.write_bytes(
                video.read_bytes() + short.to_bytes(4, "big") + b"free".ljust(short - 4, b"\0")
            )
            versions[hashlib.sha256(video.read_bytes()).hexdigest()] = self.alone(video.parent)
        shutil.copy(videos[0], corpus)
        started = self.encode(*BY_ONE, corpus=corpus, store=store)
        started.wait(self.moment(1.2))
        shutil.copy(videos[1], self.folder / "swapped")
        (self.folder / "swapped").replace(corpus / "replaced.mp4")
        if started.is_running and self.rng.random() < 0.5:
            self.end_by_signal(started, "run")
        else:
            started.finish()
        for _ in range(2):
            self.encode(*BY_ONE, corpus=corpus, store=store).finish()
        self.prove_rows(self.alone(self.corpus), store)
        planned, found = result_of(lambda: [sums_of(store, "replaced.mp4"), rows_of(store)])
        for name in versions[planned[0]]:
            if name in found and found[name] not in {versions[sum_][name] for sum_ in planned}:
                raise WrongError(f"{store}: {name} has latents of a video that is not the plan's")

    def use_s3(self) -> None:
        """Write to a server that fails, read through a cache, and flip bits in the cache."""
        url, fetched, cache = (
            f"s3://{BUCKET}/soak/store",
            self.folder / "fetched",
            self.folder / "cache",
        )
        with s3_server(self.seed) as environment:
            environment["REDUCIO_CACHE"] = str(cache)
            start = partial(run, "encode-corpus", self.corpus, url, *TINY, environment=environment)
            self.race(*[start] * self.rng.randint(1, 2))
            start().finish()
            result_of(lambda: fetch(url, fetched), environment)
            self.compare(fetched, self.whole)
            run("verify", url, environment=environment).finish()
            for _ in range(2):
                self.prove_cached(url, environment)
                blob = self.rng.choice([p for p in files_in(cache) if p.name.endswith(BLOB)])
                sound = blob.read_bytes()
                flip_bit(blob, self.rng)
                self.figures["bits flipped: in the cache"] += 1
                self.prove_cached(url, environment)
                self.figures["bits found: in the cache"] += blob.read_bytes() == sound

    def prove_cached(self, url: str, environment: dict[str, str]) -> None:
        if result_of(lambda: rows_of(url), environment) != self.rows:
            raise WrongError("other rows come through the cache")


def files_in(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.rglob("*")) if p.is_file() and p.stat().st_size]


def sums_of(store: Path, video: str) -> list[str]:
    """Return the checksums of all videos of this name that a plan has."""
    return [v["sha256"] for v in open_store(store).plan.videos.to_pylist() if v["video"] == video]


def fetch(url: str, folder: Path) -> None:
    files = open_files(url)
    for name in files.list(""):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(files.read(name))


def flip_bit(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


TRIALS: dict[str, Callable[[Round], None]] = {
    "run": lambda this: this.kill("run"),
    "main": lambda this: this.kill("main"),
    "worker": lambda this: this.kill_worker(decode_workers),
    "rank": Round.kill_rank,
    "actor": Round.kill_actor,
    "same": Round.race_same,
    "overlap": Round.race_overlap,
    "columns": Round.race_columns,
    "convert": Round.race_convert,
    "reader": Round.race_reader,
    "full": lambda this: this.spoil_disk("full"),
    "read_only": lambda this: this.spoil_disk("read_only"),
    "replaced": Round.replace_video,
    "s3": Round.use_s3,
}


def rounds(arguments: argparse.Namespace, figures: Counter[str]) -> Iterator[str]:
    """Do all rounds; yield what went wrong."""
    names = arguments.trials.split(",") if arguments.trials else list(TRIALS)
    until = time.monotonic() + 60 * arguments.minutes
    number = -1 if arguments.only is None else arguments.only - 1
    last = arguments.rounds if arguments.only is None else arguments.only + 1
    while time.monotonic() < until and (number := number + 1) != last:
        seed, begun = f"{arguments.seed}/{number}", time.monotonic()
        rng = random.Random(f"trials of {seed}")
        trials = names if arguments.trials else rng.sample(names, rng.randint(1, 3))
        folder = Path(tempfile.mkdtemp(prefix="soak"))  # short, for the sockets of Ray
        figures["rounds"] += 1
        this, wrong = None, ""
        try:
            this = Round(seed, folder, figures)
            this.prove(trials)
        except WrongError as err:
            wrong = f"--seed {arguments.seed} --only {number} ({', '.join(trials)}): {err}"
            shutil.copytree(folder / "disk", folder / "kept", dirs_exist_ok=True)
        finally:
            subprocess.run(["umount", "-l", folder / "disk"], check=False, capture_output=True)
            if not wrong:
                shutil.rmtree(folder)
        took = f"{time.monotonic() - begun:.1f} s"
        print(f"round {number}: {', '.join(trials)}: {took}{', FAILED' * bool(wrong)}", flush=True)
        if wrong:
            yield f"{wrong}\nkept in {folder}"


def table(figures: Counter[str], failures: int, took_s: float) -> str:
    """Return the figures as a table in Markdown."""
    groups: dict[str, list[str]] = {}
    for name, count in sorted(figures.items()):
        group, _, what = name.partition(": ")
        groups.setdefault(group, []).append(f"{what} {count:,}".strip())
    lines = [f"| {name} | {', '.join(said)} |" for name, said in groups.items()]
    ends = [f"| wall time | {took_s / 60:.1f} min |", f"| failures | {failures} |"]
    return "\n".join(["| what | how often |", "|---|---|", *lines, *ends])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--rounds", type=int, default=-1, help="end after so many")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, metavar="ROUND", help="repeat this round alone")
    parser.add_argument(
        "--trials", metavar="NAMES", help=f"all of these in each round: {', '.join(TRIALS)}"
    )
    parser.add_argument("--out", type=Path, help="file for the table")
    arguments = parser.parse_args()
    if unknown := {*(arguments.trials or "run").split(",")} - {*TRIALS}:
        parser.error(f"--trials: {', '.join(sorted(unknown))} is none of {', '.join(TRIALS)}")
    if find_spec("ray") is None:
        del TRIALS["actor"]
    for module in FORKED:
        import_module(module)
    exec(FAULTY_DECODER, {})
    begun, figures, failures = time.monotonic(), Counter[str](), list[str]()
    for failure in rounds(arguments, figures):
        print(failure, flush=True)
        failures.append(failure)
        if len(failures) == MOST_FAILURES:
            break
    said = table(figures, len(failures), time.monotonic() - begun)
    print(said)
    if arguments.out:
        arguments.out.write_text(f"{said}\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()

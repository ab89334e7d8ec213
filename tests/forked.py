"""Python processes that cost no imports: forked off one that has imported all and used nothing.

It is itself forked off the tests' process once that has collected them. The tests' process will not
do in its place: autograd refuses to work in a fork of a process that used it.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import gc
import importlib
import json
import logging
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from multiprocessing import util
from pathlib import Path
from types import ModuleType
from typing import IO, Any

PR_SET_CHILD_SUBREAPER = 36
LIBC = ctypes.CDLL(None, use_errno=True)


class Python:
    """`python WORDS`, as subprocess.Popen would start it: a child of this process."""

    def __init__(
        self,
        words: Sequence[object],
        env: Mapping[str, str] = os.environ,
        *,
        start_new_session: bool = False,
    ) -> None:
        self.returncode: int | None = None
        self._output: list[IO[str]] = [tempfile.TemporaryFile("w+") for _ in range(2)]
        fds = [file.fileno() for file in self._output]
        request = {
            "words": [*map(str, words)], "env": dict(env), "folder": str(Path.cwd()),
            "leads": start_new_session,
        }  # fmt: skip
        with _adopting():
            line = json.dumps(request).encode()
            (server,) = SERVERS.values()
            socket.send_fds(server, [len(line).to_bytes(8, "little")], fds)
            server.sendall(line)
            self.pid = int.from_bytes(server.recv(8, socket.MSG_WAITALL), "little")
            assert self.pid, "the process that others are forked off has ended"

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout_s: float = 600.0) -> int:
        end_s = time.monotonic() + timeout_s
        while self.poll() is None:
            if time.monotonic() > end_s:
                self.kill()
                raise AssertionError(f"it went on for {timeout_s:g} s: {self._texts()}")
            time.sleep(0.005)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout_s: float = 600.0) -> tuple[str, str]:
        """Wait, and return what was printed, and what to stderr."""
        self.wait(timeout_s)
        return self._texts()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _texts(self) -> tuple[str, str]:
        texts = []
        for file in self._output:
            file.seek(0)
            texts.append(file.read())
        return texts[0], texts[1]


SERVERS: dict[int, socket.socket] = {}
"""By process: the one that others are forked off, once it is there; it ends when this one does."""


def start_server() -> None:
    """Fork it off. This process must have used nothing yet."""
    ours, theirs = socket.socketpair()
    server = os.fork()
    if server:
        theirs.close()
        SERVERS[server] = ours
        return
    try:
        _forget_the_tests(theirs.fileno())
        serve(theirs)
    finally:
        os._exit(0)


def fork_for(path: bytes, words: list[str], fds: list[int]) -> int:
    """Start in a fork of this process what multiprocessing starts by a new interpreter.

    Its fork server is one such: it takes the same place among the processes, without the imports.
    """
    pid = os.fork()
    if pid:
        return pid
    try:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _let_go({0, 1, 2, *map(int, fds)})
        exec(words[-1], {})  # `from multiprocessing.forkserver import main; main(...)`
    finally:
        os._exit(0)


def _let_go(kept: set[int]) -> None:
    """Let go of what is open but for `kept`. Each keeps its number, which something may close."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in {int(path.name) for path in Path("/dev/fd").iterdir()} - kept - {nothing}:
        with suppress(OSError):
            os.dup2(nothing, fd)


def _forget_the_tests(kept: int) -> None:
    """Let go of what pytest has open and has put in place of Python's own."""
    _let_go({1, 2, kept})
    for name in [name for name in sys.modules if name.startswith("huggingface_hub")]:
        del sys.modules[name]  # it reads the environment when it is imported
    gc.enable()
    faulthandler.disable()
    signal.set_wakeup_fd(-1)
    sys.unraisablehook, threading.excepthook = sys.__unraisablehook__, threading.__excepthook__
    logging.getLogger().handlers.clear()
    importlib.reload(warnings)


@contextmanager
def _adopting() -> Iterator[None]:
    """Let processes whose parents end become this one's children."""
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        LIBC.prctl(PR_SET_CHILD_SUBREAPER, 0)


def serve(requests: socket.socket) -> None:
    """Fork off what is asked for, twice: the parent in between ends, so that the asker adopts."""
    is_ready = False
    while True:
        size, fds, _, _ = socket.recv_fds(requests, 8, 2)
        if not size:
            return
        if not is_ready:
            prepare()
            is_ready = True
        request = json.loads(requests.recv(int.from_bytes(size, "little"), socket.MSG_WAITALL))
        told, tell = os.pipe()
        between = os.fork()
        if between == 0:
            pid = os.fork()
            if pid == 0:
                requests.close()
                os.close(told)
                os.close(tell)
                for fd, target in zip(fds, (1, 2), strict=True):
                    os.dup2(fd, target)
                be(request)
            os.write(tell, pid.to_bytes(8, "little"))
            os._exit(0)
        os.waitpid(between, 0)
        requests.sendall(os.read(told, 8))
        for fd in (*fds, told, tell):
            os.close(fd)


def be(request: dict[str, Any]) -> None:
    """Run a script, a module or code in place of this process, and end it as Python would."""
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    sys.modules["__main__"] = ModuleType("__main__")
    util.spawnv_passfds = fork_for  # type: ignore[assignment]
    code: Any = 1
    try:
        code = _run(**request)
    except SystemExit as err:
        code = err.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for file in (sys.stdout, sys.stderr):
            file.flush()
        os._exit(int(code or 0))


def _run(words: list[str], env: dict[str, str], folder: str, leads: bool) -> int:
    import runpy

    import torch

    if leads:
        os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(int(env.get("OMP_NUM_THREADS", "1")))
    sys.path[:0] = [path for path in env.get("PYTHONPATH", "").split(":") if path]
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.argv = words[1:]
        if not hasattr(sys.modules.get(words[1]), "__path__"):  # of a package, __main__ is run
            sys.modules.pop(words[1], None)
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")
    return 0


def free_port() -> int:
    """Return a free port of this machine, below those that systems give to who asks for any: until
    it is used, nobody else is given it but by the same chance."""
    for port in random.SystemRandom().sample(range(15_000, 32_000), 100):
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def keep_small_models() -> None:
    """Make each small untrained model once a process, and copy it: that takes a tenth as long."""
    from reducio_latents.autoencoders import reducio
    from reducio_latents.vae.weights import LoadedVAE

    load = reducio.load_vae  # type: ignore[attr-defined]
    kept: dict[Any, LoadedVAE] = {}

    def load_or_copy(state: Any, *parts: Any, **options: Any) -> LoadedVAE:
        is_random = state.where.startswith("random weights")
        if not is_random or state.shapes["encoder_3d.conv_in.weight"][0] > 16:
            return load(state, *parts, **options)
        key = (state.where, *state.shapes.values(), *parts, *map(str, options.values()))
        if key not in kept:
            kept[key] = load(state, *parts, **options)
        model, sha256 = kept[key]
        return LoadedVAE(deepcopy(model), sha256)

    reducio.load_vae = load_or_copy  # type: ignore[attr-defined]


PRELOADED = [
    "torch._dynamo",  # what every optimiser imports
    "reducio_latents.cli.encoding",
    "reducio_latents.encode.run",
    "reducio_latents.train.loop",
    "reducio_latents.upkeep.convert",
    "reducio_latents.upkeep.verify",
]


def prepare() -> None:
    """Import what no test that was collected has, and make a model that many ask for."""
    for name in PRELOADED:
        importlib.import_module(name)
    importlib.import_module("reducio_latents").load_autoencoder("reducio-random:8")

"""What all tests share: properties are checked without a clock; CPU time is told of the slowest."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from collections.abc import Generator
from multiprocessing import forkserver
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from reducio_latents.core.choices import usable_cores
from tests.forked import SERVERS, keep_small_models, start_server

# An older CPU is one for all libraries: PyTorch alone, held to one, packs for the AMX that oneDNN
# sees, and fails ("pack_vnni2 is only supported when avx512 is supported").
OLDER = {"default": "SSE41", "avx2": "AVX2"}
if isa := OLDER.get(os.environ.get("ATEN_CPU_CAPABILITY", "")):
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", isa)

# No test has a network, whatever the machine has: the Hub's client is told, others find none.
os.environ |= {"HF_HUB_OFFLINE": "1", "https_proxy": "http://127.0.0.1:9"}

# Compiled code is kept, whatever the shell says: each of many processes would compile it again.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Many small processes do better with one thread each than with all of them on the same cores; and a
# process whose libraries have made threads cannot be forked.
os.environ.setdefault("OMP_NUM_THREADS", "1")

FIRST = (
    "encode_faults train_run train_step examples encode_engines two_writers trainers encode_bench "
    "columns_add dataset_ranks dataset_resume autoencoder_table processes encode_fast_path "
    "store_fuzz train_tools video_shared vae_model vae_golden norm_triton encode_source"
)
"""Files of tests that take longest. They begin first: whoever ends last then has little left."""
MOST_CPU_S = 20.0
"""Of one test, on an idle machine; those that take longer are named at the end."""

# No deadline: how long an example takes says how busy the machine is, and nothing of the code.
settings.register_profile(
    "any machine",
    deadline=None,
    max_examples=50,  # twice as many find little more, and take seconds
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    derandomize="CI" in os.environ,
)
settings.load_profile("any machine")


def pytest_xdist_auto_num_workers() -> int:
    """What `-n auto` means: tests also wait, for processes that start and for limits of time."""
    return usable_cores() * 3 // 2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {f"test_{name}": rank for rank, name in enumerate(FIRST.split())}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    gc.disable()  # what is imported and collected stays; it need not be looked through
    collected = yield
    if session.items:  # not in the process that only shares them out
        keep_small_models()
        start_server()
        gc.freeze()
    gc.enable()
    return collected


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Keep the CPU seconds of a test, its fixtures and its processes."""
    item.stash[_BEGUN_S] = cpu_seconds()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "teardown":
        cpu_s = cpu_seconds() - item.stash[_BEGUN_S]
        report.user_properties.append(("cpu_s", round(cpu_s, 2)))
    return report


def cpu_seconds() -> float:
    """Return what this process, those it waited for and its workers have used by now.

    A fork server lives on, and workers are its to wait for.
    """
    used_s, ticks_s = sum(os.times()[:4]), os.sysconf("SC_CLK_TCK")
    workers = [worker.pid for worker in multiprocessing.active_children()]
    for pid in (getattr(STARTER, "_forkserver_pid", None), *SERVERS, *workers):
        try:
            fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        except OSError:  # it has just ended, or there is no /proc
            continue
        used_s += sum(map(int, fields[11:15])) / ticks_s
    return used_s


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    found = [
        (float(str(dict(report.user_properties).get("cpu_s", 0.0))), report.nodeid)
        for reports in terminalreporter.stats.values()
        for report in reports
        if isinstance(report, pytest.TestReport)
    ]
    terminalreporter.write_line(f"{sum(cpu_s for cpu_s, _ in found):.0f} s of CPU")
    for cpu_s, name in sorted(found, reverse=True):
        if cpu_s > MOST_CPU_S:
            terminalreporter.write_line(f"{cpu_s:.0f} s of CPU: {name}")


STARTER = getattr(forkserver, "_forkserver", None)
"""What knows multiprocessing's fork server."""

_BEGUN_S = pytest.StashKey[float]()

"""What all tests share: properties are checked without a clock; CPU time is told of the slowest."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
from hypothesis import HealthCheck, settings

MOST_CPU_S = 20.0
"""Of one test, on an idle machine; those that take longer are named at the end."""

# No deadline: how long an example takes says how busy the machine is, and nothing of the code.
settings.register_profile(
    "any machine",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    derandomize="CI" in os.environ,
)
settings.load_profile("any machine")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Keep the CPU seconds of a test, its fixtures and the processes that it waited for."""
    begun_s = sum(os.times()[:4])
    item.stash[_BEGUN_S] = begun_s
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "teardown":
        cpu_s = sum(os.times()[:4]) - item.stash[_BEGUN_S]
        report.user_properties.append(("cpu_s", round(cpu_s, 2)))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    found = [
        (float(str(dict(report.user_properties).get("cpu_s", 0.0))), report.nodeid)
        for reports in terminalreporter.stats.values()
        for report in reports
        if isinstance(report, pytest.TestReport)
    ]
    for cpu_s, name in sorted(found, reverse=True):
        if cpu_s > MOST_CPU_S:
            terminalreporter.write_line(f"{cpu_s:.0f} s of CPU: {name}")


_BEGUN_S = pytest.StashKey[float]()

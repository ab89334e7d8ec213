"""Few calls lie between the command and what it is for."""

from __future__ import annotations

from pathlib import Path

from tests.forked import Python

TOOL = Path(__file__).parent.parent / "tools" / "trace_depth.py"


def test_a_clip_is_at_most_ten_calls_from_the_model_and_from_its_file() -> None:
    run = Python([TOOL])
    printed, errors = run.communicate()
    chains = [line for line in printed.splitlines() if line.endswith("calls")]
    assert len(chains) == 2, errors
    assert all(int(line.split()[-2]) <= 10 for line in chains), printed
    assert run.returncode == 0

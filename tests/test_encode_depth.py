"""Few calls lie between the command and what it is for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parent.parent / "tools" / "trace_depth.py"


def test_a_clip_is_at_most_ten_calls_from_the_model_and_from_its_file() -> None:
    run = subprocess.run([sys.executable, TOOL], capture_output=True, text=True, timeout=600)
    chains = [line for line in run.stdout.splitlines() if line.endswith("calls")]
    assert len(chains) == 2, run.stderr
    assert all(int(line.split()[-2]) <= 10 for line in chains), run.stdout
    assert run.returncode == 0

#!/usr/bin/env python
"""How fast clips are encoded, against the loop that most scripts have: `reducio-latents bench`.

    python tools/bench_encode.py [--model reducio-random:128] [--device cuda] [--corpus FOLDER]

For a machine that has no more than torch and numpy there is tools/gpu_report.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

from reducio_latents.cli import main

if __name__ == "__main__":
    main(["bench", *sys.argv[1:]])

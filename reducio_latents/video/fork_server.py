"""Imported by the fork server of the worker processes; elsewhere it does nothing.

A stopping machine sends SIGTERM to every process, a closing terminal SIGHUP. The fork server must
not end by it: its workers would end with it, and the clips in their hands would be blamed.
"""

from __future__ import annotations

import signal
import sys

if any("multiprocessing.forkserver" in word for word in sys.orig_argv):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

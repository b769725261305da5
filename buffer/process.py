"""Processes that do not outlive the one that started them, however that ends."""

from __future__ import annotations

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1
"""`prctl` option: the signal the kernel sends us when our parent dies (linux/prctl.h)."""


def end_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Has the kernel send this process a signal when its parent dies, even by kill -9 (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number)
